"""The router z-loss: mean logsumexp(logits)^2 (ST-MoE, 2202.08906, eq. 5)."""

from moe_jax.core.errors import ConfigError
from moe_jax.moe.types import Balancer, Mean

CONTRACT_EXCEPTIONS = {
  "uniform": "is about logits, not loads",
  "collapse": "is about logits, not loads",
}


def build(coefficient: float) -> Balancer:
  """Args: coefficient: 1e-3 in ST-MoE and OLMoE. Summed over layers."""
  if coefficient < 0:
    raise ConfigError(
      f"the coefficient of balancers/z_loss is 0 or more, not {coefficient}"
    )

  def loss(state, stats, so_far_E):
    del state, so_far_E
    total = coefficient * stats.z.sum()
    return Mean(total, stats.tokens.sum().astype(total.dtype))

  return Balancer(
    init=lambda num_experts: {},
    select=lambda state, score_TE: score_TE,
    loss=loss,
    update=lambda state, stats, step: state,
  )
