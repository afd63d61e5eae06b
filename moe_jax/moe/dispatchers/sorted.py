"""Rows sorted by expert: dropless, or bounded by expert or by bucket.

MegaBlocks (2211.15841) without padding; the experts use a grouped matmul.
"""

import jax.numpy as jnp

from moe_jax.core.options import word
from moe_jax.moe import dispatchers
from moe_jax.moe.dispatchers import gather
from moe_jax.moe.types import Dispatcher


def build(
  order: word(*dispatchers.ORDERS) = "token", renormalize: bool = False
) -> Dispatcher:
  """A dispatcher that sorts; it is dropless, or takes any bound.

  Args:
    order: who gets slots first, "token" or "choice" (`dispatchers.rank`).
    renormalize: give the weights of dropped assignments to the token's other experts,
      so that their sum stays the same (NLLB-MoE, 2207.04672).
  """
  return dispatchers.in_order(order, renormalize, _lay_out, ragged=True)


def _lay_out(plan, slot_GTK):
  expert_GTK, num_experts = plan.choice.expert_TK, plan.num_experts
  groups, tokens, top_k = expert_GTK.shape
  rows = dispatchers.most_rows(tokens, top_k, num_experts, plan.bound)
  group_G11 = jnp.arange(groups)[:, None, None]
  count_GE = jnp.zeros((groups, num_experts), jnp.int32)
  kept_GTK = plan.kept_GTK.astype(jnp.int32)
  count_GE = count_GE.at[group_G11, expert_GTK].add(kept_GTK)
  count_N = count_GE.T.reshape(-1)
  start_EG = (jnp.cumsum(count_N) - count_N).reshape(num_experts, groups)
  row_GTK = start_EG[expert_GTK, group_G11] + slot_GTK
  return gather.plan_rows(plan, row_GTK, rows * groups, count_GE)
