"""Rows sorted by expert: dropless, or bounded by expert or by bucket.

MegaBlocks (2211.15841) without padding; the experts use a grouped matmul.
"""

import flax.struct
import jax.numpy as jnp

from moe_jax.moe import dispatchers
from moe_jax.moe.dispatchers import gather
from moe_jax.moe.types import Array, Dispatcher, Rows


@flax.struct.dataclass
class Plan:
  """owner_N: (g * T + t) * K + k of the assignment in a row, out of range for
  none. row_GTK: the row of an assignment, N if it has none."""

  owner_N: Array
  row_GTK: Array
  tokens_per_expert_GE: Array
  weight_GTK: Array
  kept_GTK: Array
  weight_input: bool = flax.struct.field(pytree_node=False)

  def dispatch(self, x_GTD: Array) -> Rows:
    x_ND = gather.to_rows(
      x_GTD, self.owner_N, self.row_GTK, self.weight_GTK, self.weight_input
    )
    return Rows(x_ND, self.tokens_per_expert_GE)

  def combine(self, rows: Rows) -> Array:
    return gather.from_rows(
      rows.x, self.owner_N, self.row_GTK, self.weight_GTK, self.weight_input
    )


def build(order: str = "token") -> Dispatcher:
  """Args: order: who gets slots first, "token" or "choice" (`capacity.rank`)."""
  dispatchers.check_order(order)

  def plan(routing, num_experts, bound):
    slot_GTK, kept_GTK = dispatchers.assign(routing, num_experts, bound, order)
    groups, tokens, top_k = kept_GTK.shape
    rows = tokens * top_k
    if bound is not None:
      rows = min(rows, bound.slots * bound.expert_buckets)
    rows *= groups

    group_G11 = jnp.arange(groups)[:, None, None]
    count_GE = jnp.zeros((groups, num_experts), jnp.int32)
    count_GE = count_GE.at[group_G11, routing.expert_TK].add(
      kept_GTK.astype(jnp.int32)
    )
    start_EG = jnp.cumsum(count_GE.T.reshape(-1)) - count_GE.T.reshape(-1)
    start_EG = start_EG.reshape(num_experts, groups)
    row_GTK = start_EG[routing.expert_TK, group_G11] + slot_GTK
    row_GTK = jnp.where(kept_GTK, row_GTK, rows)
    return Plan(
      gather.owners(row_GTK, rows),
      row_GTK,
      count_GE,
      routing.weight_TK,
      kept_GTK,
      routing.weight_input,
    )

  return Dispatcher(
    plan,
    causal=lambda top_k, bound: dispatchers.causal(order, top_k, bound),
    ragged=True,
  )
