"""Random changes of images in training, in the compiled step.

Every image has a key of its own, so that a step is the same on every mesh, and when
it is run again. The operations are those of dm-pix and of jax.image.
"""

import dataclasses
import functools

import dm_pix
import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, optional
from moe_jax.moe.types import Array

_OF_MIXUP = 2**30  # Folded into the key; no image has this index.
_SHARE = number(above=0, high=1)
_RATIO = 4 / 3  # The longest side of a part over its shortest (1409.4842).


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """The changes and their strength. Each is drawn for every image.

  area: (least, most) share of the image: a random part of this area is resized
    to the whole size (1409.4842; V-MoE takes 0.05 to 1); None: all of it.
  flip: whether half of the images are mirrored from left to right.
  shift: pixels that an image moves at most in each direction, with zeros
    behind.
  brightness: the most that is added or taken away, of a range from 0 to 1.
  contrast, saturation: the factor is at most 1 + this, and at least 1 - this.
  mixup: parameter a of Beta(a, a), from which the share of a second image and
    of its label is drawn (1710.09412); 0: there is no second image.
  """

  area: optional(items((_SHARE, _SHARE))) = None
  flip: bool = False
  shift: integer(0) = 0
  brightness: number(0, 1) = 0.0
  contrast: number(0, below=1) = 0.0
  saturation: number(0, below=1) = 0.0
  mixup: number(0) = 0.0

  def __post_init__(self):
    if self.area is not None and self.area[0] > self.area[1]:
      raise ConfigError(
        f"task.augment.area = {self.area} is not (least, most); change the order"
      )

  def check(self, channels: int) -> None:
    """Raises ConfigError if images without colours would change saturation."""
    if self.saturation and channels != 3:
      raise ConfigError(
        f"task.augment.saturation = {self.saturation} needs images with 3 channels,"
        f" and these have {channels}; set it to 0, or task.channels to 3"
      )


def scaled(image_BHWC: Array, size: tuple[int, int], dtype) -> Array:
  """Returns images with numbers from -1 to 1.

  Args:
    image_BHWC: uint8.
    size: height and width of the result; images of another size are resized.
    dtype: of the result.
  """
  x = image_BHWC.astype(dtype) / 127.5 - 1
  if x.shape[1:3] != size:
    shape = len(x), *size, x.shape[3]
    x = jax.image.resize(x, shape, "linear")
  return x


def changed(
  how: Augmentation, image_BHWC: Array, size: tuple[int, int], dtype, rng, first
) -> Array:
  """Scales images as `scaled` does, and makes all changes but mixup.

  Args:
    how: the changes.
    image_BHWC: uint8.
    size: height and width of the result.
    dtype: of the result.
    rng: the key of the step.
    first: index of the first image in the batch of the step.
  """
  keys = _of_rows(rng, len(image_BHWC), first)
  x = image_BHWC.astype(dtype) / 255
  one = functools.partial(_changed, how, size)
  return jax.vmap(one)(keys, x) * 2 - 1


def mixed(how: Augmentation, x_BHWC: Array, target_BC: Array, rng, first):
  """Adds to each image and target a share of the next one in the batch.

  x = s * x_b + (1 - s) * x_{b+1}, with max(s, 1 - s) for s from Beta(a, a)
  (mixup, 1710.09412).

  Args:
    how: its `mixup` is a.
    x_BHWC: images.
    target_BC: shares of the classes.
    rng: the key of the step.
    first: index of the first image in the batch of the step.

  Returns:
    The images and the targets, changed.
  """
  if not how.mixup:
    return x_BHWC, target_BC
  keys = _of_rows(jax.random.fold_in(rng, _OF_MIXUP), len(x_BHWC), first)
  beta = lambda key: jax.random.beta(key, how.mixup, how.mixup)  # noqa: E731
  share_B = jax.vmap(beta)(keys).astype(x_BHWC.dtype)
  share_B = jnp.maximum(share_B, 1 - share_B)  # An image keeps at least half.

  def mix(x):
    share = share_B.reshape(-1, *(1,) * (x.ndim - 1))
    return share * x + (1 - share) * jnp.roll(x, -1, axis=0)

  return mix(x_BHWC), mix(target_BC)


def _of_rows(rng, rows, first):
  """A key for each image of the step's batch."""
  index = jnp.asarray(first) + jnp.arange(rows)
  return jax.vmap(functools.partial(jax.random.fold_in, rng))(index)


def _changed(how, size, key, x):
  """Makes the changes of an image with numbers from 0 to 1."""
  keys = jax.random.split(key, 6)
  if how.area is not None or x.shape[:2] != size:
    x = _part(how.area or (1.0, 1.0), size, keys[0], x)
  if how.flip:
    x = dm_pix.random_flip_left_right(keys[1], x)
  if how.shift:
    sides = (how.shift, how.shift)
    padded = jnp.pad(x, (sides, sides, (0, 0)))
    x = dm_pix.random_crop(keys[2], padded, x.shape)
  if how.brightness:
    x = dm_pix.random_brightness(keys[3], x, how.brightness)
  if how.contrast:
    x = dm_pix.random_contrast(keys[4], x, 1 - how.contrast, 1 + how.contrast)
  if how.saturation:
    factors = 1 - how.saturation, 1 + how.saturation
    x = dm_pix.random_saturation(keys[5], x, *factors)
  return jnp.clip(x, 0, 1)


def _part(area, size, key, x):
  """Returns a part of an image, of a random area, shape and place, resized."""
  keys = jax.random.split(key, 4)
  share = jax.random.uniform(keys[0], minval=area[0], maxval=area[1])
  log_ratio = jax.random.uniform(keys[1], minval=-1.0) * jnp.log(_RATIO)
  log_ratio = jnp.where(share < 1, log_ratio, 0)
  # Shares of the height and of the width.
  sides = jnp.sqrt(share) * jnp.exp(jnp.array([-0.5, 0.5]) * log_ratio)
  sides = jnp.minimum(sides, 1)
  place = jax.random.uniform(keys[2], (2,)) * (1 - sides)
  old, new = (jnp.array(s, jnp.float32) for s in (x.shape[:2], size))
  scale = new / (sides * old)
  shift = -place * old * scale
  shape = (*size, x.shape[2])
  return jax.image.scale_and_translate(x, shape, (0, 1), scale, shift, "linear")
