"""Slots filled by gathering tokens, and emptied by gathering slots."""

import flax.struct
import jax.numpy as jnp

from moe_jax.core.options import word
from moe_jax.moe import capacity, dispatchers, plans
from moe_jax.moe.types import Array, Dispatcher, Rows


@flax.struct.dataclass
class RowPlan(plans.TokenPlan):
  """Every row is a copy of a token, and every result is gathered from its row.

  owner_N: (g * T + t) * K + k of the assignment in a row, out of range for an
    empty row. Rows of slots are in the order [G, E, C].
  row_GTK: the row of an assignment, N if it has none.
  tokens_per_expert_GE: for ragged rows; None for slots.
  """

  owner_N: Array
  row_GTK: Array
  tokens_per_expert_GE: Array | None = None

  def dispatch(self, x_GTD: Array) -> Rows:
    """Every row's token, scaled by the weight if that is for the input."""
    top_k, choice = self.row_GTK.shape[2], self.choice
    x_ND = dispatchers.take(
      x_GTD.reshape(-1, x_GTD.shape[-1]),
      self.owner_N // top_k,
      self.row_GTK.reshape(-1, top_k),
    )
    if choice.weight_input:
      weight_N1 = dispatchers.take(
        choice.weight_TK.reshape(-1, 1),
        self.owner_N,
        self.row_GTK.reshape(-1, 1),
      )
      x_ND *= weight_N1.astype(x_ND.dtype)
    if self.tokens_per_expert_GE is not None:
      return Rows(x_ND, self.tokens_per_expert_GE)
    shape = (x_GTD.shape[0], self.num_experts, -1, x_ND.shape[-1])
    return Rows(x_ND.reshape(shape))

  def combine(self, rows: Rows) -> Array:
    """sum_k weight * row, in the weights' dtype, returned in that of the rows."""
    groups, tokens, top_k = self.row_GTK.shape
    weight_GTK, x_ND = self.choice.weight_TK, rows.x
    if self.choice.weight_input:
      weight_GTK = jnp.ones_like(weight_GTK)
    y_ND = dispatchers.combine(
      x_ND.reshape(-1, x_ND.shape[-1]),
      weight_GTK.reshape(-1, top_k),
      self.row_GTK.reshape(-1, top_k),
      self.owner_N,
    )
    return y_ND.astype(x_ND.dtype).reshape(groups, tokens, -1)


def owners(row_GTK: Array, num_rows: int) -> Array:
  """The inverse of row_GTK: the flat assignment of every row."""
  none = jnp.full(num_rows, row_GTK.size, jnp.int32)
  owner = jnp.arange(row_GTK.size, dtype=jnp.int32)
  return none.at[row_GTK.reshape(-1)].set(owner, mode="drop")


def build(order: word(*capacity.ORDERS) = "token") -> Dispatcher:
  """Args: order: who gets slots first, "token" or "choice" (`capacity.rank`)."""

  def plan(choice, num_experts, bound):
    dispatchers.check_bound(bound, num_experts)
    slot_GTK, kept_GTK = dispatchers.assign(choice, num_experts, bound, order)
    slots = num_experts * bound.slots
    rows = kept_GTK.shape[0] * slots
    group_G11 = jnp.arange(kept_GTK.shape[0])[:, None, None]
    slot_GTK += group_G11 * slots + choice.expert_TK * bound.slots
    slot_GTK = jnp.where(kept_GTK, slot_GTK, rows)
    owner_N = owners(slot_GTK, rows)
    return RowPlan(choice, kept_GTK, num_experts, False, owner_N, slot_GTK)

  return Dispatcher(
    plan,
    causal=lambda top_k, bound: dispatchers.causal(order, top_k, bound),
    ragged=False,
  )
