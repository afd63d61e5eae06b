"""Whether a model fits the model whose weights it begins with (upcycling)."""

import dataclasses
import json
import logging
import operator
from collections.abc import Mapping

import flax.linen as nn
from flax import traverse_util

from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import shown
from moe_jax.data.text import tokenizers
from moe_jax.models.parts import embedding
from moe_jax.run import config as config_lib

# Options of attention that matter in training only.
_IDLE = ("init_scale",)
# Keys of `config.model` that change nothing in what a model computes.
_NO_FUNCTION = ("vocab_size", "remat", "dtype", "exchange", "grouped_matmul")
_NO_FUNCTION += ("init_scale", "embedding_variance")
# Options of routers that matter in training only, or are compared elsewhere.
_OF_TRAINING = ("top_k", "jitter", "noise", "init_scale", "second_expert")
_OF_TRAINING += ("second_threshold", "allow_constant_weight", "priority")


def changes(source, target, how) -> str:
  """Returns the reason why the target computes another function, or "".

  Args:
    source, target: models that `check` does not refuse.
    how: `upcycling.Upcycling`.
  """
  if how.method == "drop" or how.router_noise:
    return "weights are drawn anew"
  for one, other in zip(source.arch.stacks, target.arch.stacks):
    layers = map(one.layer, one.layers), map(other.layer, other.layers)
    for layer, made in zip(*layers):
      if made.recipe and (why := _changes(layer, made)):
        return why
  return ""


def _changes(layer, made) -> str:
  """`changes` of a layer with experts."""
  router, grouping = made.recipe.router, made.grouping
  if _bounded(grouping) or (layer.recipe and _bounded(layer.grouping)):
    return "experts have slots, so that assignments can be dropped"
  if not _averages(router) or (
    layer.recipe and not _averages(layer.recipe.router)
  ):
    return "the weights of a token do not add up to 1 (router.renormalize)"
  if layer.recipe is None:
    parts = num_parts(layer, made)
    if parts > 1 and (router.top_k or 1) % parts:
      return f"top_k is no multiple of the {parts} parts of a network"
    return ""
  old, number = layer.recipe.router, layer.recipe.num_experts
  copies = made.recipe.num_experts // number
  if operator.ne(*map(_that_count, (layer.recipe, made.recipe))):
    return "the routers or what shifts their choices differ"
  if copies > 1 and router.spec.options.get("num_expert_groups", 1) > 1:
    return "the groups of experts are others where experts are copied"
  if router.top_k != copies * (old.top_k or 0):
    return f"top_k is not {copies} times that of the source"
  return ""


def _bounded(grouping):
  return bool(grouping.capacity_factor or grouping.capacity)


def _that_count(recipe):
  """The options, besides parameters and K, that decide choices and weights."""
  spec = recipe.router.spec
  options = {k: x for k, x in spec.options.items() if k not in _OF_TRAINING}
  balancers = {k: b.spec.name for k, b in recipe.balancers if b.select}
  return spec.name, options, balancers


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


def check_text(source, config, path: str) -> None:
  """Raises ConfigError for a config whose tokens have another meaning.

  Args:
    source: a `trained.Trained`.
    config: of the model to make.
    path: of the source, for messages.
  """
  if source.config is None:
    check_published(source.model.arch, source.tokenizer, config, path)
    return
  names = source.config.task.name, config.task.name
  _check_equal({"task.name": names}, path)
  check_run(source.config.to_dict(), config, path)


def check_run(old: Mapping, config, path: str) -> None:
  """Raises ConfigError as `check_text` does, for a run of any task.

  Args:
    old: the content of the run's config.json.
    config, path: as in `check_text`.
  """
  before, after = old["task"], config.task
  keys = ["end", "start"]
  if before["name"] == after.name:
    keys.append("sentinels")
  pairs = {f"task.{k}": (before.get(k), after.get(k)) for k in keys}
  pairs["data.tokenizer"] = old["data"]["tokenizer"], config.data.tokenizer
  _check_equal(pairs, path)


def check_published(arch, tokenizer, config, path: str) -> None:
  """Raises ConfigError as `check_text` does, for published weights.

  Args:
    arch: of their model, with the tokens that their folder names.
    tokenizer: of their folder; None: it has none.
    config, path: as in `check_text`.
  """
  pairs, source = {}, arch.source
  if len(arch.stacks) > 1 and source:
    start = () if source.start is None else (source.start,)
    tokens = {"end": source.ends, "start": start}
    pairs = {
      f"task.{k}": (ids[0], config.task.get(k))
      for k, ids in tokens.items()
      if ids
    }
  name = config.data.tokenizer
  if tokenizer and tokenizers.load(name).key != tokenizer.key:
    pairs["data.tokenizer"] = tokenizer.name, name
  _check_equal(pairs, path)


def _check_equal(pairs, path):
  """Raises ConfigError for a value of a source that differs from the config's."""
  for key, (before, after) in pairs.items():
    before, after = (
      tuple(x) if isinstance(x, list) else x for x in (before, after)
    )
    if before != after:
      raise ConfigError(
        f"{path} has {key} = {before}, and the config has {after}; give a config of"
        " the same tokens"
      )


def tell_differences(old: Mapping, config, path: str) -> None:
  """Warns of options in which a model differs from the source of its weights.

  Args:
    old: the section `model` of the source.
    config: of the run that takes its weights.
    path: of the source.
  """
  before, after = (
    {k: json.dumps(x) for k, x in config_lib.flat(one)}
    for one in (old, config.model.to_dict())
  )
  differ = [
    f"{key} = {value}, here {after[key]}"
    for key, value in before.items()
    if after.get(key, value) != value and not key.endswith(_NO_FUNCTION)
  ]
  if differ:
    logging.warning("The model of %s has %s", path, "; ".join(differ))


def check(source, target, how) -> None:
  """Raises ConfigError for models that do not fit together.

  Args:
    source, target, how: as in `changes`.
  """
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
  _check_used(source, target)


def _check_used(source, target):
  """Raises ConfigError for parameters of the source that the target lacks."""
  paths = [
    traverse_util.flatten_dict(
      nn.unbox(models.variables(one))["params"], sep="/"
    )
    for one in (source, target)
  ]
  for place, old, new in _pairs(source.arch, target.arch, *paths):
    made = {k.replace("moe/experts/", "mlp/") for k in new}
    if left := sorted(old - new - (set() if _has_experts(old) else made)):
      raise ConfigError(
        f"the source has {', '.join(left)}{place}, and the target has not; give a"
        " target config with the networks and biases of the source"
      )


def _has_experts(paths):
  return any(path.startswith("moe/experts/") for path in paths)


def _pairs(one, other, old, new):
  """(words, paths of the source, of the target) of each layer and the rest."""
  inner = set()
  for ours, theirs in zip(one.stacks, other.stacks):
    both = zip(_of_layers(old, ours), _of_layers(new, theirs))
    for index, (left, right) in enumerate(both):
      yield f" in {ours.sequence}, layer {index}", left, right
    inner |= {name for stack in (ours, theirs) for name, *_ in stack.segments}
  yield (
    "",
    *({k for k in x if k.split("/")[0] not in inner} for x in (old, new)),
  )


def _of_layers(paths, stack):
  """Yields the parameters of each layer, by their paths in it."""
  for begin, _ in places(stack):
    yield {k.removeprefix(begin) for k in paths if k.startswith(begin)}


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


_OF_MODEL = [
  field.name
  for field in dataclasses.fields(embedding.Vocabulary)
  if field.name not in ("dtype", "embedding_variance", "vocab_size")
]


def _check_tokens(one, other):
  """Raises ConfigError for a target that has fewer tokens than the source."""
  for name, old in one.tables.items():
    new = other.tables[name]
    if new < old:
      raise ConfigError(
        f"the target's {name} is for {new} tokens, and that of the source for {old};"
        " give a vocab_size that is at least as large"
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
    _same(
      layer.mlp, made.mlp, ("activation", "width"), f"{place}, dense network"
    )
    return
  _check_beside(layer, made, place)
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
  parts = num_parts(layer, made)
  wanted = parts if how.method == "granular" else 1
  if parts * experts.width != old.width or parts != wanted:
    raise ConfigError(
      f"model.moe.d_expert = {experts.width} is not the width of the network in"
      f" {place} of the source, {old.width}, nor a whole part of it with --method="
      "granular"
    )
  if made.recipe.num_experts % parts:
    raise ConfigError(
      f"model.moe.num_experts = {made.recipe.num_experts} is no multiple of the"
      f" {parts} parts of a network in {place}; change one of them"
    )


def _check_beside(layer, made, place):
  """Raises ConfigError if networks beside the experts are not the source's."""
  if made.mlp is not None and (layer.recipe is None or layer.mlp is None):
    raise ConfigError(
      f"the target has a dense network after its experts in {place}, for which the"
      ' source has nothing; take a pattern of "moe"'
    )
  if made.mlp and layer.mlp:
    _same(
      layer.mlp, made.mlp, ("activation", "width"), f"{place}, dense network"
    )
  for name in ("shared", "latent", "cheap"):
    network = getattr(made.recipe, name)
    old = layer.recipe and getattr(layer.recipe, name)
    if network and (not old or name == "cheap"):
      raise ConfigError(
        f"the target has {name} experts in {place}, for which the source has nothing"
        " that could be taken; leave them out"
      )
    if network and old:
      fields = "activation", "width"
      _same(old, network, fields, f"{place}, {name} experts")


def num_parts(layer, made) -> int:
  """Returns G, the number of experts that together are a dense network.

  Args:
    layer, made: of the source, which has the network, and of the target.
  """
  return max(1, layer.mlp.width // made.recipe.experts.width)


def places(stack):
  """Yields (path, repeat) of every layer of a stack."""
  for name, pattern, repeats, _ in stack.segments:
    for repeat in range(repeats):
      for i in range(len(pattern)):
        yield f"{name}/{i}/", repeat
