"""Matrix products as XLA on CPU is fast at them."""

import jax.numpy as jnp
from jax import Array


def product(x: Array, w: Array, dtype=None) -> Array:
  """x @ w, with all axes of x except the last joined to one.

  For the gradient of w, XLA on CPU would transpose x and dy in memory if they
  had more than two axes, which costs more than the products of a small layer.

  Args:
    x: [..., D].
    w: [D, ...].
    dtype: of the result, or None for that of the operands.

  Returns:
    [..., ...], the leading axes of x and then the other ones of w.
  """
  x_ND, w_DF = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
  y_NF = jnp.matmul(x_ND, w_DF, preferred_element_type=dtype)
  return y_NF.reshape(*x.shape[:-1], *w.shape[1:])
