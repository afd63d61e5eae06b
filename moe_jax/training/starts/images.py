"""Weights of a vision transformer for images of another size, or other classes."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from moe_jax.core.errors import ConfigError


def fitted(params: Mapping, model, path: str) -> dict:
  """Parameters for a model that reads other images than before.

  Where the grid of patches is another one, the vectors of places are interpolated, as
  in fine-tuning at a higher resolution (2010.11929, 3.2). An output layer of other
  classes begins anew.

  Args:
    params: of a vision transformer, in numpy.
    model: of the run; whatever has no images takes all as they are.
    path: of the source, for messages.

  Raises:
    ConfigError: places that are no square grid.
  """
  arch = getattr(model, "arch", None)
  params, own = dict(params), getattr(arch, "image", None)
  if own is None:
    return params
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
  if places == rows * columns:
    return positions_1LD
  side = math.isqrt(places)
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
