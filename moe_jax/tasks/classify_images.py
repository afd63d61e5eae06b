"""Classification of images, each with one label."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import (
  integer,
  number,
  of,
  optional,
  section,
  text,
  word,
)
from moe_jax.data.images import augment as augment_lib
from moe_jax.data.images import batches, prepared
from moe_jax.moe.types import Array, Mean
from moe_jax.tasks import Task, few_shot, pictures

_AUGMENT = section(of(augment_lib.Augmentation), required=())
TEXT = False  # Its batches have none.
_TOP = 5  # The second accuracy counts a label among this many best classes.


def build(
  config,
  mesh=None,
  fingerprint: str | None = None,
  prepare: bool = True,
  image: text() = "image",
  label: text() = "label",
  size: prepared.SIZE = None,
  stored_size: prepared.SIZE = None,
  channels: prepared.CHANNELS = None,
  crop: prepared.CROP = None,
  num_classes: optional(integer(2)) = None,
  loss: word("softmax", "sigmoid") = "softmax",
  label_smoothing: number(0, below=1) = 0.0,
  augment: _AUGMENT = dataclasses.asdict(augment_lib.Augmentation()),  # noqa: B008
) -> Task:
  """Returns the task of a config, with its images prepared.

  Args:
    config: a whole config, of which `data.name`, `data.dir`, `data.cache_dir`,
      `data.batch_size`, `train.accumulation`, `eval` and `plugins` are read.
    mesh: is not used.
    fingerprint, prepare: as in `next_token.build`; without batches nothing is
      read.
    image, label: names of the features.
    size: pixels on each side, or (height, width), of the model's images; None:
      those of the data, which then have one size.
    stored_size: the size of the images in the cache, of which `augment.area`
      takes parts; None: `size`.
    channels: 1 or 3, to which the images are changed; None: unchanged.
    crop: share that is kept of the middle of an image, see `prepared.Size`.
    num_classes: of the model; None: those of the data.
    loss: "softmax", the cross-entropy of exclusive classes, or "sigmoid", the
      sum over classes of the cross-entropy of each alone (V-MoE, 2106.05974, in
      pre-training).
    label_smoothing: share of a label that all classes have equal parts of, in
      training (1512.00567, 7).
    augment: options of `augment.Augmentation`.

  Raises:
    ConfigError: no such data, images of several sizes, or impossible numbers.
  """
  how = augment_lib.Augmentation(**augment)
  stored = prepared.Size(prepared.pair(stored_size or size), channels, crop)
  if prepare:
    features = prepared.Features(image, label)
    images = prepared.of_config(config, features, stored, fingerprint)
  else:
    if stored.pixels is None:
      raise ConfigError(
        "task.size = None is that of the data, which is not read here; set it"
      )
    images = prepared.Images(config.data.name, (*stored.pixels, channels or 3))
  how.check(images.shape[2])
  options = {"loss": loss, "label_smoothing": label_smoothing, "augment": how}
  size = prepared.pair(size) or images.shape[:2]
  return of_images(config, images, size, num_classes, **options)


def of_images(
  config, images: prepared.Images, size, num_classes=None, **options
) -> Task:
  """Returns the task of a config on images that are prepared already.

  Args:
    config: as in `build`.
    images: from `prepared.prepare`; without arrays, the task has no batches.
    size: height and width of the model's images.
    num_classes: see `build`.
    **options: of `scoring`.

  Raises:
    ConfigError: the number of classes is unknown, or less than the data's.
  """
  known = len(images.classes)
  if num_classes is None and not known:
    raise ConfigError(
      "task.num_classes = None is that of the data, which is not read here; set it"
    )
  if num_classes is not None and num_classes < known:
    raise ConfigError(
      f"task.num_classes = {num_classes} is less than the {known} classes of dataset"
      f" {images.name}; raise it, or set it to None"
    )

  def scale(x):
    return augment_lib.scaled(x, tuple(size), jnp.float32)

  return scoring(
    images.shape,
    tuple(size),
    num_classes or known,
    **options,
    train=functools.partial(
      batches.train_batches,
      images,
      batch_size=config.data.batch_size,
      accumulation=config.train.accumulation,
    ),
    validation=functools.partial(
      batches.validation_batches,
      images,
      batch_size=config.eval.batch_size,
      batches_per_domain=config.eval.batches_per_domain,
    ),
    few_shot=functools.partial(few_shot.accuracies, images, scale),
    check_few_shot=functools.partial(few_shot.check, images),
    pictures=functools.partial(pictures.experts, images, scale),
    domains=(batches.DOMAIN,),
    name=images.name,
    fingerprint=images.fingerprint,
    sources=images.sources,
  )


def scoring(
  shape: tuple[int, int, int],
  size: tuple[int, int],
  num_classes: int,
  *,
  loss: str = "softmax",
  label_smoothing: float = 0.0,
  augment: augment_lib.Augmentation = augment_lib.Augmentation(),  # noqa: B008
  **data,
) -> Task:
  """Returns the task of any batch: its losses and metrics.

  Args:
    shape: H, W and channels of the images of a batch.
    size: height and width of the model's images.
    num_classes: of the model.
    loss, label_smoothing, augment: see `build`.
    **data: fields of `Task` that depend on the data; none: no batches.
  """
  losses = LOSSES[loss]

  def score(model, variables, batch, rng, first, train, collect=None):
    """`Task.loss`, with sums of right answers."""
    dtype = jnp.promote_types(model.arch.dtype, jnp.float32)
    label_B, mask_B = batch["label"], batch["mask"]
    target_BC = jax.nn.one_hot(label_B, num_classes, dtype=dtype)
    if train and rng is not None:
      own = jax.random.fold_in(rng, _OF_AUGMENTATION)
      x = augment_lib.changed(augment, batch["image"], size, dtype, own, first)
      target_BC += label_smoothing * (1 / num_classes - target_BC)
      x, target_BC = augment_lib.mixed(augment, x, target_BC, own, first)
    else:
      x = augment_lib.scaled(batch["image"], size, dtype)
    options = {"first": first, "train": train, "collect": collect}
    logits_BC, aux = model.apply(variables, x, mask_B, rng, **options)
    loss_B = jnp.where(mask_B, losses(logits_BC, target_BC), 0)
    weight = mask_B.sum().astype(loss_B.dtype)
    sums = {
      f"right_{n}": _right(logits_BC, label_B, mask_B, n) for n in (1, _TOP)
    }
    return Mean(loss_B.sum(), weight), sums, aux

  scalar = functools.partial(jax.ShapeDtypeStruct, ())
  return Task(
    spec={
      "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
      "label": scalar(jnp.int32),
      "mask": scalar(jnp.bool_),
    },
    weight=lambda batch: batch["mask"].sum(),
    loss=score,
    metrics=_metrics,
    by_domain=("accuracy",),
    given={"image_shape": (*size, shape[2]), "num_classes": num_classes},
    **data,
  )


_OF_AUGMENTATION = 2**30  # Folded into the key; no layer has this index.


def softmax_cross_entropy(logits_BC: Array, target_BC: Array) -> Array:
  """Returns -sum over classes of target log p, in nats, [B].

  Args:
    logits_BC: any numbers.
    target_BC: shares of the classes, which add up to 1.
  """
  return -(target_BC * jax.nn.log_softmax(logits_BC, axis=-1)).sum(axis=-1)


def sigmoid_cross_entropy(logits_BC: Array, target_BC: Array) -> Array:
  """Returns the sum over classes of binary cross-entropies, in nats, [B].

  -target log(p) - (1 - target) log(1 - p), for p = sigmoid(logit).

  Args:
    logits_BC, target_BC: any numbers; from 0 to 1.
  """
  log_p, log_not = jax.nn.log_sigmoid(logits_BC), jax.nn.log_sigmoid(-logits_BC)
  return -(target_BC * log_p + (1 - target_BC) * log_not).sum(axis=-1)


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}


def _right(logits_BC, label_B, mask_B, n):
  """The number of labels among the n best classes; of equals the first is best.

  A label whose logits have NaN is not counted.
  """
  own_B1 = jnp.take_along_axis(logits_BC, label_B[:, None], axis=1)
  before_BC = jnp.arange(logits_BC.shape[1])[None] < label_B[:, None]
  better_BC = ~(logits_BC <= own_B1) | ((logits_BC == own_B1) & before_BC)
  return ((better_BC.sum(axis=1) < n) & mask_B).sum()


def _metrics(loss: Mean, sums) -> dict[str, Mean]:
  """The loss in nats, and the shares of labels among the best classes."""
  names = {1: "accuracy", _TOP: f"accuracy_{_TOP}"}
  right = {
    name: Mean(sums[f"right_{n}"], loss.weight) for n, name in names.items()
  }
  return {"loss": loss, **right}
