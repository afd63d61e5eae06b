"""Ways to lay tokens out for their experts, one file each.

What they share is which assignment gets a slot.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.moe.types import Array, Bound, Dispatcher, TokenChoice

PART = Dispatcher  # `build` of each file returns one.
ORDERS = ("token", "choice")  # In which assignments get slots, see `rank`.
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
    order: "token" or "choice", see `rank`.

  Returns:
    slot_GTK: int32, the place in the queue of its expert among kept
      assignments (only then does it mean anything).
    kept_GTK: bool.
  """

  def one_group(choice: TokenChoice):
    def place(bucket_TK, valid_TK, num_buckets):
      bucket_TK = jnp.where(valid_TK, bucket_TK, num_buckets)
      return rank(bucket_TK, choice.priority_TK, num_buckets, order)

    expert_TK, kept_TK = choice.expert_TK, choice.valid_TK
    if bound is None:
      return place(expert_TK, kept_TK, num_experts), kept_TK
    bucket_TK = expert_TK // (num_experts // bound.expert_buckets)
    slot_TK = place(bucket_TK, kept_TK, bound.expert_buckets)
    kept_TK &= slot_TK < bound.slots
    if shares_slots(num_experts, bound):
      slot_TK = place(expert_TK, kept_TK, num_experts)
    return slot_TK, kept_TK

  slot_GTK, kept_GTK = jax.vmap(one_group)(choice)
  return checkpoint_name(slot_GTK, "slot"), checkpoint_name(kept_GTK, "kept")


def rank(bucket_TK, priority_TK, num_buckets: int, order: str) -> Array:
  """The place of each assignment in the queue of its bucket, from 0.

  Args:
    bucket_TK: int32 in [0, num_buckets]; num_buckets stands for no bucket.
    priority_TK: larger goes first; None: all equal.
    num_buckets: number of queues.
    order: "token": token by token, a token's choices in turn. "choice": all
      first choices, then all second ones (GShard, 2006.16668 Algorithm 1).

  Returns:
    rank_TK, int32.
  """
  tokens, top_k = bucket_TK.shape
  turn_N = _turns(tokens, top_k, priority_TK, order)
  bucket_N = bucket_TK.reshape(-1)[turn_N]
  sorted_N = _stable_argsort(bucket_N, num_buckets + 1)
  sizes = jnp.zeros(num_buckets + 1, jnp.int32).at[bucket_N].add(1)
  starts = jnp.cumsum(sizes) - sizes
  rank_N = jnp.arange(tokens * top_k, dtype=jnp.int32)
  rank_N = rank_N - starts[bucket_N[sorted_N]]
  ranks = jnp.zeros(tokens * top_k, jnp.int32)
  return ranks.at[turn_N[sorted_N]].set(rank_N).reshape(tokens, top_k)


def _turns(tokens, top_k, priority_TK, order):
  """Indices into the flat [T * K], in the order in which slots are given."""
  turn_TK = jnp.arange(tokens * top_k, dtype=jnp.int32).reshape(tokens, top_k)
  if priority_TK is None:
    return (turn_TK if order == "token" else turn_TK.T).reshape(-1)
  token, choice = turn_TK // top_k, turn_TK % top_k
  keys = {
    "token": (choice, token, -priority_TK),
    "choice": (token, -priority_TK, choice),
  }[order]
  return jnp.lexsort([k.reshape(-1) for k in keys])


def _stable_argsort(key_N, num_keys):
  """argsort of small integers, by one sort of (key, index) in one number."""
  size = key_N.shape[0]
  if num_keys * size >= 2**31:
    return jnp.argsort(key_N, stable=True)
  index_N = jnp.arange(size, dtype=jnp.int32)
  return jnp.sort(key_N * size + index_N) % size


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
