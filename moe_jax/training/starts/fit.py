"""Whether a model fits the one whose weights it is to begin with (upcycling)."""

import dataclasses

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import shown
from moe_jax.data import tokenizers
from moe_jax.models import embedding

# Options of attention that matter in training only.
_IDLE = ("init_scale",)


def keeps(source, target, how) -> bool:
  """Whether the target computes what the source does, as its routing tells.

  Args:
    source, target: models that `check` does not refuse.
    how: `upcycling.Upcycling`.
  """
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
    parts = num_parts(layer, made)
    return parts == 1 or (router.top_k or 1) % parts == 0
  old = layer.recipe.router
  copies = made.recipe.num_experts // layer.recipe.num_experts
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


def check_text(source, config, path: str) -> None:
  """Raises ConfigError for a config whose tokens mean something else.

  Args:
    source: a `trained.Trained`.
    config: of the model to make.
    path: of the source, for messages.
  """
  task, tokenizer = config.task, config.data.tokenizer
  if source.config is not None:
    old = source.config
    keys = "name", "end", "start", "sentinels"
    pairs = {f"task.{k}": (old.task.get(k), task.get(k)) for k in keys}
    pairs["data.tokenizer"] = old.data.tokenizer, tokenizer
  else:
    tokens = {"end": source.ends, "start": source.start}
    two_texts = len(source.model.arch.stacks) > 1
    pairs = {
      f"task.{k}": (ids[0], task.get(k))
      for k, ids in tokens.items()
      if two_texts and ids
    }
    if tokenizers.load(tokenizer).key != source.tokenizer.key:
      pairs["data.tokenizer"] = source.tokenizer.name, tokenizer
  for key, (before, after) in pairs.items():
    if before != after:
      raise ConfigError(
        f"{path} has {key} = {before}, and the config has {after}; give a config of"
        " the same tokens"
      )


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


def num_parts(layer, made) -> int:
  """G: experts that are together one dense network of the source."""
  return max(1, layer.mlp.width // made.recipe.experts.width)
