"""Balances by quantiles of scores, from histograms (after Megatron's QB).

An expert gets its share of the tokens if its cutoff is the 1 - K/E quantile of
its scores. Every step counts each expert's scores in bins, and a bias that is
added for choosing moves the quantiles of all experts to their mean.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.types import Balancer

BINS = 64


def build(decay: float = 0.9, share: float = 0.25) -> Balancer:
  """Args:
  decay: of the moving average of the bias, in [0, 1).
  share: of the tokens that each expert is to get, K / E.
  """

  def init(num_experts):
    return {"bias_E": jnp.zeros(num_experts)}

  def observe(state, routing, mask_T):
    del state
    bin_TE = jnp.clip((routing.prob_TE * BINS).astype(jnp.int32), 0, BINS - 1)
    in_bin_TEB = jax.nn.one_hot(bin_TE, BINS, dtype=jnp.int32)
    return {"scores_EB": (in_bin_TEB * mask_T[:, None, None]).sum(0)}

  def update(state, stats, step):
    del step
    count_EB = stats.observed["scores_EB"].sum((0, 1)).astype(jnp.float32)
    total_E1 = jnp.maximum(count_EB.sum(-1, keepdims=True), 1)
    below_EB = jnp.cumsum(count_EB, axis=-1) / total_E1
    cutoff_E = (below_EB < 1 - share).sum(-1) / BINS
    bias_E = cutoff_E.mean() - cutoff_E
    return {"bias_E": decay * state["bias_E"] + (1 - decay) * bias_E}

  def select(state, score_TE):
    return score_TE + state["bias_E"].astype(score_TE.dtype)[None, :]

  return Balancer(init=init, select=select, observe=observe, update=update)
