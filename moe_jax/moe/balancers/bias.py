"""Auxiliary-loss-free balancing (Wang et al., 2408.15664, Algorithm 1).

A number per expert is added to the scores for choosing only. After every
step it moves against the load error: up where an expert got too little.
"""

import jax.numpy as jnp

from moe_jax.core.options import integer, number, optional, word
from moe_jax.moe.types import Balancer


def build(
  rate: number(0),
  rule: word("sign", "proportional") = "sign",
  centered: bool = False,
  freeze_after: optional(integer(0)) = None,
) -> Balancer:
  """Args:
  rate: u, the size of a step; 1e-3 in the paper for 40,000 steps.
  rule: "sign": b += u sign(e), or "proportional": b += u e / mean load,
    with e = mean load - load.
  centered: subtract the mean of b afterwards; choices are unchanged.
  freeze_after: no update from this step on (DeepSeek-V3's last tokens).
  """

  def update(state, stats, step):
    count_E = stats.count_E.sum((0, 1))
    if rule == "sign":
      move_E = below_mean(count_E)
    else:
      load_E = count_E.astype(state["bias_E"].dtype)
      move_E = (load_E.mean() - load_E) / jnp.maximum(load_E.mean(), 1)
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
    update=update,
  )


def below_mean(count_E):
  """sign(mean load - load): 0 at the exact mean, which floats may miss."""
  if not jnp.issubdtype(count_E.dtype, jnp.integer):
    return jnp.sign(count_E.mean() - count_E)
  total, experts = count_E.sum(dtype=count_E.dtype), count_E.size
  mean, rest = total // experts, total % experts
  above_whole_mean = (count_E == mean) & (rest > 0)
  return jnp.where(above_whole_mean, 1, jnp.sign(mean - count_E))
