"""Ways to lay tokens out for their experts, one file each.

What they share is which assignment gets a slot.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.moe import capacity
from moe_jax.moe.types import Array, Bound, Dispatcher, TokenChoice

PART = Dispatcher  # `build` of each file returns one.
# Names that every remat policy keeps: a recompute cannot route differently.
SAVED = ("expert", "slot", "kept")


def assign(
  choice: TokenChoice, num_experts: int, bound: Bound | None, order: str
) -> tuple[Array, Array]:
  """The slot of every assignment inside its expert, and whether it has one.

  Args:
    choice: with leading G.
    num_experts: E.
    bound: None keeps every valid assignment.
    order: "token" or "choice", see `capacity.rank`.

  Returns:
    slot_GTK: int32, the place in the queue of its expert among kept
      assignments (only then does it mean anything).
    kept_GTK: bool.
  """

  def one_group(choice: TokenChoice):
    def rank(bucket_TK, valid_TK, num_buckets):
      bucket_TK = jnp.where(valid_TK, bucket_TK, num_buckets)
      return capacity.rank(bucket_TK, choice.priority_TK, num_buckets, order)

    expert_TK, kept_TK = choice.expert_TK, choice.valid_TK
    if bound is None:
      return rank(expert_TK, kept_TK, num_experts), kept_TK
    bucket_TK = expert_TK // (num_experts // bound.expert_buckets)
    slot_TK = rank(bucket_TK, kept_TK, bound.expert_buckets)
    kept_TK &= slot_TK < bound.slots
    if shares_slots(num_experts, bound):
      slot_TK = rank(expert_TK, kept_TK, num_experts)
    return slot_TK, kept_TK

  slot_GTK, kept_GTK = jax.vmap(one_group)(choice)
  return checkpoint_name(slot_GTK, "slot"), checkpoint_name(kept_GTK, "kept")


def causal(order: str, top_k: int, bound: Bound | None) -> bool:
  """Whether slots given in this order are independent of later tokens.

  Token by token, a slot depends on earlier tokens only. Choice by choice, a
  later token's first choice takes a slot before this one's second choice,
  unless there is only one choice or no capacity to run out of.
  """
  return order == "token" or top_k == 1 or bound is None


def shares_slots(num_experts: int, bound: Bound | None) -> bool:
  """Whether experts share the slots of a bucket."""
  return bound is not None and bound.expert_buckets < num_experts


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
  """y_t = sum over k of weight_tk * x[row_tk], in the weights' dtype.

  Gathers both ways, one for each k, as nothing of size T * K * D is made.

  Args:
    x_ND: rows.
    weight_TK: weights.
    row_TK: int32, out of range for none.
    owner_N: the inverse of row_TK: t * K + k, out of range for none.
  """
  del owner_N
  return sum(
    weight_TK[:, k, None] * _take(x_ND, row_TK[:, k])
    for k in range(row_TK.shape[1])
  )


def _combine_backward(kept, dy_TD):
  x_ND, weight_TK, row_TK, owner_N = kept
  top_k = row_TK.shape[1]
  weight_N = _take(weight_TK.reshape(-1), owner_N)
  dx_ND = weight_N[:, None] * _take(dy_TD, owner_N // top_k)
  dweight_TK = jnp.stack(
    [(dy_TD * _take(x_ND, row_TK[:, k])).sum(-1) for k in range(top_k)], axis=1
  )
  return dx_ND.astype(x_ND.dtype), dweight_TK, None, None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)


def check_bound(recipe) -> None:
  """Raises ConfigError for a bound that slots [E, C] cannot hold.

  Args:
    recipe: `layer.Recipe`.
  """
  buckets = recipe.bound.expert_buckets if recipe.bound else None
  if not recipe.dispatcher.ragged and buckets != recipe.num_experts:
    raise ConfigError(
      "the dispatchers einsum and gather give every expert the same number of"
      " slots: they need a capacity_factor and expert_buckets ="
      f" {recipe.num_experts}; use the dispatcher sorted for dropless or"
      " bucket-bounded routing"
    )
