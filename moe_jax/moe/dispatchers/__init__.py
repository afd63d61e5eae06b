"""Ways to lay tokens out for their experts, one file each.

They share the rule by which assignments get slots.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.moe import scores
from moe_jax.moe.types import Array, Bound, Dispatcher, Loads, Plan, TokenChoice

PART = Dispatcher  # `build` of each file returns one.
ORDERS = ("token", "choice")  # The order of getting slots, see `rank`.
# Names that every remat policy keeps: a recompute cannot route differently.
SAVED = ("expert", "slot", "kept")


def in_order(
  order: str, renormalize: bool, lay_out: Callable[..., Plan], ragged: bool
) -> Dispatcher:
  """A dispatcher that gives out slots in an order.

  Args:
    order: "token" or "choice", see `rank`.
    renormalize: give the weights of dropped assignments to the token's other experts.
    lay_out: (TokenPlan, slot_GTK) -> Plan, with the slots of `assign`.
    ragged: whether the plan has ragged rows.
  """

  def plan(choice, num_experts, bound):
    slot_GTK, kept_GTK = assign(choice, num_experts, bound, order)
    if renormalize:
      weight_GTK = jnp.where(choice.valid_TK, choice.weight_TK, 0)
      whole_GT1 = weight_GTK.sum(-1, keepdims=True)
      weight_GTK = whole_GT1 * scores.over_sum(weight_GTK, kept_GTK)
      weight_GTK = jnp.where(kept_GTK, weight_GTK, 0)
      choice = choice.replace(weight_TK=weight_GTK)
    return lay_out(TokenPlan(choice, kept_GTK, num_experts, bound), slot_GTK)

  def causal(top_k, bound):
    # Choice by choice, a later token's first choice takes a slot before this
    # token's second one, unless no slots can run out.
    return order == "token" or top_k == 1 or bound is None

  return Dispatcher(plan, causal, ragged)


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


def shares_slots(num_experts: int, bound: Bound | None) -> bool:
  """Whether experts share the slots of a bucket.

  Args:
    num_experts: E.
    bound: None: dropless, so that there are no slots to share.
  """
  return bound is not None and bound.expert_buckets < num_experts


def most_rows(
  tokens: int, top_k: int, num_experts: int, bound: Bound | None
) -> int:
  """The most rows of one group that these experts can get.

  Args:
    tokens: T.
    top_k: K, experts per token, which differ.
    num_experts: E, of all experts or of a part of them.
    bound: of the same experts; None: dropless.
  """
  rows = tokens * min(top_k, num_experts)
  return (
    rows if bound is None else min(rows, bound.slots * bound.expert_buckets)
  )


class TokenPlan(flax.struct.PyTreeNode):
  """A `TokenChoice` whose rows a dispatcher lays out.

  choice: with a leading G.
  kept_GTK: bool, the assignments that have a slot.
  num_experts: E.
  bound: that was applied.
  """

  choice: TokenChoice
  kept_GTK: Array
  num_experts: int = flax.struct.field(pytree_node=False)
  bound: Bound | None = flax.struct.field(pytree_node=False)

  def loads(self, tokens) -> Loads:
    """The loads by sequence.

    Args:
      tokens: `plans.Tokens` of the same groups.
    """
    valid_GTK, expert_GTK = self.choice.valid_TK, self.choice.expert_TK
    groups, length, top_k = valid_GTK.shape
    shape = (groups, tokens.sequences, length // tokens.sequences * top_k)
    g, s = jnp.indices(shape[:2], sparse=True)
    place = g[..., None], s[..., None], expert_GTK.reshape(shape)

    def by_expert(value_GTK):
      counts = jnp.zeros((*shape[:2], self.num_experts), value_GTK.dtype)
      return counts.at[place].add(value_GTK.reshape(shape))

    def number(flags_GTK):
      return tokens.by_sequence(flags_GTK.sum(-1, dtype=jnp.int32))

    # A slice of expert_GTK would make XLA on CPU sort all scores.
    first_GTK = valid_GTK.at[..., 1:].set(False)
    shared = shares_slots(self.num_experts, self.bound)
    full_GS = number(valid_GTK & ~self.kept_GTK)
    chosen = jnp.take_along_axis(tokens.prob_GTE, expert_GTK, axis=-1)
    return Loads(
      count_E=by_expert(valid_GTK.astype(jnp.int32)),
      first_choice_E=by_expert(first_GTK.astype(jnp.int32)),
      kept_E=by_expert(self.kept_GTK.astype(jnp.int32)),
      weight_E=by_expert(jnp.where(valid_GTK, self.choice.weight_TK, 0)),
      dropped={
        "capacity": jnp.zeros_like(full_GS) if shared else full_GS,
        "buffer": full_GS if shared else jnp.zeros_like(full_GS),
        "unrouted": number(~valid_GTK),
      },
      confidence=tokens.by_sequence(jnp.where(valid_GTK, chosen, 0).sum(-1)),
    )


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
      f" {recipe.num_experts}; routing without drops or with buckets of several"
      " experts needs --config.model.moe.dispatcher.name=sorted"
    )
