"""The router z-loss, which keeps logits small (ST-MoE, 2202.08906, eq. 5).

  loss = coefficient * mean over tokens of logsumexp(logits)^2

It balances nothing; large logits round badly in bfloat16 and make training unstable.
"""

from moe_jax.core.options import number
from moe_jax.moe.types import Balancer, Mean

CONTRACT_EXCEPTIONS = {
  "uniform": "is about logits, not loads",
  "collapse": "is about logits, not loads",
}


def build(coefficient: number(0)) -> Balancer:
  """A balancer that only adds the z-loss.

  Args:
    coefficient: 1e-3 in ST-MoE and OLMoE. Summed over layers.
  """

  def loss(state, stats, so_far_E, router_params):
    del state, so_far_E, router_params
    total = coefficient * stats.z.sum()
    return Mean(total, stats.tokens.sum().astype(total.dtype))

  return Balancer(loss=loss, needs=frozenset({"logits_TE"}))
