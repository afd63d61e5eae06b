"""Upcycling: the weights of a model as the start of one with more experts.

A target layer with experts gets them from the dense network of the same layer of
the source, or from its fewer experts, one after another; all else is copied. The
methods:

  copy      every expert is the network (Sparse Upcycling, 2212.05055).
  drop      and a share of each expert's hidden units begins anew, with the mean
            and the deviation of the weights that it had (Drop-Upcycling,
            2502.19261).
  granular  the network is cut into G = d_ff / d_expert narrow ones, and expert
            e G + g is the g-th of them, its output times G. The experts of one cut
            have the same logits, so that a token takes all of them (virtual
            groups, 2410.07524, which spreads the factor over the matrices).

A router that the source does not have keeps the target's first values; one with
fewer experts is repeated, so that copies have equal logits (2604.19835).

The function of the source is kept where weights of a token add up to 1
(`renormalize`), nothing is dropped or drawn, and a token takes all copies of what
it took: see `keeps`.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, optional, shown, word
from moe_jax.models import embedding

_EXPERTS, _DENSE, _ROUTER = "moe/experts/", "mlp/", "moe/router/"
# Options of attention that matter in training only.
_IDLE = ("init_scale",)


class Upcycling(NamedTuple):
  """Options.

  method: see above.
  ratio: share of an expert's hidden units that "drop" begins anew; None: a half.
  router_noise: deviation of what is added to copied columns of a router, over
    their own.
  seed: of what is drawn.
  """

  method: word("copy", "drop", "granular") = "copy"
  ratio: optional(number(0, 1)) = None
  router_noise: number(0) = 0.0
  seed: integer(0) = 0


COPY = Upcycling()


def upcycled(
  source, source_params: Mapping, target, initial: Mapping, how=COPY
) -> dict:
  """The parameters that a model begins with.

  Args:
    source: model of the same layers, dense or with fewer experts.
    source_params: its parameters.
    target: model with experts.
    initial: its own first parameters.
    how: options.

  Returns:
    Parameters as `initial` has them, in numpy.

  Raises:
    ConfigError: the source does not fit the target; says where.
  """
  check(source, target, how)
  rng = np.random.default_rng(how.seed)
  made = _flat(initial)
  given = _flat(source_params)
  inner = tuple(
    f"{name}/" for one in (source, target) for name in _segments(one)
  )
  for path in made:
    if not path.startswith(inner):
      made[path] = _of_model(given, path, made[path])
  for one, other in zip(source.arch.stacks, target.arch.stacks):
    old = _layers(given, one)
    for index, ours in enumerate(_layers(made, other)):
      kinds = one.layer(one.layers[index]), other.layer(other.layers[index])
      place = f"{one.sequence}, layer {index}"
      new = _layer(kinds, old[index], ours, how, rng, place)
      _store(made, other, index, new)
  return traverse_util.unflatten_dict(made, sep="/")


def keeps(source, target, how=COPY) -> bool:
  """Whether the target computes what the source does, as its routing tells."""
  if how.method == "drop" or how.router_noise:
    return False
  return all(
    made.recipe is None or _keeps(layer, made)
    for one, other in zip(source.arch.stacks, target.arch.stacks)
    for layer, made in zip(
      map(one.layer, one.layers), map(other.layer, other.layers)
    )
  )


def _keeps(layer, made):
  """Whether weights add up to 1, over all copies of what a token took."""
  router, grouping = made.recipe.router, made.grouping
  bounded = grouping.capacity_factor or grouping.capacity
  if bounded or not _averages(router):
    return False
  if layer.recipe is None:
    cuts = _cuts(layer, made)
    return cuts == 1 or (router.top_k or 1) % cuts == 0
  copies, old = (
    made.recipe.num_experts // layer.recipe.num_experts,
    layer.recipe.router,
  )
  return _averages(old) and router.top_k == copies * (old.top_k or 0)


def _averages(router):
  """Whether a token gets a mean of its experts' outputs, with any weights."""
  options = router.spec.options
  of_chosen = options.get("score_before_top_k") is False
  adds_up = options.get("renormalize") or (
    of_chosen and options["score"] == "softmax"
  )
  plain = {"scale": 1.0, "apply_to": "output", "output_masking": 0.0}
  plain |= {"expert_scale": False}
  return adds_up and all(options.get(k, v) == v for k, v in plain.items())


def check(source, target, how) -> None:
  """Raises ConfigError for models that do not fit together."""
  if type(source) is not type(target):
    raise ConfigError(
      f"the source is of the kind {type(source).__name__} and the target of"
      f" {type(target).__name__}; set model.name so that they are the same"
    )
  _check_options(source, how)
  _same(source.arch, target.arch, _OF_MODEL, "")
  _check_tokens(source.arch, target.arch)
  for one, other in zip(source.arch.stacks, target.arch.stacks):
    _same(one, other, ("num_layers", "norm", "norm_eps"), one.sequence)
    for index, names in enumerate(zip(one.layers, other.layers)):
      layer, made = one.layer(names[0]), other.layer(names[1])
      place = f"{one.sequence}, layer {index}"
      fields = [f.name for f in dataclasses.fields(layer.attention)]
      fields = [name for name in fields if name not in _IDLE]
      _same(layer.attention, made.attention, fields, f"{place}, attention")
      _check_networks(layer, made, how, place)


def _check_options(source, how):
  """Raises ConfigError for options that would do nothing."""
  if how.ratio is not None and how.method != "drop":
    raise ConfigError(
      f"ratio = {how.ratio} is of the method drop, and the method is {how.method};"
      " leave it out"
    )
  if how.router_noise and not source.sublayers:
    raise ConfigError(
      f"router_noise = {how.router_noise} is of the routers of a source with"
      " experts, and this one is dense; leave it out"
    )


_SIZES = ("vocab_size", "source_vocab_size")
_OF_TOKENS = ("embedding", "source_embedding", "head")
_OF_MODEL = [
  field.name
  for field in dataclasses.fields(embedding.Vocabulary)
  if field.name not in ("dtype", "embedding_variance", *_SIZES)
]


def _check_tokens(one, other):
  """Raises ConfigError for a target that has fewer tokens than the source."""
  for name in _SIZES:
    old, new = (getattr(arch, name, None) for arch in (one, other))
    if old and new and new < old:
      raise ConfigError(
        f"the target's {name} = {new} is less than the {old} of the source; give at"
        " least as many"
      )


def _same(one, other, names, place):
  for name in names:
    values = getattr(one, name), getattr(other, name)
    if values[0] != values[1]:
      raise ConfigError(
        f"the target's {name} = {shown(values[1])} is {shown(values[0])} in the"
        f" source{place and f' ({place})'}; give a target config with the source's"
      )


def _check_networks(layer, made, how, place):
  """Raises ConfigError for networks that cannot become those of a target layer."""
  if made.recipe is None:
    if layer.recipe is not None:
      raise ConfigError(
        f"the source has experts in {place}, and the target has none there; change"
        " model.pattern of the target"
      )
    return
  if made.mlp is not None:
    raise ConfigError(
      f"the target has a dense network after its experts in {place}, for which the"
      ' source has nothing; take a pattern of "moe"'
    )
  if made.recipe.shared or made.recipe.cheap or made.recipe.latent:
    raise ConfigError(
      f"the target has shared, cheap or latent experts in {place}, for which the"
      " source has nothing; leave them out"
    )
  experts = made.recipe.experts
  old = layer.recipe.experts if layer.recipe else layer.mlp
  if old.activation != experts.activation:
    raise ConfigError(
      f"the target's activation of experts = {experts.activation} is"
      f" {old.activation} in the source ({place}); change model.moe.activation"
    )
  biased = "down_bias" in old.axes
  if biased != ("down_bias" in experts.axes):
    raise ConfigError(
      f"the networks of the source have {'' if biased else 'no '}biases in {place}, and"
      f" the experts of the target differ; set model.moe.use_bias = {biased}"
    )
  if layer.recipe is not None:
    number = layer.recipe.num_experts
    if made.recipe.num_experts % number or old.width != experts.width:
      raise ConfigError(
        f"{made.recipe.num_experts} experts of width {experts.width} are no multiple"
        f" of the {number} of width {old.width} in {place} of the source; change"
        " model.moe.num_experts or d_expert"
      )
    return
  cuts = _cuts(layer, made)
  wanted = cuts if how.method == "granular" else 1
  if cuts * experts.width != old.width or cuts != wanted:
    raise ConfigError(
      f"model.moe.d_expert = {experts.width} is not the width of the network in"
      f" {place} of the source, {old.width}, nor a whole part of it with --method="
      "granular"
    )
  if made.recipe.num_experts % cuts:
    raise ConfigError(
      f"model.moe.num_experts = {made.recipe.num_experts} is no multiple of the"
      f" {cuts} parts of a network in {place}; change one of them"
    )


def _cuts(layer, made):
  """G: experts that are one network of the source."""
  return max(1, layer.mlp.width // made.recipe.experts.width)


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
  whole, cuts = old[_DENSE + name], _cuts(layer, made)
  if name == "down_bias":  # Once for all parts of a network.
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
    cuts = _cuts(layer, made)
    # The parts of a network have the logits of the first of them.
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


def _of_model(given, path, own):
  """A parameter beside the layers: the source's, with own rows for tokens beyond its."""
  found = given.get(path)
  if path not in _OF_TOKENS or found is None or found.shape == own.shape:
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
    ConfigError: it is not there, or of another shape.
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


def _places(stack):
  """(path, repeat) of every layer of a stack."""
  for name, pattern, repeats, _ in stack.segments:
    for repeat in range(repeats):
      for i in range(len(pattern)):
        yield f"{name}/{i}/", repeat


def _layers(flat, stack):
  """[{path in the layer: array}] of the layers of a stack."""
  return [
    {k.removeprefix(p): x[r] for k, x in flat.items() if k.startswith(p)}
    for p, r in _places(stack)
  ]


def _store(flat, stack, number, new):
  path, repeat = [*_places(stack)][number]
  for name, x in new.items():
    flat[path + name][repeat] = x
