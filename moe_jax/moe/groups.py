"""How tokens form groups, and how many rows experts may get in each."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.moe import capacity, dispatchers, layer, sharded
from moe_jax.moe.types import Array


class Grouping(NamedTuple):
  """How tokens form groups and how many rows experts may get in each.

  tokens_per_group: T, or "sequence". Whole sequences or whole fractions.
  capacity_factor: slots over balanced load; None: dropless.
  eval_capacity_factor: the same outside training; None: as in training;
    "dropless".
  expert_buckets: buckets of experts that share slots; None: one per expert.
  """

  tokens_per_group: int | str = "sequence"
  capacity_factor: float | None = None
  eval_capacity_factor: float | str | None = None
  expert_buckets: int | None = None

  def resolve(
    self, recipe: layer.Recipe, length: int, train: bool
  ) -> tuple[int, layer.Recipe]:
    """T and the recipe with its bound, for sequences of this length.

    Raises:
      ConfigError: groups that cut across sequences, or a capacity of zero.
    """
    tokens = self.tokens_per_group
    if not isinstance(tokens, int) and tokens != "sequence":
      raise ConfigError(
        f'tokens_per_group is a number or "sequence", not {tokens!r}'
      )
    tokens = length if tokens == "sequence" else tokens
    if tokens < 1 or (tokens % length and length % tokens):
      raise ConfigError(
        f"tokens_per_group = {tokens} is neither a multiple nor a divisor of the"
        f' sequence length {length}; "sequence" always fits'
      )
    bound = self._bound(recipe, tokens, train)
    if not recipe.dispatcher.ragged:
      dispatchers.check_bound(bound, recipe.num_experts)
    return tokens, dataclasses.replace(
      recipe,
      bound=bound,
      sequences=max(1, tokens // length),
      groups_per_sequence=max(1, length // tokens),
    )

  def _bound(self, recipe, tokens, train):
    factor = self.capacity_factor
    if not train and self.eval_capacity_factor is not None:
      factor = self.eval_capacity_factor
    if factor == "dropless":
      return None
    if factor is None and self.expert_buckets is not None:
      raise ConfigError(
        f"expert_buckets = {self.expert_buckets} bounds nothing without a"
        " capacity_factor; set one, or leave out expert_buckets"
      )
    if factor is None:
      return None
    top_k = recipe.router.top_k
    buckets = self.expert_buckets
    buckets = recipe.num_experts if buckets is None else buckets
    if buckets < 1 or recipe.num_experts % buckets:
      raise ConfigError(
        f"expert_buckets = {buckets} does not divide num_experts ="
        f" {recipe.num_experts}"
      )
    bound = capacity.capacity(factor, tokens, top_k, buckets)
    # No more than a group can send to a bucket.
    most = tokens * min(top_k, recipe.num_experts // buckets)
    return bound._replace(slots=min(bound.slots, most))


def check(
  recipe: layer.Recipe,
  grouping: Grouping,
  *,
  length: int,
  batch: int,
  mesh: jax.sharding.Mesh | None,
) -> None:
  """Raises ConfigError for what would fail, or lie, on this mesh or batch."""
  for train in (True, False):
    tokens, resolved = grouping.resolve(recipe, length, train)
    if mesh is not None:
      sharded.check(resolved, mesh)
  shards, per_group = parallel.token_shards(mesh), max(1, tokens // length)
  if batch % (shards * per_group):
    raise ConfigError(
      f"a micro-batch of {batch} sequences does not divide into {shards} token"
      f" shards of whole groups of {per_group} sequences; make data.batch_size"
      f" over train.accumulation a multiple of {shards * per_group}"
    )


def keys(rng: Array, batch: int, length: int, grouping: Grouping, first=0):
  """One key per group of a batch; `first` is its first sequence's index."""
  tokens = grouping.tokens_per_group
  tokens = length if tokens == "sequence" else tokens
  groups = batch * length // tokens
  return layer.group_keys(rng, groups, jnp.asarray(first) * length // tokens)
