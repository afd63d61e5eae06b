"""Groups of tokens, and the capacity of experts in each."""

import dataclasses
import math
import re
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import Option, either, integer, number, optional, word
from moe_jax.moe import dispatchers, layer
from moe_jax.moe.types import Array, Bound, TokenChoice

_FACTOR = number(above=0)
_SEQUENCES = re.compile(r"([1-9]\d{0,8}) sequences")
# Tokens in a group: a number, or those of so many sequences.
TOKENS = either(
  integer(1),
  Option(
    '"sequence", or such as "8 sequences"',
    lambda x: x == "sequence" or bool(_SEQUENCES.fullmatch(str(x))),
  ),
)
ROUNDINGS = {"floor": math.floor, "ceil": math.ceil, "round": round}


class Grouping(NamedTuple):
  """Groups of tokens, and the capacity of experts in each.

  tokens_per_group: T, in whole sequences or whole fractions of one; or "sequence",
    or "8 sequences", of any length.
  capacity_factor: slots over balanced load; None: dropless.
  eval_capacity_factor: the same outside training; None: as in training;
    "dropless".
  capacity: so many slots of an expert in a group, whatever its size and in
    training or not, as in published files of Switch; None: by the factors.
  expert_buckets: buckets of experts that share slots; None: one per expert.
  capacity_rounding, capacity_multiple, min_capacity: see `capacity`.
  """

  tokens_per_group: TOKENS = "sequence"
  capacity_factor: optional(_FACTOR) = None
  eval_capacity_factor: optional(either(_FACTOR, word("dropless"))) = None
  capacity: optional(integer(1)) = None
  expert_buckets: optional(integer(1)) = None
  capacity_rounding: word(*ROUNDINGS) = "floor"
  capacity_multiple: integer(1) = 1
  min_capacity: integer(0) = 0

  def tokens(self, length: int) -> int:
    """T for sequences of this length.

    Args:
      length: tokens in a sequence.

    Raises:
      ConfigError: groups that cut across sequences.
    """
    tokens = self.tokens_per_group
    if tokens == "sequence":
      return length
    if isinstance(tokens, str):
      return int(_SEQUENCES.fullmatch(tokens)[1]) * length
    if tokens % length and length % tokens:
      raise ConfigError(
        f"tokens_per_group = {tokens} is neither a multiple nor a divisor of the"
        f' sequence length {length}; "sequence" always fits'
      )
    return tokens

  def resolve(
    self, recipe: layer.Recipe, length: int, train: bool
  ) -> tuple[int, layer.Recipe]:
    """T and the recipe with its bound, for sequences of this length.

    Args:
      recipe: the parts, of which the bound and what belongs to the groups are set.
      length: tokens in a sequence.
      train: whether the capacity is that of training.

    Raises:
      ConfigError: groups that cut across sequences, or a capacity of zero.
    """
    tokens = self.tokens(length)
    recipe = dataclasses.replace(
      recipe,
      bound=self._bound(recipe, tokens, train),
      sequences=max(1, tokens // length),
      groups_per_sequence=max(1, length // tokens),
    )
    if recipe.experts and recipe.experts.draws and not train:
      still = dataclasses.replace(recipe.experts, draws=False)
      recipe = dataclasses.replace(recipe, experts=still)
    if recipe.router.form is TokenChoice:
      dispatchers.check_bound(recipe)
    return tokens, recipe

  def _bound(self, recipe, tokens, train):
    num_experts, key = recipe.num_experts, "capacity_factor"
    if not train and self.eval_capacity_factor:
      key = "eval_capacity_factor"
    factor = getattr(self, key)
    if self.capacity and self.capacity_factor:
      raise ConfigError(
        f"capacity = {self.capacity} and capacity_factor = {self.capacity_factor}"
        " both say how many slots there are; set one of them to None"
      )
    if factor is None and self.expert_buckets and not self.capacity:
      raise ConfigError(
        f"expert_buckets = {self.expert_buckets} has no effect without a"
        " capacity_factor; set one, or leave out expert_buckets"
      )
    if factor in (None, "dropless") and not self.capacity:
      return None
    buckets = self.expert_buckets or num_experts
    if num_experts % buckets:
      raise ConfigError(
        f"expert_buckets = {buckets} does not divide num_experts ="
        f" {num_experts}"
      )
    top_k = recipe.router.top_k or num_experts
    rounding = self.capacity_rounding, self.capacity_multiple, self.min_capacity
    mean_k = recipe.experts_per_token
    bound = Bound(self.capacity, buckets)
    if not self.capacity:
      bound = capacity(factor, tokens, mean_k, buckets, *rounding, key)
    # No more than a group can send to a bucket.
    most = dispatchers.most_rows(tokens, top_k, num_experts // buckets, None)
    return bound._replace(slots=min(bound.slots, most))

  def keys(self, rng: Array, batch: int, length: int, first=0) -> Array:
    """One key per group of a batch, the same on any mesh.

    Args:
      rng: the key of (seed, step).
      batch: sequences.
      length: tokens in a sequence.
      first: index of the first sequence in the whole batch of a step.
    """
    tokens = self.tokens(length)
    groups = batch * length // tokens
    return layer.group_keys(rng, groups, jnp.asarray(first) * length // tokens)


def capacity(
  factor,
  tokens,
  top_k,
  expert_buckets,
  rounding="floor",
  multiple=1,
  minimum=0,
  key="capacity_factor",
) -> Bound:
  """Slots of one group: factor * T * K / buckets each (2101.03961, eq. 3).

  A router without a fixed number of experts has its mean number in the place of K.

  Args:
    factor: the capacity factor, > 0; 1 is room for balanced loads exactly.
    tokens: tokens in a group, padding included.
    top_k: experts per token.
    expert_buckets: buckets of experts that share slots; as many as experts
      for ordinary capacity.
    rounding: "floor" (Switch), "ceil" or "round" (V-MoE), to a whole number.
    multiple: then up to a multiple of it (V-MoE takes 4).
    minimum: no fewer slots than that (4 in Mesh TensorFlow's Switch).
    key: name of the factor, for messages.

  Raises:
    ConfigError: it rounds to zero.
  """
  slots = factor * tokens * top_k / expert_buckets
  # 1.15 * 100 is 114.99999999999999, and 1.1 * 10 is 11.000000000000002.
  slots = ROUNDINGS[rounding](round(slots, 9))
  slots = max(-(-slots // multiple) * multiple, minimum)
  if slots < 1:
    raise ConfigError(
      f"the capacity rounds to zero: {key} = {factor} times"
      f" {tokens} tokens_per_group times top_k = {top_k} over {expert_buckets}"
      f" buckets of experts is below 1; raise {key} or tokens_per_group, or set"
      " min_capacity"
    )
  return Bound(slots, expert_buckets)


def check(recipe, grouping, *, length: int, batch: int, key: str, mesh) -> None:
  """Raises ConfigError for a recipe that cannot run on this mesh or batch.

  Args:
    recipe: `layer.Recipe` of a kind of layer.
    grouping: `Grouping` of the same kind.
    length: tokens in a sequence.
    batch: sequences of a forward pass.
    key: config key that sets the batch.
    mesh: from `parallel.make_mesh`; None: one device.
  """
  for train in (True, False):
    tokens, resolved = grouping.resolve(recipe, length, train)
    if mesh is not None:
      widths = {"num_experts": (recipe.num_experts, "expert")}
      if resolved.bound is not None:
        widths["expert_buckets"] = resolved.bound.expert_buckets, "expert"
      parallel.check_widths(mesh, **widths)
  shards, per_group = parallel.token_shards(mesh), max(1, tokens // length)
  if batch % (shards * per_group):
    raise ConfigError(
      f"a batch of {batch} sequences does not divide into {shards} token shards"
      f" of whole groups of {per_group} sequences; make {key} a multiple of"
      f" {shards * per_group}"
    )
