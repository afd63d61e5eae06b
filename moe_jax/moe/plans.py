"""Choices laid out for the experts: tokens to rows, and results to tokens.

Each form of choice has its plan. A `TokenChoice` is laid out by a dispatcher;
the other two already say which expert works on which token.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core import parallel
from moe_jax.moe import dispatchers, pool, types
from moe_jax.moe.types import Array, Loads, Rows

FACTORS = (1.0, 1.25)  # Capacity factors at which drops are counted.


class Tokens(NamedTuple):
  """Facts about the tokens whose loads are counted.

  mask_GT: bool, False for padding.
  sequences: S, sequences in a group.
  prob_GTE: the router's distribution; zeros where it has none.
  """

  mask_GT: Array
  sequences: int
  prob_GTE: Array

  def by_sequence(self, value: Array) -> Array:
    """Sums over the unpadded tokens of each sequence: [G, S, ...].

    Args:
      value: [G, T, ...].
    """
    mask = self.mask_GT.reshape(self.mask_GT.shape + (1,) * (value.ndim - 2))
    value = jnp.where(mask, value, 0)
    shape = (value.shape[0], self.sequences, -1, *value.shape[2:])
    # The dtype keeps integers from growing to int64 in float64 mode.
    return value.reshape(shape).sum(2, dtype=value.dtype)


def make(
  choice: types.TokenChoice | types.SlotChoice | types.Mixture,
  recipe,
  num_tokens: int,
) -> types.Plan:
  """The plan of a choice with a leading G.

  Args:
    choice: from the router.
    recipe: `layer.Recipe`. Its dispatcher lays a `TokenChoice` out, within its
      bound.
    num_tokens: T.

  Raises:
    ConfigError: the bound does not fit the dispatcher.
  """
  if isinstance(choice, types.SlotChoice):
    token_GEC = checkpoint_name(choice.token_EC, "slot")
    return SlotPlan(choice.replace(token_EC=token_GEC), num_tokens)
  if isinstance(choice, types.Mixture):
    return MixturePlan(choice.dispatch_TEC, choice.combine_TEC)
  dispatchers.check_bound(recipe)
  return recipe.dispatcher.plan(choice, recipe.num_experts, recipe.bound)


class SlotPlan(flax.struct.PyTreeNode):
  """Slots that hold the tokens which each expert named."""

  choice: types.SlotChoice
  num_tokens: int = flax.struct.field(pytree_node=False)

  def dispatch(self, x_GTD: Array) -> Rows:
    """The named tokens, zero in an empty slot.

    Args:
      x_GTD: tokens.
    """
    x_GECD = jax.vmap(lambda x_TD, token_EC: x_TD[token_EC])(
      x_GTD, self.choice.token_EC
    )
    return Rows(jnp.where(self.choice.valid_EC[..., None], x_GECD, 0))

  def combine(self, rows: Rows) -> Array:
    """Adds each slot times its weight to its token.

    Args:
      rows: results in slots.
    """
    weight_GEC = jnp.where(self.choice.valid_EC, self.choice.weight_EC, 0)
    y_GECD = weight_GEC[..., None] * rows.x
    shape = (len(y_GECD), self.num_tokens, rows.x.shape[-1])
    y_GTD, y_GECD, token_GEC = parallel.alike(
      (jnp.zeros(shape, y_GECD.dtype), y_GECD, self.choice.token_EC)
    )
    add = jax.vmap(lambda y_TD, token_EC, y_ECD: y_TD.at[token_EC].add(y_ECD))
    return add(y_GTD, token_GEC, y_GECD).astype(rows.x.dtype)

  def loads(self, tokens: Tokens) -> Loads:
    """The loads by sequence. Every assignment is a first choice; none drops.

    Args:
      tokens: facts about the tokens of the same groups.
    """
    token_GEC, valid_GEC = self.choice.token_EC, self.choice.valid_EC
    groups, num_experts, _ = token_GEC.shape
    g, e, _ = jnp.indices(token_GEC.shape, sparse=True)
    s = token_GEC // (self.num_tokens // tokens.sequences)

    def by_expert(value_GEC):
      shape = (groups, tokens.sequences, num_experts)
      value_GEC = jnp.where(valid_GEC, value_GEC, 0)
      return jnp.zeros(shape, value_GEC.dtype).at[g, s, e].add(value_GEC)

    count = by_expert(valid_GEC.astype(jnp.int32))
    confidence = by_expert(tokens.prob_GTE[g, token_GEC, e]).sum(-1)
    return _undropped(count, by_expert(self.choice.weight_EC), confidence)


class MixturePlan(flax.struct.PyTreeNode):
  """Slots that hold weighted means of tokens."""

  dispatch_GTEC: Array
  combine_GTEC: Array

  def dispatch(self, x_GTD: Array) -> Rows:
    """The means of the tokens.

    Args:
      x_GTD: tokens.
    """
    weights = self.dispatch_GTEC.astype(x_GTD.dtype)
    return Rows(jnp.einsum("GTEC,GTD->GECD", weights, x_GTD))

  def combine(self, rows: Rows) -> Array:
    """The means of the slots.

    Args:
      rows: results in slots.
    """
    weights, dtype = self.combine_GTEC, self.combine_GTEC.dtype
    y_GTD = jnp.einsum(
      "GTEC,GECD->GTD", weights, rows.x, preferred_element_type=dtype
    )
    return y_GTD.astype(rows.x.dtype)

  def loads(self, tokens: Tokens) -> Loads:
    """The loads by sequence: shares of the tokens in the slots.

    Args:
      tokens: facts about the tokens of the same groups.
    """
    share_GTE = self.dispatch_GTEC.sum(-1)
    return _undropped(
      count=tokens.by_sequence(share_GTE),
      weight=tokens.by_sequence(self.combine_GTEC.sum(-1)),
      confidence=tokens.by_sequence((share_GTE * tokens.prob_GTE).sum(-1)),
    )


def _undropped(count, weight, confidence):
  """Loads of which every assignment is a first choice and has a slot."""
  none = jnp.zeros(count.shape[:2], jnp.int32)
  dropped = {"capacity": none, "buffer": none, "unrouted": none}
  return Loads(count, count, count, weight, dropped, confidence)


def report(
  recipe, routing: types.Routing, plan: types.Plan, side: types.Side, balance
) -> types.Stats:
  """The statistics of all groups.

  Args:
    recipe: `layer.Recipe`.
    routing: with a leading G.
    plan: of this routing.
    side: mask and features, [G, T].
    balance: {balancer label: its state}, for balancers that observe.
  """
  mask_GT = side.mask_T
  dtype = jnp.result_type(*jax.tree.leaves(routing.choice))
  prob_GTE = routing.prob_TE
  if prob_GTE is None:
    prob_GTE = jnp.zeros((*mask_GT.shape, recipe.pool), dtype)
  z_GT = jnp.zeros(mask_GT.shape, dtype)
  if routing.logits_TE is not None:
    z_GT = jax.nn.logsumexp(routing.logits_TE, axis=-1) ** 2
  tokens = Tokens(mask_GT, recipe.sequences, prob_GTE)
  by_sequence = tokens.by_sequence
  counted = pool.whole(plan, routing.choice, recipe) if recipe.cheap else plan
  loads = counted.loads(tokens)
  if not recipe.router.fixed:  # Fewer experts than K are no drop.
    none = jnp.zeros_like(loads.dropped["unrouted"])
    loads = loads.replace(dropped={**loads.dropped, "unrouted": none})
  return types.Stats(
    **vars(loads),
    tokens=by_sequence(mask_GT.astype(jnp.int32)),
    prob_E=by_sequence(prob_GTE),
    z=by_sequence(z_GT),
    entropy=by_sequence(_entropy(prob_GTE)),
    extra={k: by_sequence(v) for k, v in routing.extra.items()},
    observed=_observe(recipe, routing, mask_GT, balance),
    beyond=_beyond(loads.count_E.sum(1)[:, : recipe.num_experts].astype(dtype)),
    groups_per_sequence=recipe.groups_per_sequence,
  )


def _entropy(prob_GTE):
  """-sum p log p, whose gradient is finite where p is exactly 0 too."""
  some = prob_GTE > 0
  return jax.scipy.special.entr(jnp.where(some, prob_GTE, 1)).sum(-1)


def _beyond(count_GE):
  """{capacity factor: assignments without a slot}, [G, 1] each."""
  mean_G1 = count_GE.mean(-1, keepdims=True)

  def beyond(factor):
    more_GE = count_GE - factor * mean_G1
    # The shares of a mixture are equal but for rounding.
    more_GE = jnp.where(more_GE > 1e-4 * mean_G1, more_GE, 0)
    return more_GE.sum(-1, keepdims=True)

  return {str(factor): beyond(factor) for factor in FACTORS}


def _observe(recipe, routing, mask_GT, balance):
  """{label: sums of each group, with an axis of one sequence}."""
  sums = {
    label: jax.vmap(balancer.observe, (None, 0, 0))(
      balance[label], routing, mask_GT
    )
    for label, balancer in recipe.balancers
    if balancer.observe is not None
  }
  return jax.tree.map(lambda x: x[:, None], sums)
