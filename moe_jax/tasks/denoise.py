"""Denoising: a diffusion transformer learns the flow from noise to videos.

  x_t = (1 - t) x + t noise;  velocity v = noise - x = d x_t / d t

with t from 0, no noise, to 1, noise alone (flow matching, 2210.02747; rectified flow,
2209.03003). The loss is the mean square of the prediction minus v, or minus the
noise. t = s u / (1 + (s - 1) u) of a uniform u, where the shift s above 1 means more
noise (2403.03206, 5.3.2).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import (
  either,
  integer,
  items,
  number,
  optional,
  text,
  word,
)
from moe_jax.data.images import prepared, videos
from moe_jax.models.diffusion import Condition
from moe_jax.moe.types import Mean
from moe_jax.tasks import Task, pictures

TEXT = False  # Its batches have none.
EXPERTS = (
  "high",
  "low",
)  # Networks for timesteps from the boundary on, and below it.
_OF_NOISE = 2**30  # Folded into the key; no layer or group has this index.
_POSITIVE = integer(1)
_SHAPE = optional(items((_POSITIVE,) * 4))


def build(
  config,
  mesh=None,
  fingerprint: str | None = None,
  prepare: bool = True,
  image: text() = "image",
  label: text() = "label",
  size: prepared.SIZE = None,
  channels: prepared.CHANNELS = None,
  crop: prepared.CROP = None,
  shape: _SHAPE = None,
  text: optional(items((_POSITIVE, _POSITIVE))) = None,
  more_channels: integer(0) = 0,
  num_classes: integer(0) = 0,
  predict: word("velocity", "noise") = "velocity",
  shift: number(above=0) = 1.0,
  boundary: optional(number(0, 1)) = None,
  expert: optional(word(*EXPERTS)) = None,
  unconditional: number(0, below=1) = 0.1,
  guidance: either(number(0), items((number(0), number(0)))) = 1.0,
  levels: integer(1, 100) = 8,
) -> Task:
  """Returns the task of a config, with its data prepared.

  Args:
    config: a whole config, of which `data.name`, `data.dir`, `data.cache_dir`,
      `data.batch_size`, `train.accumulation`, `eval` and `plugins` are read. The data are
      images as `classify_images` has them, or arrays, see `videos`.
    mesh: is not used.
    fingerprint, prepare: as in `next_token.build`; without batches nothing is read.
    image, label, size, channels, crop: of images, as in `classify_images.build`.
    shape, text, more_channels, num_classes: of the data, where it is not read:
      (frames, height, width, channels), (vectors of a text, their width), ...; where it
      is read they need not be given.
    predict: the model's prediction from a noisy video.
    shift: s of training and of sampling.
    boundary: the timestep from which on another network is used; None: one network
      is for all.
    expert: the network that this run is of, "high" from the boundary on or "low".
    unconditional: share of the videos whose condition is left out in training, for
      guidance (2207.12598).
    guidance: of sampling; two numbers are those of the two networks, "high" first.
    levels: ranges of timesteps whose losses are reported. A network of a part of the
      timesteps has its part of them, one at least. They are of equal size.

  Raises:
    ConfigError: no such data, or impossible numbers.
  """
  del mesh, guidance  # Sampling reads it.
  ends = timesteps(boundary, expert)
  sizes = {"num_classes": num_classes, "more_channels": more_channels}
  sizes |= {"shape": shape, "text": text and tuple(text)}
  if prepare:
    found = _read(config, image, label, size, channels, crop, fingerprint)
    _check(found, sizes)
  else:
    sizes["shape"] = tuple(shape or _of_size(size, channels))
    found = videos.Videos(config.data.name, **sizes)
  options = {"predict": predict, "shift": shift, "unconditional": unconditional}
  return of_videos(config, found, _ranges(levels, ends), ends, **options)


def _check(found, sizes):
  """Raises ConfigError for sizes of a config that are not those of the data."""
  for key, value in sizes.items():
    there = getattr(found, key)
    value = tuple(value) if isinstance(value, list | tuple) else value
    if value and value != there:
      raise ConfigError(
        f"task.{key} = {value} is not that of the data, {there}; set it to that"
      )


def _of_size(size, channels):
  """The shape of images of this size."""
  if size is None:
    raise ConfigError(
      "task.shape = None is that of the data, which is not read here; set it"
    )
  return (1, *prepared.pair(size), channels or 3)


def _ranges(levels, ends):
  """{name: (from, to)} of ranges of timesteps, of equal size between two ends."""
  number = max(1, round(levels * (ends[1] - ends[0])))
  edges = np.linspace(*ends, number + 1).tolist()
  return {f"{a:.3f}-{b:.3f}": (a, b) for a, b in zip(edges, edges[1:])}


def timesteps(boundary, expert) -> tuple[float, float]:
  """Returns (lowest, highest) timestep of a network.

  Args:
    boundary, expert: as in `build`.

  Raises:
    ConfigError: an expert without a boundary, or without timesteps.
  """
  if (boundary is None) != (expert is None):
    raise ConfigError(
      f"task.boundary = {boundary} and task.expert = {expert!r}: a boundary parts two"
      ' networks, of which a run trains one, "high" or "low"; give both or neither'
    )
  ends = {None: (0.0, 1.0), "high": (boundary, 1.0), "low": (0.0, boundary)}
  low, high = ends[expert]
  if low >= high:
    raise ConfigError(
      f"task.boundary = {boundary} leaves no timesteps for task.expert = {expert!r};"
      " change one of them"
    )
  return float(low), float(high)


def _read(config, image, label, size, channels, crop, fingerprint):
  """The `videos.Videos` of a config."""
  data = config.data
  if videos.is_folder(data.dir):
    found = videos.of_folder(data.name, data.dir, data.cache_dir)
    if fingerprint not in (None, found.fingerprint):
      raise ConfigError(
        f"the arrays in {data.dir} are not those that the run began with; bring those"
        " back, or start a new run"
      )
    return found
  size = prepared.Size(prepared.pair(size), channels, crop)
  features = videos.Features(image, label)
  images = prepared.of_config(config, features, size, fingerprint, 1)
  return videos.of_images(images)


def of_videos(config, found: videos.Videos, ranges, ends, **options) -> Task:
  """Returns the task of a config on videos that are prepared already.

  Args:
    config: as in `build`.
    found: from `videos`; without arrays, the task has no batches.
    ranges: {name: (from, to)} of the timesteps of validation.
    ends: the lowest and highest timestep of training.
    **options: predict, shift, unconditional of `build`.
  """
  scalar = functools.partial(jax.ShapeDtypeStruct, ())
  spec = {"mask": scalar(jnp.bool_), "time": scalar(jnp.float32)}
  spec["number"] = scalar(jnp.int32)
  kinds = found.arrays.get("train", {"video": np.zeros((0, *found.shape))})
  for kind, array in kinds.items():
    dtype = np.int32 if kind == "label" else array.dtype
    spec[kind] = jax.ShapeDtypeStruct(array.shape[1:], dtype)
  sizes = {"batch_size": config.data.batch_size}
  more = {"batch_size": config.eval.batch_size}
  more["batches_per_domain"] = config.eval.batches_per_domain
  return Task(
    spec=spec,
    weight=lambda batch: batch["mask"].sum(),
    loss=functools.partial(_loss, ends, options),
    metrics=lambda loss, sums: {"loss": loss},
    by_domain=("loss",),
    given={
      "video_shape": found.shape,
      "more_channels": found.more_channels,
      "num_classes": found.num_classes,
      "text": found.text,
    },
    train=functools.partial(
      videos.train_batches,
      found,
      **sizes,
      accumulation=config.train.accumulation,
    ),
    validation=functools.partial(
      videos.validation_batches, found, ranges, **more
    ),
    pictures=functools.partial(pictures.denoised, found, ends, options),
    domains=tuple(ranges),
    name=found.name,
    fingerprint=found.fingerprint,
    sources=found.sources,
  )


def shifted(u, shift: float):
  """Returns the timestep t of a uniform u; see the head of this file.

  Args:
    u: from 0 to 1, of any shape.
    shift: s, above 0.
  """
  return shift * u / (1 + (shift - 1) * u)


def _loss(
  ends, options, model, variables, batch, rng, first, train, collect=None
):
  """`Task.loss`: the mean over the numbers of a video, summed over videos."""
  x = videos.numbers(batch["video"], model.arch.dtype)
  draws = train and rng is not None
  key, index = jax.random.key(1), batch["number"]
  if draws:
    key = jax.random.fold_in(rng, _OF_NOISE)
    index = jnp.asarray(first) + jnp.arange(len(x))
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(index)
  keys_B3 = jax.vmap(lambda key: jax.random.split(key, 3))(keys_B)
  drawn_B = jax.vmap(functools.partial(_timestep, ends, options["shift"]))(
    keys_B3[:, 0]
  )
  time_B = jnp.where(batch["time"] < 0, drawn_B, batch["time"]).astype(x.dtype)
  normal = functools.partial(
    jax.random.normal, shape=x.shape[1:], dtype=x.dtype
  )
  noise = jax.vmap(normal)(keys_B3[:, 1])
  share = time_B.reshape(-1, *(1,) * (x.ndim - 1))
  noisy = (1 - share) * x + share * noise
  target = noise - x if options["predict"] == "velocity" else noise
  left_out_B = jnp.zeros(len(x), bool)
  if draws:
    chance = functools.partial(jax.random.bernoulli, p=options["unconditional"])
    left_out_B = jax.vmap(chance)(keys_B3[:, 2])
  if "more" in batch:
    noisy = jnp.concatenate(
      [noisy, videos.numbers(batch["more"], x.dtype)], axis=-1
    )
  more = {"first": first, "train": train, "collect": collect}
  args = noisy, time_B, condition(batch, left_out_B), batch["mask"], rng
  predicted, aux = model.apply(variables, *args, **more)
  error_B = jnp.square(predicted - target).mean(axis=(1, 2, 3, 4))
  total = jnp.where(batch["mask"], error_B, 0).sum()
  return Mean(total, batch["mask"].sum().astype(total.dtype)), {}, aux


def condition(batch, left_out_B) -> Condition:
  """Returns the condition of a batch; a condition that is left out is empty.

  Args:
    batch: its "label", "text" and "text_mask" are read, if it has them.
    left_out_B: bool.
  """
  label_B, text_BMT = batch.get("label"), batch.get("text")
  if label_B is not None:
    label_B = jnp.where(left_out_B, -1, label_B)
  if text_BMT is not None:
    text_BMT = jnp.where(left_out_B[:, None, None], 0, text_BMT)
  return Condition(label_B, text_BMT, batch.get("text_mask"))


def _timestep(ends, shift, key):
  """A timestep between the ends, for a uniform u."""
  low, high = (x / (shift - (shift - 1) * x) for x in ends)
  return shifted(jax.random.uniform(key, minval=low, maxval=high), shift)
