"""Slots filled by gathering tokens, and emptied by gathering slots."""

import jax
import jax.numpy as jnp

from moe_jax.core import parallel
from moe_jax.core.options import word
from moe_jax.moe import dispatchers
from moe_jax.moe.types import Array, Dispatcher, Rows


class RowPlan(dispatchers.TokenPlan):
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
    """Every row's token, scaled by the weight if that is for the input.

    Args:
      x_GTD: tokens.
    """
    top_k = self.row_GTK.shape[2]
    owner_N, row_TK = self.owner_N // top_k, _flat(self.row_GTK)
    x_ND = take(_flat(x_GTD), owner_N, row_TK)
    if self.choice.weight_input:
      weight_N1 = self.choice.weight_TK.reshape(-1, 1)
      row_N1 = self.row_GTK.reshape(-1, 1)
      weight_N1 = take(weight_N1, self.owner_N, row_N1)
      x_ND *= weight_N1.astype(x_ND.dtype)
    if self.tokens_per_expert_GE is not None:
      return Rows(x_ND, self.tokens_per_expert_GE)
    shape = (x_GTD.shape[0], self.num_experts, -1, x_ND.shape[-1])
    return Rows(x_ND.reshape(shape))

  def combine(self, rows: Rows) -> Array:
    """sum_k weight * row, in the rows' dtype.

    Args:
      rows: results of the experts.
    """
    groups, tokens, _ = self.row_GTK.shape
    weight_GTK = self.choice.weight_TK
    if self.choice.weight_input:
      weight_GTK = jnp.ones_like(weight_GTK)
    args = parallel.alike((_flat(rows.x), _flat(weight_GTK)))
    y_TD = combine(*args, _flat(self.row_GTK), self.owner_N)
    return y_TD.reshape(groups, tokens, -1)


@jax.custom_vjp
def take(x_ND: Array, index: Array, inverse_NK: Array) -> Array:
  """Rows of x by index, zeros where it is out of range.

  Its gradient is a gather too, where autodiff would scatter row by row.

  Args:
    x_ND: rows.
    index: int32 of any shape, at most N.
    inverse_NK: where each row of x went in the flat index; out of range for
      none. Every in-range entry of the index must appear once.
  """
  del inverse_NK
  return _take(x_ND, index)


def _take(x_ND, index):
  return jnp.asarray(x_ND).at[index].get(mode="fill", fill_value=0)


def _take_backward(inverse_NK, dy):
  dy_MD = dy.reshape(-1, dy.shape[-1])
  choices = range(inverse_NK.shape[1])
  return sum(_take(dy_MD, inverse_NK[:, k]) for k in choices), None, None


take.defvjp(lambda *args: (take(*args), args[2]), _take_backward)


@jax.custom_vjp
def combine(x_ND, weight_TK, row_TK, owner_N) -> Array:
  """y_t = sum over k of weight_tk * x[row_tk], summed in the weights' dtype.

  Gathers both ways, one for each k, as nothing of size T * K * D is made.
  Returned in the rows' dtype, so that gradients are gathered in it too.

  Args:
    x_ND: rows.
    weight_TK: weights.
    row_TK: int32, out of range for none.
    owner_N: the inverse of row_TK: t * K + k, out of range for none.
  """
  del owner_N
  y_TD = sum(
    weight_TK[:, k, None] * _take(x_ND, row_TK[:, k])
    for k in range(row_TK.shape[1])
  )
  return y_TD.astype(x_ND.dtype)


def _combine_backward(kept, dy_TD):
  x_ND, weight_TK, row_TK, owner_N = kept
  top_k = row_TK.shape[1]
  weight_N = _take(weight_TK.reshape(-1), owner_N)
  dx_ND = weight_N[:, None] * _take(dy_TD, owner_N // top_k)
  dy_TD = dy_TD.astype(weight_TK.dtype)
  dweight_TK = jnp.stack(
    [(dy_TD * _take(x_ND, row_TK[:, k])).sum(-1) for k in range(top_k)], axis=1
  )
  return dx_ND.astype(x_ND.dtype), dweight_TK, None, None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)


def _flat(x):
  """All axes but the last as one."""
  return x.reshape(-1, x.shape[-1])


def plan_rows(plan, row_GTK, num_rows, counts_GE=None) -> RowPlan:
  """The plan of a choice whose kept assignments have these rows.

  Args:
    plan: `dispatchers.TokenPlan`.
    row_GTK: int32, different rows for kept assignments.
    num_rows: N.
    counts_GE: kept assignments of each expert, for ragged rows.
  """
  row_GTK = jnp.where(plan.kept_GTK, row_GTK, num_rows)
  none = jnp.full(num_rows, row_GTK.size, jnp.int32)
  owner = jnp.arange(row_GTK.size, dtype=jnp.int32)
  owner_N = none.at[row_GTK.reshape(-1)].set(owner, mode="drop")
  return RowPlan(
    **vars(plan),
    owner_N=owner_N,
    row_GTK=row_GTK,
    tokens_per_expert_GE=counts_GE,
  )


def build(
  order: word(*dispatchers.ORDERS) = "token", renormalize: bool = False
) -> Dispatcher:
  """A dispatcher that gathers; it needs a capacity.

  Args:
    order: who gets slots first, "token" or "choice" (`dispatchers.rank`).
    renormalize: give the weights of dropped assignments to the token's other experts,
      so that their sum stays the same (NLLB-MoE, 2207.04672).
  """
  return dispatchers.in_order(order, renormalize, _lay_out, ragged=False)


def _lay_out(plan, slot_GTK):
  groups, slots = len(slot_GTK), plan.num_experts * plan.bound.slots
  group_G11 = jnp.arange(groups)[:, None, None]
  slot_GTK += group_G11 * slots + plan.choice.expert_TK * plan.bound.slots
  return plan_rows(plan, slot_GTK, groups * slots)
