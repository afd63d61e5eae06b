"""A loss of the entropy of each token's probabilities.

  loss = coefficient * mean over tokens of - sum_e p_te log p_te, in nats

With the router `top_p` it keeps probabilities peaked, so that few experts are enough
to reach p (2403.07652, eq. 6, with 1e-4). It balances nothing.
"""

from moe_jax.core.options import number
from moe_jax.moe.types import Balancer, Mean

CONTRACT_EXCEPTIONS = {
  "loss": "is about each token, not loads",
  "uniform": "is about each token, not loads",
  "collapse": "is about each token, not loads",
}


def build(coefficient: number(0)) -> Balancer:
  """A balancer that only adds the loss of entropy.

  Args:
    coefficient: factor of the loss, which is summed over layers.
  """

  def loss(state, stats, so_far_E, router_params):
    del state, so_far_E, router_params
    total = coefficient * stats.entropy.sum()
    return Mean(total, stats.tokens.sum().astype(total.dtype))

  return Balancer(loss=loss, needs=frozenset({"prob_TE"}))
