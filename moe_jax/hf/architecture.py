"""Our models as options of `config.model`, and the other way.

This is the only file of this folder that reads the parts of a model.
"""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import defaults
from moe_jax.hf import rows
from moe_jax.models.parts import layers
from moe_jax.moe import experts, pool
from moe_jax.moe.layer import Recipe

# Options that a family's table may leave out; d_ff is that of dense layers.
_DEFAULTS = {
  **{"name": "decoder", "d_ff": 1, "norm": "rms", "scale_embedding": False},
  **{"remat": "none", "allow_noncausal": False, "moe.num_shared_experts": 0},
  **{"rope_theta": 1e4, "scale_output": False, "positions": "none"},
  **{"source_vocab_size": None},
  **{"dropout": 0.0, "attention_dropout": None, "hidden_dropout": None},
  **{"use_bias": False, "init_scale": 1.0, "embedding_variance": None},
  **{"moe.shared_gate": False, "moe.router.name": "top_k"},
  **{f"moe.num_{kind}_experts": 0 for kind in pool.KINDS},
  **{"moe.real_experts": None, "moe.d_latent": None},
  "moe.exchange": Recipe.exchange,
  # A renormalised top-1 weight is always 1, in the reference too.
  "moe.router.allow_constant_weight": True,
  **{f"moe.{key}": value for key, value in models.DROPLESS.items()},
  **{f"moe.{key}": value for key, value in defaults(experts.build).items()},
}
_OF_MODEL = (
  *("vocab_size", "d_model", "tie_embeddings", "scale_embedding"),
  *("scale_output", "positions", "source_vocab_size"),
)
_OF_STACK = ("num_layers", "norm", "norm_eps")
_STACKS = ("encoder.", "")  # The beginnings of keys of a stack.
# Options of the router that matter in training alone, and top_k.
_NOT_OF_ROUTER = (
  *("jitter", "noise", "init_scale", "precision", "second_expert", "top_k"),
  "second_threshold",
  "allow_constant_weight",
)


def build(ours: Mapping, where: str, mesh=None, dtype: str = "float32"):
  """Returns the model of options whose names have dots.

  Args:
    ours: see `rows`; "layers" is the kind of every layer, "encoder.layers" that
      of an encoder's, and "activation" that of all networks.
    where: the file that they are from, for errors.
    mesh, dtype: of the model.

  Raises:
    ConfigError: impossible values.
  """
  own = section(ours) | {"dtype": dtype}
  try:
    return models.build(own, vocab_size=ours["vocab_size"], mesh=mesh)
  except ConfigError as e:
    raise ConfigError(f"{where}: {e}") from None


def section(ours: Mapping) -> dict[str, Any]:
  """Returns the section `config.model` of `build`'s options; without dtype."""
  options = {"variants": {}, "moe.balancers": {}, **_DEFAULTS}
  options |= {"moe.activation": ours["activation"], **ours}
  for stack in _STACKS:
    if kinds := options.pop(f"{stack}layers", None):
      listed = rows.listed(kinds).items()
      options |= {f"{stack}{key}": value for key, value in listed}
  options.pop("left_out", None)
  return dict.fromkeys(
    ("encoder", "image", "video"), {}
  ) | traverse_util.unflatten_dict(options, sep=".")


def describe(arch) -> dict[str, Any]:
  """Returns the options that decide which function of a token a model computes.

  They are options of `build`, but "layers" has the options of every layer with
  its "kind", and "encoder.layers" those of an encoder's. The options of a layer
  beside "layers" are those of the first layer, or of the first with positions
  if there is one.

  Args:
    arch: of the model.
  """
  ours = {key: getattr(arch, key, None) for key in _OF_MODEL}
  # Published decoders are dropless; experts of encoder-decoders have slots.
  bounded = len(arch.stacks) > 1
  ours["name"] = "encoder_decoder" if bounded else "decoder"
  for before, stack in zip(_STACKS[::-1], arch.stacks[::-1]):
    own = {"d_ff": arch.d_ff, **_stack(stack, bounded)}
    # If a decoder has no experts, files have the options of the encoder's.
    ours = own | ours
    ours |= {f"{before}{key}": value for key, value in own.items()}
  return ours


def _stack(stack, bounded):
  """The options of a stack, see `describe`; `bounded`: with those of slots."""
  kinds = {kind: _layer(stack, kind, bounded) for kind in stack.layers}
  described = [kinds[kind] for kind in stack.layers]
  ours = {key: getattr(stack, key) for key in _OF_STACK}
  turns = lambda layer: layer["attention.rope"] != "none"  # noqa: E731
  for layer in sorted(described[::-1], key=turns):
    ours |= layer
  return ours | {"layers": described}


def check_same(loaded: Mapping, given: Mapping) -> None:
  """Raises ConfigError with the first difference of two descriptions.

  Args:
    loaded, given: from `describe`.
  """
  both = loaded, given
  keys = {*_OF_MODEL, *(f"{x}{key}" for x in _STACKS for key in _OF_STACK)}
  pairs = [("", *({k: x[k] for k in keys & x.keys()} for x in both))]
  for stack in _STACKS:
    word = stack.replace(".", " ")
    layers = zip(*(x.get(f"{stack}layers", ()) for x in both))
    pairs += [(f" of {word}layer {i}", *two) for i, two in enumerate(layers)]
  for where, x, y in pairs:
    for key in sorted({*x, *y}):
      value, wanted = x.get(key), y.get(key)
      if value != wanted:
        raise ConfigError(
          f"{key}{where} is {wanted}; saved and loaded again it would be {value}"
        )


def _layer(stack, kind, bounded):
  """The options of a layer of this kind; `bounded`: with those of slots."""
  parts = stack.layer(kind)
  options, scaling = dict(vars(parts.attention)), parts.attention.rope_scaling
  numbers = {k: x for k, x in vars(scaling).items() if x is not None}
  name = type(scaling).__name__.lower()
  options["rope_scaling"] = {"name": name} | numbers if numbers else None
  del options["init_scale"]
  if parts.attention.rope == "none":
    del options["rope_theta"], options["rope_scaling"]
  if parts.attention.position_bias == "none":
    del options["bias_buckets"], options["bias_distance"]
  ours = {
    k if k in layers.OF_ATTENTION else f"attention.{k}": x
    for k, x in options.items()
  }
  ours["kind"] = kind.partition("@")[0]
  if parts.mlp is not None:
    ours |= {"d_ff": parts.mlp.width, "activation": parts.mlp.activation}
    ours["use_bias"] = "down_bias" in parts.mlp.axes
  if parts.recipe is not None:
    ours |= _experts(parts.recipe)
  if parts.recipe is not None and bounded:
    ours |= _slots(parts.recipe, parts.grouping)
  return ours


def _slots(recipe, grouping):
  """The options of a section `moe` that decide what is dropped.

  Options that change nothing are None, or left out.
  """
  factor = grouping.eval_capacity_factor or grouping.capacity_factor
  slots = grouping._replace(capacity_factor=factor)._asdict()
  del slots["eval_capacity_factor"]
  if not grouping.capacity and _is_dropless(factor, recipe, grouping):
    return {"moe.router.priority": None}
  if grouping.capacity:
    keys = "tokens_per_group", "capacity", "expert_buckets"
    slots = {key: slots[key] for key in keys}
  if grouping.expert_buckets == recipe.num_experts:
    slots["expert_buckets"] = None
  for name in ("order", "renormalize"):
    slots[name] = recipe.dispatcher.spec.options.get(name)
  if recipe.router.top_k == 1:
    slots["order"] = None
  return {f"moe.{key}": value for key, value in slots.items()}


def _is_dropless(factor, recipe, grouping):
  """Whether every expert has slots for all tokens."""
  if factor in (None, "dropless"):
    return True
  number = recipe.num_experts
  own = grouping.expert_buckets in (None, number)
  return own and factor * (recipe.router.top_k or 0) >= number


def _experts(recipe):
  """The options of a section `model.moe`."""
  routed, shared, made_of = recipe.experts, recipe.shared, recipe.router.spec
  router = {k: x for k, x in made_of.options.items() if k not in _NOT_OF_ROUTER}
  count, balancers = recipe.num_experts, dict(recipe.balancers).values()
  score = router.get("score"), router.get("score_before_top_k")
  if score == ("softmax", False):
    # Softmax over the chosen is softmax over all, over the sum of the chosen.
    router |= {"score_before_top_k": True, "renormalize": True}
  if router.get("num_expert_groups") == router.get("top_expert_groups"):
    router |= {"group_score": None, "expert_group_mask": None}
  return {
    "activation": routed.activation,
    "moe.num_experts": count,
    "moe.top_k": recipe.router.top_k,
    "moe.d_expert": routed.width,
    "moe.num_shared_experts": shared.width // routed.width if shared else 0,
    "moe.shared_gate": bool(shared) and "token_gate" in shared.axes,
    "moe.use_bias": "down_bias" in routed.axes,
    "moe.cheap experts": recipe.cheap.width if recipe.cheap else 0,
    "moe.d_latent": recipe.latent.width if recipe.latent else None,
    "moe.selected by": [x.spec.name for x in balancers if x.select],
    "moe.router.name": made_of.name,
    **{f"moe.router.{k}": x for k, x in router.items()},
  }
