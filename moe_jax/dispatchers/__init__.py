"""Ways to lay tokens out for their experts, one file each.

What they share is which assignment gets a slot.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import slots
from moe_jax.errors import ConfigError
from moe_jax.types import Array, Bound, Routing

# What every remat policy keeps, so that a recompute cannot route differently.
SAVED = ("expert", "slot", "kept")


def assign(
  routing: Routing, num_experts: int, bound: Bound | None, order: str
) -> tuple[Array, Array]:
  """The slot of every assignment inside its expert, and whether it has one.

  Args:
    routing: with leading G.
    num_experts: E.
    bound: None keeps every valid assignment.
    order: "token" or "choice", see `slots.rank`.

  Returns:
    slot_GTK: int32, the place in the queue of its expert among kept
      assignments (only then does it mean anything).
    kept_GTK: bool.
  """

  def one_group(routing: Routing):
    def rank(bucket_TK, valid_TK, num_buckets):
      bucket_TK = jnp.where(valid_TK, bucket_TK, num_buckets)
      return slots.rank(bucket_TK, routing.priority_TK, num_buckets, order)

    expert_TK, kept_TK = routing.expert_TK, routing.valid_TK
    if bound is None:
      return rank(expert_TK, kept_TK, num_experts), kept_TK
    bucket_TK = expert_TK // (num_experts // bound.expert_buckets)
    slot_TK = rank(bucket_TK, kept_TK, bound.expert_buckets)
    kept_TK &= slot_TK < bound.slots
    if bound.expert_buckets < num_experts:
      slot_TK = rank(expert_TK, kept_TK, num_experts)
    return slot_TK, kept_TK

  slot_GTK, kept_GTK = jax.vmap(one_group)(routing)
  return checkpoint_name(slot_GTK, "slot"), checkpoint_name(kept_GTK, "kept")


def causal(order: str, top_k: int, bound: Bound | None) -> bool:
  """Whether slots given in this order are independent of later tokens.

  Token by token, a slot depends on earlier tokens only. Choice by choice, a
  later token's first choice takes a slot before this one's second choice,
  unless there is only one choice or no capacity to run out of.
  """
  return order == "token" or top_k == 1 or bound is None


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


def _take_forward(x_ND, index, inverse_NK):
  return _take(x_ND, index), inverse_NK


def _take_backward(inverse_NK, dy):
  dy_MD = dy.reshape(-1, dy.shape[-1])
  choices = range(inverse_NK.shape[1])
  return sum(_take(dy_MD, inverse_NK[:, k]) for k in choices), None, None


take.defvjp(_take_forward, _take_backward)


def check_bound(bound: Bound | None, num_experts: int) -> None:
  """Raises ConfigError for a bound that slots [E, C] cannot hold."""
  if bound is None or bound.expert_buckets != num_experts:
    raise ConfigError(
      "the dispatchers einsum and gather give every expert the same number of"
      f" slots: they need a capacity_factor and expert_buckets = {num_experts};"
      " use the dispatcher sorted for dropless or bucket-bounded routing"
    )


def check_order(order: str) -> None:
  if order not in slots.ORDERS:
    raise ConfigError(f'order is one of {slots.ORDERS}, not "{order}"')
