"""Upcycling: the weights of a model as the start of one with more experts.

The experts of a target layer come from the dense network of the same layer of
the source, or from its fewer experts, one after another; all else is copied.
The methods:

  copy      every expert is the network (Sparse Upcycling, 2212.05055).
  drop      and a share of each expert's hidden units begins anew, with the mean
            and the deviation of the weights that it had (Drop-Upcycling,
            2502.19261).
  granular  the network is cut into G = d_ff / d_expert narrow ones, and expert
            e G + g is the g-th of them, its output times G. The experts of one
            cut
            have the same logits, so that a token takes all of them (virtual
            groups, 2410.07524, which spreads the factor over the matrices).

A router that the source does not have keeps the target's first values; a router
with fewer experts is repeated, so that copies have equal logits (2604.19835).

The function of the source is kept where weights of a token add up to 1
(`renormalize`), nothing is dropped or drawn, and a token takes all copies of
the experts that it took: see `keeps`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, optional, word
from moe_jax.training.starts import fit

_EXPERTS, _DENSE, _ROUTER = "moe/experts/", "mlp/", "moe/router/"


class Upcycling(NamedTuple):
  """The options of upcycling.

  method: see the head of this file.
  ratio: share of an expert's hidden units that "drop" begins anew; None: a
    half.
  router_noise: deviation of the noise on copied columns of a router, over their
    own.
  seed: of all draws.
  """

  method: word("copy", "drop", "granular") = "copy"
  ratio: optional(number(0, 1)) = None
  router_noise: number(0) = 0.0
  seed: integer(0) = 0


COPY = Upcycling()


def upcycled(
  source, source_variables: Mapping, target, initial: Mapping, how=COPY
) -> dict:
  """Returns the variables that a model begins with.

  Args:
    source: model of the same layers, dense or with fewer experts.
    source_variables: its variables.
    target: model with experts.
    initial: the target's own first variables.
    how: options.

  Returns:
    Variables as `initial` has them, in numpy: the parameters, and in "balance"
    the states of balancers, those of the source where both have the same
    balancer.

  Raises:
    ConfigError: the source does not fit the target; the message says where.
  """
  fit.check(source, target, how)
  rng = np.random.default_rng(how.seed)
  made = _flat(initial["params"])
  given = _flat(source_variables["params"])
  inner = tuple(
    f"{name}/" for one in (source, target) for name in _segments(one)
  )
  for path in made:
    if not path.startswith(inner):
      more = path in target.arch.tables
      made[path] = _of_model(given, path, made[path], more)
  for one, other in zip(source.arch.stacks, target.arch.stacks):
    old = _layers(given, one)
    for index, ours in enumerate(_layers(made, other)):
      kinds = one.layer(one.layers[index]), other.layer(other.layers[index])
      place = f"{one.sequence}, layer {index}"
      new = _layer(kinds, old[index], ours, how, rng, place)
      _store(made, other, index, new)
  states = _states(source, source_variables, target, initial)
  params = traverse_util.unflatten_dict(made, sep="/")
  return {**initial, "params": params, "balance": states}


def _states(source, source_variables, target, initial):
  """States of balancers; a copied expert has the state of its original."""
  made = _flat(initial.get("balance", {}))
  given = _flat(source_variables.get("balance", {}))
  for one, other in zip(source.arch.stacks, target.arch.stacks):
    layers = zip(_layers(given, one), _layers(made, other))
    for index, (old, ours) in enumerate(layers):
      recipes = (side.layer(side.layers[index]).recipe for side in (one, other))
      if not old or None in (recipes := [*recipes]):
        continue
      names = [{k: b.spec.name for k, b in r.balancers} for r in recipes]
      same = names[0].items() & names[1].items()
      labels = tuple(f"moe/{label}/" for label, _ in same)
      times = recipes[1].num_experts // recipes[0].num_experts
      new = {
        k: _repeated(old[k], x.shape, times)
        for k, x in ours.items()
        if k.startswith(labels) and k in old
      }
      _store(
        made, other, index, {k: x for k, x in new.items() if x is not None}
      )
  return traverse_util.unflatten_dict(made, sep="/")


def _repeated(state, shape, times):
  """A state for `times` as many experts; None: it cannot have this shape."""
  if state.shape == shape:
    return state
  if not shape or state.shape != (*shape[:-1], shape[-1] // times):
    return None
  return np.concatenate([state] * times, axis=-1)


def _layer(kinds, old, ours, how, rng, place):
  """The parameters of a target layer, {path in the layer: array}."""
  layer, made = kinds
  new = {}
  for path, own in ours.items():
    if path.startswith(_EXPERTS):
      name = path.removeprefix(_EXPERTS)
      new[path] = _experts(layer, made, name, old)
    elif path.startswith(_ROUTER):
      new[path] = _router(layer, made, path, own, old, how, rng, place)
    else:
      new[path] = _fitting(old, path, own.shape, place)
  if how.method == "drop" and made.recipe is not None:
    _begin_anew(
      new, 1 if layer.recipe is None else layer.recipe.num_experts, how, rng
    )
  return new


def _experts(layer, made, name, old):
  """[E, ...] of a matrix or bias of the experts."""
  number = made.recipe.num_experts
  if layer.recipe is not None:
    given = old[_EXPERTS + name]
    return np.concatenate([given] * (number // len(given)))
  whole, cuts = old[_DENSE + name], fit.num_parts(layer, made)
  if name == "down_bias":  # The weights of a network's parts add up to 1.
    parts = [whole] * cuts
  elif name == "down":
    parts = [x * cuts for x in np.split(whole, cuts, axis=0)]
  else:
    parts = np.split(whole, cuts, axis=-1)
  return np.stack([*parts] * (number // cuts))


def _router(layer, made, path, own, old, how, rng, place):
  """A parameter of the router: the source's, repeated, or the target's own."""
  last = own.shape[-1] == made.recipe.num_experts
  if layer.recipe is None:
    cuts = fit.num_parts(layer, made)
    # All parts of a network have the logits of its first part.
    return np.repeat(own[..., ::cuts], cuts, axis=-1) if last else own
  given = _fitting(old, path, own.shape[:-1], place, 1)
  if not last:
    return given
  whole = np.concatenate([given] * (own.shape[-1] // given.shape[-1]), axis=-1)
  noise = rng.normal(size=whole.shape) * how.router_noise * given.std()
  noise[..., : given.shape[-1]] = 0
  return (whole + noise).astype(whole.dtype)


def _begin_anew(new, kept, how, rng):
  """Draws a share of the hidden units again, in all experts but the first ones.

  Args:
    new: parameters of the layer, which change.
    kept: experts of a source that had several; 1: all are drawn.
    how, rng: options and draws.
  """
  names = {
    k.removeprefix(_EXPERTS): k
    for k in new
    if k.startswith(_EXPERTS) and "bias" not in k
  }
  number, width, _ = new[names["down"]].shape
  share = 0.5 if how.ratio is None else how.ratio
  for expert in range(kept if kept > 1 else 0, number):
    units = rng.permutation(width)[: int(share * width)]
    for name, path in names.items():
      matrix = new[path][expert]
      where = (units,) if name == "down" else (slice(None), units)
      part = matrix[where]
      if part.size:
        matrix[where] = rng.normal(part.mean(), part.std(), part.shape)


def _of_model(given, path, own, more):
  """A parameter beside the layers, which comes from the source.

  Args:
    given: parameters of the source.
    path, own: of the parameter, and the target's first values.
    more: whether it has entries for tokens, of which the target may have more.
      These keep the target's values.
  """
  found = given.get(path)
  if not more or found is None or found.shape == own.shape:
    return _fitting(given, path, own.shape, "")
  own[tuple(map(slice, found.shape))] = found
  return own


def _fitting(given, path, shape, place, free=0):
  """A parameter of the source.

  Args:
    given: parameters of the source.
    path: of the parameter.
    shape: that it must have, without its last `free` axes.
    place: of the layer, for messages.
    free: number of axes that may have any length.

  Raises:
    ConfigError: it is not there, or has another shape.
  """
  found = given.get(path)
  if found is None or found.shape[: found.ndim - free] != shape:
    there = "not there" if found is None else f"of shape {found.shape}"
    raise ConfigError(
      f"the parameter {path}{place and f' of {place}'} has shape {shape} in the target"
      f" and is {there} in the source; give a target config of the same sizes"
    )
  return found


def _flat(params):
  flat = traverse_util.flatten_dict(dict(params), sep="/")
  return {k: np.array(x) for k, x in flat.items()}


def _segments(model):
  for stack in model.arch.stacks:
    for name, *_ in stack.segments:
      yield name


def _layers(flat, stack):
  """[{path in the layer: array}] of the layers of a stack."""
  return [
    {k.removeprefix(p): x[r] for k, x in flat.items() if k.startswith(p)}
    for p, r in fit.places(stack)
  ]


def _store(flat, stack, number, new):
  path, repeat = [*fit.places(stack)][number]
  for name, x in new.items():
    flat[path + name][repeat] = x
