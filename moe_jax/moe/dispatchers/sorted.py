"""Rows sorted by expert: dropless, or bounded by expert or by bucket.

MegaBlocks (2211.15841) without padding; the experts use a grouped matmul.
"""

import functools

import jax.numpy as jnp

from moe_jax.core.options import word
from moe_jax.moe import dispatchers
from moe_jax.moe.dispatchers import gather
from moe_jax.moe.types import Dispatcher


def build(order: word(*dispatchers.ORDERS) = "token") -> Dispatcher:
  """Args: order: who gets slots first, "token" or "choice" (`dispatchers.rank`)."""

  def plan(choice, num_experts, bound):
    slot_GTK, kept_GTK = dispatchers.assign(choice, num_experts, bound, order)
    groups, tokens, top_k = kept_GTK.shape
    rows = tokens * top_k
    if bound is not None:
      rows = min(rows, bound.slots * bound.expert_buckets)
    rows *= groups

    group_G11 = jnp.arange(groups)[:, None, None]
    count_GE = jnp.zeros((groups, num_experts), jnp.int32)
    count_GE = count_GE.at[group_G11, choice.expert_TK].add(
      kept_GTK.astype(jnp.int32)
    )
    count_N = count_GE.T.reshape(-1)
    start_EG = (jnp.cumsum(count_N) - count_N).reshape(num_experts, groups)
    row_GTK = start_EG[choice.expert_TK, group_G11] + slot_GTK
    return gather.plan_rows(
      choice, kept_GTK, row_GTK, rows, num_experts, bound, count_GE
    )

  causal = functools.partial(dispatchers.causal, order)
  return Dispatcher(plan, causal, ragged=True)
