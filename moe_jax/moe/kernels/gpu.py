"""tokamax's kernels for GPUs, which the extras cuda12 and cuda13 install.

They are for 16-bit floats and widths divisible by 64. Anything else goes to
`reference`, which is right, but multiplies by every expert's matrix.
"""

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.moe.kernels import reference

try:
  import tokamax
except ImportError as e:
  raise ConfigError(
    f"the grouped_matmul backend gpu needs tokamax ({e}), which the extras"
    " cuda12 and cuda13 install on Python 3.12 or later; or set"
    ' model.moe.grouped_matmul = "reference", which multiplies by every'
    " expert's matrix, or use the dispatcher gather, which needs neither"
  ) from None

CHECKED = False  # It does not say over which mesh axes its result varies.
_TILE = 64  # The gradient of w takes tiles of 64 rows.


def matmul(x_ND, w_EDF, tokens_per_expert_E):
  rows = x_ND.shape[0]
  if x_ND.dtype.itemsize != 2 or any(n % _TILE for n in w_EDF.shape[1:]):
    return reference.matmul(x_ND, w_EDF, tokens_per_expert_E)
  y_NF = tokamax.ragged_dot(
    jnp.pad(x_ND, ((0, -rows % _TILE), (0, 0))),
    w_EDF,
    tokens_per_expert_E,
    preferred_element_type=x_ND.dtype,
  )
  return y_NF[:rows]
