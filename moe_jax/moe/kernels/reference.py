"""jax.lax.ragged_dot: right everywhere, slow on CPU (all experts' products).

On TPU its weight gradient is dense too: use the backend `tpu` there.
"""

import jax
import jax.numpy as jnp


def matmul(x_ND, w_EDF, tokens_per_expert_E):
  """Returns y_NF, where y[n] is x[n] times the matrix of row n's expert.

  Args:
    x_ND, w_EDF: rows sorted by expert, and a matrix of each expert.
    tokens_per_expert_E: rows of each expert.
  """
  accumulator = jnp.promote_types(x_ND.dtype, jnp.float32)
  y_NF = jax.lax.ragged_dot(
    x_ND, w_EDF, tokens_per_expert_E, preferred_element_type=accumulator
  )
  return y_NF.astype(x_ND.dtype)
