"""Losses that keep the router's columns apart, and look at no load.

With W the router's matrix, a column w_e for each expert:

  norm = "l1"       coefficient * sum_ij |W^T W - I|_ij   (SimBal, 2506.14038)
  norm = "squared"  coefficient * sum_ij (U^T U - I)_ij^2, U being W with columns of
                    length 1 (ERNIE 4.5's router loss)

A router with orthogonal columns keeps the similarities of tokens, so that tokens
spread as they differ. It does not look at loads, and balances them only if
tokens are diverse. There cannot be more orthogonal columns than the model is wide.

We know SimBal from its abstract, and ERNIE's loss from the summary of its report.
"""

import jax.numpy as jnp

from moe_jax.core.options import number, word
from moe_jax.moe.types import Balancer, Mean

CONTRACT_EXCEPTIONS = {
  "loss": "is about the router's parameters, not loads",
  "uniform": "is about the router's parameters, not loads",
  "collapse": "is about the router's parameters, not loads",
  "empty": "is about the router's parameters, not loads",
}


def build(
  coefficient: number(0), norm: word("l1", "squared") = "l1"
) -> Balancer:
  """A balancer that only adds a loss of the router's matrix.

  Args:
    coefficient: factor of the loss, which is summed over layers.
    norm: "l1" or "squared", see the head of this file.
  """

  def loss(state, stats, so_far_E, router_params):
    del state, so_far_E
    kernel_DE = router_params["kernel"]
    if norm == "squared":
      square_E = jnp.square(kernel_DE).sum(0)
      tiny = jnp.finfo(kernel_DE.dtype).tiny
      kernel_DE = kernel_DE / jnp.sqrt(jnp.maximum(square_E, tiny))[None, :]
    gram_EE = jnp.matmul(kernel_DE.T, kernel_DE, precision="highest")
    apart_EE = gram_EE - jnp.eye(len(gram_EE), dtype=gram_EE.dtype)
    size_EE = abs(apart_EE) if norm == "l1" else jnp.square(apart_EE)
    tokens = stats.tokens.sum().astype(kernel_DE.dtype)
    return Mean(coefficient * size_EE.sum() * tokens, tokens)

  return Balancer(loss=loss, needs=frozenset({"kernel"}))
