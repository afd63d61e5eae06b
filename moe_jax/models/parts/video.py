"""Videos to vectors of their patches and back, and conditions to vectors."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core import parallel, roles
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items
from moe_jax.models.parts.dense import linear
from moe_jax.moe.types import Array

_SMALL = nn.initializers.normal(0.02)
_FAN = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class Video:
  """The options of a model that reads videos: keys of `config.model.video`.

  They are hashable.

  patch: frames, rows and columns of a patch, which is one token.
  num_waves: number of the timestep's cosines and sines, from which its vectors
    are made; even.
  """

  patch: items((integer(1), integer(1), integer(1)))
  num_waves: integer(2) = 256

  def __post_init__(self):
    if self.num_waves % 2:
      raise ConfigError(
        f"model.video.num_waves = {self.num_waves} is odd; half are cosines"
      )

  def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns the number of patches along frames, rows and columns of a video.

    Args:
      shape: F, H, W and channels.

    Raises:
      ConfigError: `patch` does not divide the lengths.
    """
    for size, side, name in zip(
      shape, self.patch, ("frames", "rows", "columns")
    ):
      if size % side:
        raise ConfigError(
          f"model.video.patch = {tuple(self.patch)} does not divide videos of"
          f" {size} {name}; change it, or the data's size"
        )
    return tuple(size // side for size, side in zip(shape, self.patch))

  def tokens(self, shape: tuple[int, ...]) -> int:
    """Returns L, the tokens of a video."""
    return math.prod(self.grid(shape))

  def places(self, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Returns the frame, row and column [1, L] of every patch."""
    return [x.reshape(1, -1) for x in np.indices(self.grid(shape))]


def vectors(module: nn.Module, arch, video_BFHWC: Array) -> Array:
  """Returns the vectors x_BLD of the patches of videos.

  Args:
    module: the linen module that has the parameters.
    arch: of the model, with fields video, d_model, dtype and mesh.
    video_BFHWC: numbers.
  """
  f, h, w = arch.video.patch
  frames, rows, columns = arch.video.grid(video_BFHWC.shape[1:])
  x = video_BFHWC.reshape(
    -1, frames, f, rows, h, columns, w, video_BFHWC.shape[-1]
  )
  x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
  x_BLP = x.reshape(len(x), frames * rows * columns, -1).astype(arch.dtype)
  x_BLD = linear(module, arch, x_BLP, "patches", arch.d_model, "patches", _FAN)
  return parallel.constrain(x_BLD, ("batch", None, None), arch.mesh)


def unpatched(arch, x_BLP: Array, shape: tuple[int, ...]) -> Array:
  """Returns videos made of the numbers of their patches.

  Args:
    arch: as in `vectors`.
    x_BLP: P numbers of a patch.
    shape: F, H, W and channels of the result.
  """
  grid = arch.video.grid(shape)
  x = x_BLP.reshape(len(x_BLP), *grid, *arch.video.patch, shape[-1])
  return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(x), *shape)


def of_timesteps(module: nn.Module, arch, time_B: Array) -> Array:
  """Returns vectors [B, D] of timesteps, in at least float32.

  Args:
    module, arch: as in `vectors`.
    time_B: from 0, no noise, to 1, noise alone.
  """
  half = arch.video.num_waves // 2
  dtype = jnp.promote_types(time_B.dtype, jnp.float32)
  frequency = 10_000.0 ** (-np.arange(half) / half)
  angle = (
    1000 * time_B.astype(dtype)[:, None] * jnp.asarray(frequency, dtype)[None]
  )
  waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
  x = linear(module, arch, waves, "time_in", arch.d_model, "condition", _SMALL)
  out = "time_out", arch.d_model, "condition", _SMALL
  return linear(module, arch, jax.nn.silu(x), *out)


def of_texts(module: nn.Module, arch, text_BMT: Array) -> Array:
  """Returns vectors [B, M, D] for the vectors that a text encoder has made.

  Args:
    module, arch: as in `vectors`.
    text_BMT: from a text encoder outside of this package.
  """
  text_BMT = text_BMT.astype(arch.dtype)
  x = linear(
    module, arch, text_BMT, "text_in", arch.d_model, "condition", _SMALL
  )
  out = "text_out", arch.d_model, "condition", _SMALL
  return linear(module, arch, jax.nn.gelu(x), *out)


def of_classes(
  module: nn.Module, arch, label_B: Array, num_classes: int
) -> Array:
  """Returns vectors [B, D] of classes.

  Args:
    module, arch: as in `vectors`.
    label_B: int32, in [0, num_classes); below 0: no class, which has a vector
      too.
    num_classes: of the data.
  """
  init = roles.declared(_SMALL, (None, "embed"), "condition")
  table = module.param("classes", init, (num_classes + 1, arch.d_model))
  label_B = jnp.where(label_B < 0, num_classes, label_B)
  return parallel.constrain(table, (None, None), arch.mesh)[label_B]
