"""Balancers in training: their losses, and the update of their state.

All dicts have paths of sublayers as keys, see `models.sublayers`; arrays have a
leading axis of repeats.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import traverse_util

from moe_jax import models
from moe_jax.core import registry
from moe_jax.moe.types import Array, Stats, Sublayer

Sublayers = Mapping[str, Sublayer]


def numbers(sublayers: Sublayers) -> dict:
  """Returns {path: {label: {option: number}}} of all number options."""
  return {
    path: {
      label: registry.number_options(balancer)
      for label, balancer in parts.recipe.balancers
    }
    for path, parts in sublayers.items()
  }


def rebuilt(sublayers: Sublayers, numbers: Mapping) -> dict[str, Sublayer]:
  """Returns the sublayers, with balancers that have other numbers.

  Args:
    sublayers: of the model.
    numbers: as `numbers` returns them, with tracers for instance.
  """
  made = {}
  for path, parts in sublayers.items():
    balancers = tuple(
      (label, registry.rebuild(balancer, numbers[path][label]))
      for label, balancer in parts.recipe.balancers
    )
    recipe = dataclasses.replace(parts.recipe, balancers=balancers)
    made[path] = parts._replace(recipe=recipe)
  return made


def statistics(aux: Mapping, sublayers: Sublayers) -> dict[str, Stats]:
  """Returns {path: Stats [R, G, S]}.

  Args:
    aux, sublayers: the result of a model, and of the model.
  """
  return {
    path: stacked(models.at(aux, path)["stats"], parts)
    for path, parts in sublayers.items()
  }


def stacked(tree, parts: Sublayer):
  """Returns arrays with their leading axis of repeats.

  Args:
    tree: arrays of a sublayer, which have it already if the layer repeats.
    parts: the sublayer.
  """
  if parts.stacked:
    return tree
  return jax.tree.map(lambda x: x[None], tree)


def of_balancer(stats, label):
  """Returns statistics with the sums that one balancer observed.

  Args:
    stats: of a layer.
    label: of the balancer.
  """
  return stats.replace(observed=stats.observed.get(label, {}))


def sum_groups(stats: Mapping[str, Stats]) -> dict[str, Stats]:
  """Returns sums over groups and sequences, as axes of length 1: [R, 1, 1]."""
  return jax.tree.map(lambda x: x.sum((1, 2), keepdims=True), stats)


def loss(
  sublayers: Sublayers,
  state: Mapping,
  stats: Mapping[str, Stats],
  so_far: Mapping[str, Array],
  params: Mapping,
) -> Array:
  """Returns the sum over MoE layers and balancers of coefficient times loss.

  Args:
    sublayers: of the model.
    state: the collection `balance`.
    stats: of this micro-batch, [R, G, S].
    so_far: count_E [R, E] of the micro-batches before this one in the step.
    params: the collection `params`, for balancers that look at the router's.
  """
  total = jnp.zeros(())
  for path, parts in sublayers.items():
    states, router = (
      stacked(models.at(tree, place), parts)
      for tree, place in ((state, path), (params, f"{path}/router"))
    )
    for label, balancer in parts.recipe.balancers:
      if balancer.loss is not None:
        losses_R = jax.vmap(balancer.loss)(
          states.get(label, {}),
          of_balancer(stats[path], label),
          so_far[path],
          router,
        )
        total += losses_R.value().sum()
  return total


def update(
  sublayers: Sublayers,
  state: Mapping,
  stats: Mapping[str, Stats],
  step: Array,
) -> dict:
  """Returns the balancers' new state, once per step, from that step's sums.

  Args:
    sublayers, state: as in `loss`.
    stats: summed over groups and over the step's micro-batches.
    step: number of the step, from 0.
  """
  new = traverse_util.flatten_dict(dict(state), sep="/")
  for path, parts in sublayers.items():
    for label, balancer in parts.recipe.balancers:
      before = models.at(state, path).get(label)
      if before is not None:
        after = jax.vmap(balancer.update, (0, 0, None))(
          stacked(before, parts), of_balancer(stats[path], label), step
        )
        if not parts.stacked:
          after = jax.tree.map(lambda x: x[0], after)
        new |= {f"{path}/{label}/{k}": v for k, v in after.items()}
  return traverse_util.unflatten_dict(new, sep="/")
