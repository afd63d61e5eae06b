"""The megablox Pallas kernel that ships with jax."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import megablox

from moe_jax.core.errors import ConfigError

CHECKED = False  # It does not say over which mesh axes its result varies.
_LANES = 128
# Rows, contraction and columns of a tile; 512 x 2048 x 1024 overflows VMEM.
_ROW_TILE, _TILE = 512, 1024


def matmul(x_ND, w_EDF, tokens_per_expert_E):
  rows, d = x_ND.shape
  row_tile = min(_ROW_TILE, -(-rows // _LANES) * _LANES)
  padding = -rows % row_tile
  # The kernel visits whole row tiles only, and is wrong for partial ones.
  y_NF = megablox.gmm(
    jnp.pad(x_ND, ((0, padding), (0, 0))),
    w_EDF,
    tokens_per_expert_E,
    preferred_element_type=x_ND.dtype,
    tiling=(row_tile, _tile(d), _tile(w_EDF.shape[2])),
  )
  return y_NF[:rows]


def _tile(size):
  """The largest multiple of 128 up to 1024 that divides the axis."""
  for tile in range(_TILE, 0, -_LANES):
    if size % tile == 0:
      return tile
  raise ConfigError(
    f"the TPU grouped matmul needs widths divisible by {_LANES}, got {size};"
    " change d_model or d_expert, or use the dispatcher gather"
  )
