"""Slots of assignments, and the capacity of experts."""

import math

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.moe.types import Array, Bound

ORDERS = ("token", "choice")


ROUNDINGS = {"floor": math.floor, "ceil": math.ceil, "round": round}


def capacity(
  factor, tokens, top_k, expert_buckets, rounding="floor", multiple=1, minimum=0
) -> Bound:
  """Slots of one group: factor * T * K / buckets each (2101.03961, eq. 3).

  Args:
    factor: the capacity factor, > 0; 1 is room for balanced loads exactly.
    tokens: tokens in a group, padding included.
    top_k: experts per token.
    expert_buckets: buckets of experts that share slots; as many as experts
      for ordinary capacity.
    rounding: "floor" (Switch), "ceil" or "round" (V-MoE), to a whole number.
    multiple: then up to a multiple of it (V-MoE takes 4).
    minimum: no fewer slots than that (4 in Mesh TensorFlow's Switch).

  Raises:
    ConfigError: it rounds to zero.
  """
  slots = factor * tokens * top_k / expert_buckets
  # 1.15 * 100 is 114.99999999999999, and 1.1 * 10 is 11.000000000000002.
  slots = ROUNDINGS[rounding](round(slots, 9))
  slots = max(-(-slots // multiple) * multiple, minimum)
  if slots < 1:
    raise ConfigError(
      f"the capacity rounds to zero: capacity_factor = {factor} times"
      f" {tokens} tokens_per_group times top_k = {top_k} over {expert_buckets}"
      " buckets of experts is below 1; raise capacity_factor or"
      " tokens_per_group, or set min_capacity"
    )
  return Bound(slots, expert_buckets)


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
