"""Auxiliary-loss-free balancing (Wang et al., 2408.15664, Algorithm 1).

A number per expert is added to the scores for choosing only. After every
step it moves against the load error: up where an expert got too little.
"""

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.moe.types import Balancer


def build(
  rate: float,
  rule: str = "sign",
  centered: bool = False,
  freeze_after: int | None = None,
) -> Balancer:
  """Args:
  rate: u, the size of a step; 1e-3 in the paper for 40,000 steps.
  rule: "sign": b += u sign(e), or "proportional": b += u e / mean load,
    with e = mean load - load.
  centered: subtract the mean of b afterwards; choices are unchanged.
  freeze_after: no update from this step on (DeepSeek-V3's last tokens).
  """
  if rate < 0:
    raise ConfigError(f"the rate of balancers/bias is 0 or more, not {rate}")
  if rule not in ("sign", "proportional"):
    raise ConfigError(f'the rule is "sign" or "proportional", not "{rule}"')

  def update(state, stats, step):
    load_E = stats.count_E.sum((0, 1)).astype(state["bias_E"].dtype)
    error_E = load_E.mean() - load_E
    if rule == "sign":
      move_E = jnp.sign(error_E)
    else:
      move_E = error_E / jnp.maximum(load_E.mean(), 1)
    bias_E = state["bias_E"] + rate * move_E
    if centered:
      bias_E -= bias_E.mean()
    if freeze_after is not None:
      bias_E = jnp.where(step < freeze_after, bias_E, state["bias_E"])
    return {"bias_E": bias_E}

  return Balancer(
    init=lambda num_experts: {"bias_E": jnp.zeros(num_experts)},
    select=lambda state, score_TE: (
      score_TE + state["bias_E"].astype(score_TE.dtype)[None, :]
    ),
    loss=None,
    update=update,
  )
