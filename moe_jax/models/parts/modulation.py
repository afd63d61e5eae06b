"""Shifts, scales and gates of sublayers that depend on a condition.

  x + gate * f(norm(x) * (1 + scale) + shift)

in the place of x + f(norm(x)), where the norm has no parameters (DiT, 2212.09748, 3.2).
One projection of the condition serves all layers, and each layer adds numbers of its
own (PixArt-alpha, 2310.00426, 2.3; Wan, 2503.20314).
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from moe_jax.core import roles
from moe_jax.moe.types import Array

OF_A_BLOCK = 6  # Three numbers for attention, and three for the network.


class Modulation(NamedTuple):
  """shift, scale, gate: [B, 1, D], in at least float32; gate may be None."""

  shift: Array
  scale: Array
  gate: Array | None = None

  def entered(self, x_BLD: Array) -> Array:
    """Returns the input of the sublayer: normalised x (1 + scale) + shift."""
    return (x_BLD * (1 + self.scale) + self.shift).astype(x_BLD.dtype)

  def left(self, y_BLD: Array) -> Array:
    """Returns the output of the sublayer times its gate, to be added to x."""
    return (y_BLD * self.gate).astype(y_BLD.dtype)


def of_block(module: nn.Module, condition_BND: Array | None) -> dict:
  """Returns {"attention", "ffn": Modulation} of a block; {} for no condition.

  Args:
    module: linen module that has the block's own numbers.
    condition_BND: N = 6 vectors of the condition.
  """
  if condition_BND is None:
    return {}
  parts = split(module, condition_BND)
  return {"attention": Modulation(*parts[:3]), "ffn": Modulation(*parts[3:])}


def split(module: nn.Module, condition_BND: Array) -> list[Array]:
  """Returns N arrays [B, 1, D]: the condition's vectors plus learned numbers.

  Args:
    module: linen module that has the learned numbers.
    condition_BND: N vectors of the condition.
  """
  _, number, width = condition_BND.shape
  init = nn.initializers.normal(width**-0.5)
  init = roles.declared(init, (None, None), "modulation")
  own_ND = module.param("modulation", init, (number, width))
  return jnp.split(condition_BND + own_ND[None], number, axis=1)
