"""XLA's ragged_dot: any floats and widths, by all experts' matrices."""

import jax
import jax.numpy as jnp

from moe_jax.moe.kernels import reference

_ROWS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(([0], [0]), ([], [])),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


def refusal(product, device):
  """Returns None: it computes every product.

  Args:
    product, device: as in `gpu.needs`.
  """
  return None


def tilings(product, device):
  """Returns the only tiling, which has no options.

  Args:
    product, device: as in `gpu.needs`.
  """
  return [{}]


def run(kind, a, b, sizes_E, tiles):
  """Computes a product; see the head of the package.

  Args:
    kind, a, b, sizes_E: as in `gpu.compute`.
    tiles: is not used.
  """
  if kind != "dw":
    return reference.matmul(a, b if kind == "y" else b.mT, sizes_E)
  accumulator = jnp.promote_types(a.dtype, jnp.float32)
  dw_EDF = jax.lax.ragged_dot_general(
    a, b, sizes_E, _ROWS, preferred_element_type=accumulator
  )
  return dw_EDF.astype(a.dtype)
