"""Images to vectors of their patches, and a vector to logits of classes."""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from moe_jax.core import parallel, roles
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, optional, word
from moe_jax.models.parts.dense import linear
from moe_jax.moe.types import Array

_FAN = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class Image:
  """The options of a model that reads images: keys of `config.model.image`.

  They are hashable.

  patch: pixels on each side of a patch, which is one token (ViT, 2010.11929).
  pooling: the vector that classes are told from: "token", the vector of a class
    token before the patches, or "mean", of all patches (Soft MoE, 2308.00951).
  positions: vectors that are added for places: "learned", for each place, the
    class token's too; "waves", sines and cosines of the row and the column of a
    patch (MoCo v3, 2104.02057); "none".
  d_head: width of a layer tanh(W x + b) before the output (V-MoE has one of the
    model's width); None: there is no such layer.
  head_bias: of the output at the start. V-MoE, whose classes are not exclusive,
    begins with -ln(classes).
  """

  patch: integer(1)
  pooling: word("token", "mean") = "token"
  positions: word("learned", "waves", "none") = "learned"
  d_head: optional(integer(1)) = None
  head_bias: number() = 0.0

  def grid(self, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns the number of rows and of columns of an image's patches.

    Args:
      shape: H, W and channels of an image.

    Raises:
      ConfigError: `patch` does not divide the sides.
    """
    height, width, _ = shape
    if height % self.patch or width % self.patch:
      raise ConfigError(
        f"model.image.patch = {self.patch} does not divide images of {height} x"
        f" {width} pixels; change it or task.size"
      )
    return height // self.patch, width // self.patch

  def tokens(self, shape: tuple[int, int, int]) -> int:
    """Returns L, the tokens of an image, with the class token."""
    rows, columns = self.grid(shape)
    return rows * columns + (self.pooling == "token")


def vectors(module: nn.Module, arch, image_BHWC: Array) -> Array:
  """Returns the vectors x_BLD of the patches of images.

  Args:
    module: the linen module that has the parameters.
    arch: of the model, with fields image, d_model, dtype and mesh.
    image_BHWC: numbers, whose mean is about 0.
  """
  made, shape = arch.image, image_BHWC.shape
  (rows, columns), p = made.grid(shape[1:]), made.patch
  x = image_BHWC.reshape(len(image_BHWC), rows, p, columns, p, shape[3])
  x_BLP = (
    x.swapaxes(2, 3).reshape(len(x), rows * columns, -1).astype(arch.dtype)
  )
  x_BLD = linear(module, arch, x_BLP, "patches", arch.d_model, "patches", _FAN)
  if made.positions == "waves":
    waves_LD = _waves(rows, columns, arch.d_model)
    x_BLD += waves_LD.astype(x_BLD.dtype)[None]
  shape = 1, 1, arch.d_model
  if made.pooling == "token":
    token = _vector(module, "class_token", shape, nn.initializers.zeros)
    token = jnp.broadcast_to(
      token.astype(x_BLD.dtype), (len(x_BLD), *shape[1:])
    )
    x_BLD = jnp.concatenate([token, x_BLD], axis=1)
  if made.positions == "learned":
    shape, init = (1, *x_BLD.shape[1:]), nn.initializers.normal(0.02)  # ViT's.
    x_BLD += _vector(module, "positions", shape, init).astype(x_BLD.dtype)
  return parallel.constrain(x_BLD, ("batch", None, None), arch.mesh)


def pooled(module: nn.Module, arch, x_BLD: Array) -> Array:
  """Returns x_BD, the vectors that classes are told from.

  Args:
    module, arch: as in `vectors`.
    x_BLD: after the last norm.
  """
  made = arch.image
  x_BD = x_BLD[:, 0] if made.pooling == "token" else x_BLD.mean(axis=1)
  if made.d_head is not None:
    x_BD = linear(module, arch, x_BD, "before_head", made.d_head, "head", _FAN)
    x_BD = jnp.tanh(x_BD)
  return x_BD


def logits(module: nn.Module, arch, x_BD: Array, num_classes: int) -> Array:
  """Returns logits of classes [B, classes] in at least float32.

  The weights begin at 0, and the bias at `head_bias`.

  Args:
    module, arch: as in `vectors`.
    x_BD: from `pooled`.
    num_classes: of the output.
  """
  x_BD = x_BD.astype(jnp.promote_types(x_BD.dtype, jnp.float32))
  bias = nn.initializers.constant(arch.image.head_bias)
  inits = nn.initializers.zeros, bias
  return linear(module, arch, x_BD, "head", num_classes, "head", *inits)


def _vector(module, name, shape, init):
  """A parameter for a place or for the class token, which does not decay."""
  made = roles.declared(init, (None, None, "embed"), "embedding")
  return module.param(name, made, shape)


def _waves(rows: int, columns: int, d_model: int) -> np.ndarray:
  """[L, D]: sines and cosines of columns, then of rows, of D/4 frequencies each.

  Raises:
    ConfigError: D is no multiple of 4, or below 8.
  """
  if d_model % 4 or d_model < 8:
    raise ConfigError(
      f'model.image.positions = "waves" needs a d_model that is a multiple of 4, at'
      f" least 8, and it is {d_model}; change one of them"
    )
  frequency = 10_000.0 ** -np.linspace(0, 1, d_model // 4)
  row, column = (x.ravel() for x in np.mgrid[:rows, :columns])
  angles = [np.multiply.outer(x, frequency) for x in (column, row)]
  return np.concatenate(
    [f(x) for x in angles for f in (np.sin, np.cos)], axis=1
  )


def adapted(params: Mapping, arch, path: str) -> dict:
  """Returns parameters of a model of other images, changed for this one.

  Where the grid of patches is another one, the vectors of places are
  interpolated, as in fine-tuning at a higher resolution (2010.11929, 3.2). An
  output layer of other classes begins anew.

  Args:
    params: in numpy.
    arch: of this model, as in `vectors`, with fields shape and num_classes.
    path: of the source, for messages.

  Raises:
    ConfigError: the source's places are no square grid.
  """
  params, own = dict(params), arch.image
  has_token = "class_token" in params
  if has_token != (own.pooling == "token"):
    raise ConfigError(
      f"the model of {path} {'has a' if has_token else 'has no'} class token, and"
      f" model.image.pooling is {own.pooling!r}; set it to that of these weights"
    )
  if "positions" in params and own.positions == "learned":
    token, grid = own.pooling == "token", own.grid(arch.shape)
    params["positions"] = _resized(params["positions"], token, grid, path)
  head = params.get("head")
  if head is not None and head.shape[1] != arch.num_classes:
    logging.warning(
      "The %d classes of %s are not the %d of this run: the output layer is new",
      *(head.shape[1], path, arch.num_classes),
    )
    params["head"] = np.zeros((len(head), arch.num_classes), head.dtype)
    bias = np.full(arch.num_classes, own.head_bias, head.dtype)
    params["head_bias"] = bias
  return params


def _resized(positions_1LD, token, grid, path):
  """Vectors of the places of a grid, from those of a square one."""
  first_1TD, rest_1PD = np.split(positions_1LD, [int(token)], axis=1)
  places, (rows, columns) = rest_1PD.shape[1], grid
  side = math.isqrt(places)
  if places == rows * columns and (rows == columns or side**2 != places):
    return positions_1LD  # As many places: taken for the same grid.
  if side**2 != places:
    raise ConfigError(
      f"the {places} places of patches in {path} are no square, and this model has"
      f" {rows} x {columns}; give weights of square images"
    )
  logging.warning(
    "The places of %d x %d patches in %s become %d x %d",
    *(side, side, path, rows, columns),
  )
  square = rest_1PD.reshape(side, side, -1)
  shape = rows, columns, square.shape[-1]
  made = jax.image.resize(square, shape, "linear", antialias=False)
  made = np.asarray(made).reshape(1, rows * columns, -1)
  return np.concatenate([first_1TD, made], axis=1)
