"""Slots filled by gathering tokens, and emptied by gathering slots."""

import flax.struct
import jax.numpy as jnp

from moe_jax.moe import dispatchers
from moe_jax.moe.types import Array, Dispatcher, Rows


@flax.struct.dataclass
class Plan:
  """owner_N: (g * T + t) * K + k of the assignment in a slot, out of range for
  an empty one; slots are in the order [G, E, C].
  slot_GTK: the slot of an assignment, N if it has none."""

  owner_N: Array
  slot_GTK: Array
  weight_GTK: Array
  kept_GTK: Array
  num_experts: int = flax.struct.field(pytree_node=False)
  weight_input: bool = flax.struct.field(pytree_node=False)

  def dispatch(self, x_GTD: Array) -> Rows:
    groups = x_GTD.shape[0]
    x_ND = to_rows(
      x_GTD, self.owner_N, self.slot_GTK, self.weight_GTK, self.weight_input
    )
    return Rows(x_ND.reshape(groups, self.num_experts, -1, x_ND.shape[-1]))

  def combine(self, rows: Rows) -> Array:
    x_ND = rows.x.reshape(-1, rows.x.shape[-1])
    return from_rows(
      x_ND, self.owner_N, self.slot_GTK, self.weight_GTK, self.weight_input
    )


def to_rows(x_GTD, owner_N, row_GTK, weight_GTK, weight_input):
  """Every row's token, scaled by the weight if that is for the input."""
  top_k = row_GTK.shape[2]
  x_ND = dispatchers.take(
    x_GTD.reshape(-1, x_GTD.shape[-1]),
    owner_N // top_k,
    row_GTK.reshape(-1, top_k),
  )
  if weight_input:
    weight_N1 = dispatchers.take(
      weight_GTK.reshape(-1, 1), owner_N, row_GTK.reshape(-1, 1)
    )
    x_ND *= weight_N1.astype(x_ND.dtype)
  return x_ND


def from_rows(x_ND, owner_N, row_GTK, weight_GTK, weight_input):
  """sum_k weight * row, in the weights' dtype, returned in x's."""
  groups, tokens, top_k = row_GTK.shape
  if weight_input:
    weight_GTK = jnp.ones_like(weight_GTK)
  y_ND = dispatchers.combine(
    x_ND,
    weight_GTK.reshape(-1, top_k),
    row_GTK.reshape(-1, top_k),
    owner_N,
  )
  return y_ND.astype(x_ND.dtype).reshape(groups, tokens, -1)


def owners(row_GTK: Array, num_rows: int) -> Array:
  """The inverse of row_GTK: the flat assignment of every row."""
  none = jnp.full(num_rows, row_GTK.size, jnp.int32)
  owner = jnp.arange(row_GTK.size, dtype=jnp.int32)
  return none.at[row_GTK.reshape(-1)].set(owner, mode="drop")


def build(order: str = "token") -> Dispatcher:
  """Args: order: who gets slots first, "token" or "choice" (`capacity.rank`)."""
  dispatchers.check_order(order)

  def plan(routing, num_experts, bound):
    dispatchers.check_bound(bound, num_experts)
    slot_GTK, kept_GTK = dispatchers.assign(routing, num_experts, bound, order)
    slots = num_experts * bound.slots
    rows = kept_GTK.shape[0] * slots
    group_G11 = jnp.arange(kept_GTK.shape[0])[:, None, None]
    slot_GTK += group_G11 * slots + routing.expert_TK * bound.slots
    slot_GTK = jnp.where(kept_GTK, slot_GTK, rows)
    return Plan(
      owners(slot_GTK, rows),
      slot_GTK,
      routing.weight_TK,
      kept_GTK,
      num_experts,
      routing.weight_input,
    )

  return Dispatcher(
    plan,
    causal=lambda top_k, bound: dispatchers.causal(order, top_k, bound),
    ragged=False,
  )
