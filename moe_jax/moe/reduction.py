"""Gradients of experts that are added up over devices once a step.

A device computes gradients of the weights that it works with: of its experts,
and of all of D. It may keep them, and add them up over `data` and `fsdp` after
all micro-batches of a step. They are then gradients of *slots*: zeros with an
axis of devices, which the layer never reads. They stand in a layer's parameters
beside the weights, as "unreduced".
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.core import parallel
from moe_jax.moe.types import Array, Sublayer

NAME = "unreduced"


def split(
  params: Mapping, sublayers: Mapping[str, Sublayer], mesh: Mesh | None
) -> tuple[Mapping, dict]:
  """Parts parameters into those that gradients are taken of, and the others.

  Args:
    params: of a model.
    sublayers: its MoE layers, by path.
    mesh: over which the gradients of experts are added up once a step; None:
      as soon as they are computed, as all others are.

  Returns:
    The parameters, with slots in place of the weights of experts; and {path of
    a layer: these weights}.
  """
  weights = {}

  def taken(layer, path):
    weights[path] = layer["experts"]
    axes = sublayers[path].recipe.experts.axes
    slots = {k: _slot(w, axes[k], mesh) for k, w in weights[path].items()}
    return _without(layer, "experts") | {NAME: slots}

  for path in sublayers if mesh is not None else ():
    params = _changed(params, path, functools.partial(taken, path=path))
  return params, weights


def join(learnt: Mapping, weights: Mapping[str, Mapping]) -> Mapping:
  """The parameters that `split` took apart, and slots beside them.

  Args:
    learnt: parameters with slots, as `split` returns them.
    weights: of experts, as `split` returns them.
  """
  for path, own in weights.items():
    learnt = _changed(learnt, path, lambda x, own=own: {**x, "experts": own})
  return learnt


def reduced(
  gradients: Mapping,
  weights: Mapping[str, Mapping],
  sublayers: Mapping[str, Sublayer],
  mesh: Mesh | None,
) -> Mapping:
  """Gradients of all parameters.

  Args:
    gradients: of the parameters with slots, the first result of `split`.
    weights: of experts, as `split` returns them.
    sublayers: as in `split`.
    mesh: as in `split`.
  """

  def added_up(layer, path):
    axes = sublayers[path].recipe.experts.axes
    own = {
      k: _reduced(slot, weights[path][k].shape, axes[k], mesh)
      for k, slot in layer[NAME].items()
    }
    return _without(layer, NAME) | {"experts": own}

  for path in weights:
    change = functools.partial(added_up, path=path)
    gradients = _changed(gradients, path, change)
  return gradients


def _changed(tree, path, change):
  """Nested dicts in which the value at a path is changed by `change`."""
  key, _, rest = path.partition("/")
  inner = _changed(tree[key], rest, change) if rest else change(tree[key])
  return {**tree, key: inner}


def _without(tree, key):
  return {k: x for k, x in tree.items() if k != key}


def axes_of(axes) -> tuple[str | None, ...]:
  """The logical axes of the slot of a weight.

  Args:
    axes: logical axes of the weight.
  """
  stored = parallel.STORED
  whole = (None if parallel.RULES.get(a) == stored else a for a in axes)
  return ("shards", *whole)


@jax.custom_vjp
def to_slot(w: Array, slot: Array) -> Array:
  """w, whose gradient goes to the slot and not to w.

  Args:
    w: a weight as experts see it, on a device of a mesh.
    slot: this device's, w's shape after an axis of length 1; never read.
  """
  del slot
  return w


def _to_slot_backward(nothing, dw):
  return None, dw[None].astype(nothing.dtype)


to_slot.defvjp(lambda w, slot: (w, jnp.zeros(0, slot.dtype)), _to_slot_backward)


def _slot(w, axes, mesh):
  lead = w.ndim - len(axes)
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  slot = jnp.zeros((*w.shape[:lead], shards, *w.shape[lead:]), w.dtype)
  return parallel.constrain(slot, (None,) * lead + axes_of(axes), mesh)


def _reduced(slot, shape, axes, mesh):
  """A slot's sum over devices, of which each keeps the part that it stores."""
  lead = len(shape) - len(axes)
  names = (None,) * lead + axes
  start = parallel.spec((None,) * lead + axes_of(axes), slot.shape, mesh)
  end = parallel.spec(names, shape, mesh)
  split = jax.tree.leaves(tuple(end))
  rest = tuple(a for a in parallel.RULES["shards"] if a not in split)

  def add(x):
    x = x.squeeze(lead)
    for dim, (name, stored) in enumerate(zip(names, end)):
      if stored and parallel.RULES[name] == parallel.STORED:
        x = jax.lax.psum_scatter(x, stored, scatter_dimension=dim, tiled=True)
    return jax.lax.psum(x, rest)

  return parallel.shard_map(add, mesh, (start,), end)(slot)
