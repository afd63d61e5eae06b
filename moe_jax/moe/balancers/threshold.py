"""Thresholds of experts: the moving quantile of each expert's scores.

For the router `expert_threshold` (2603.11535): a token goes to every expert whose
score is above the expert's threshold,

  threshold_e = decay * threshold_e + (1 - decay) * the 1 - share quantile of s_te

over the tokens of a step, with share = K/E. Like expert choice it fills experts
evenly, and unlike it a token's experts depend on that token alone.

The quantile comes from histograms, as in `quantile`. We know the method from the
paper's abstract; the form of the moving average is ours.
"""

import jax.numpy as jnp

from moe_jax.core.options import integer, number
from moe_jax.moe.balancers import quantile
from moe_jax.moe.types import Balancer

CONTRACT_OPTIONS = {"share": 0.25}


def build(
  share: number(above=0, below=1),
  decay: number(0, below=1) = 0.9,
  bins: integer(10, 100_000) = 1000,
) -> Balancer:
  """A balancer that keeps a threshold for each expert.

  Args:
    share: of the tokens that an expert is to get, K/E.
    decay: of the moving average, after the first step, which sets thresholds.
    bins: of each expert's histogram, for scores between 0 and 1.
  """
  ends = jnp.zeros(()), jnp.ones(())

  def init(num_experts):
    none_E = jnp.zeros(num_experts)
    return {"threshold_E": none_E, "steps": jnp.zeros((), jnp.int32)}

  def observe(state, routing, mask_T):
    del state
    score_TE = quantile.scores_of(routing)
    return {"scores_EB": quantile.histogram(score_TE, mask_T, *ends, bins)}

  def update(state, stats, step):
    del step
    count_EB = stats.observed["scores_EB"].sum((0, 1))
    tokens = count_EB[0].sum()
    before_E = state["threshold_E"]
    wanted = (1 - share) * tokens.astype(before_E.dtype)
    low, high = (x.astype(before_E.dtype) for x in ends)
    new_E = quantile.quantiles(count_EB, wanted, low, high)
    kept = jnp.where(state["steps"] == 0, 0, decay)
    new_E = kept * before_E + (1 - kept) * new_E
    return {
      "threshold_E": jnp.where(tokens > 0, new_E, before_E),
      "steps": state["steps"] + (tokens > 0),
    }

  def select(state, score_TE, mask_T):
    del mask_T
    return score_TE - state["threshold_E"].astype(score_TE.dtype)[None, :]

  return Balancer(
    init=init,
    select=select,
    observe=observe,
    update=update,
    per_token=lambda num_experts: share * num_experts,
    needs=frozenset({"score_range"}),
    gives=frozenset({"thresholds"}),
  )
