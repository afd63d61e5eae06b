"""Our models as options of `config.model`, and the other way.

What a model is made of is read here and nowhere else in this folder.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.hf import rows

# Keys that a family's table may leave out; d_ff is that of dense layers.
_BASE = {"name": "decoder", "d_ff": 1, "attention": {}, "variants": {}}
_BASE |= {"norm": "rms", "remat": "none", "allow_noncausal": False}
_MOE = {"num_shared_experts": 0, "shared_gate": False, "use_bias": False}
_MOE |= {
  "init_scale": 1.0,
  "grouped_matmul": None,
  "balancers": {},
  "router": {},
}
_OF_HEADS = ("num_heads", "num_kv_heads", "head_dim", "rope_theta")
_OF_MODEL = (
  *("vocab_size", "d_model", "num_layers", "norm", "norm_eps"),
  *("tie_embeddings", "scale_embedding"),
)
# Options of the router that matter in training alone, and top_k.
_NOT_OF_ROUTER = (
  *("jitter", "noise", "init_scale", "precision", "second_expert", "top_k"),
  "allow_constant_weight",
)


def build(
  ours: Mapping[str, Any], where: str, mesh=None, dtype: str = "float32"
) -> nn.Module:
  """The model of options whose names have dots.

  Args:
    ours: see `rows`; "layers" is the kind of every layer, and "activation" that
      of all networks.
    where: the file that they are from, for errors.
    mesh, dtype: of the model.
  """
  options = {k: x for k, x in ours.items() if k not in ("layers", "left_out")}
  section = _BASE | traverse_util.unflatten_dict(options, sep=".")
  section |= {"dtype": dtype, "scale_embedding": False}
  section |= rows.listed(ours["layers"])
  moe = _MOE | {"activation": ours["activation"]} | section["moe"]
  # One renormalised weight learns nothing, and is what the reference computes.
  constant = {"allow_constant_weight": True} if moe["top_k"] == 1 else {}
  moe["router"] = {"name": "top_k", **moe["router"], **constant}
  section["moe"] = moe | models.DROPLESS
  try:
    return models.build(
      section,
      vocab_size=ours["vocab_size"],
      mesh=mesh,
    )
  except ConfigError as e:
    raise ConfigError(f"{where}: {e}") from None


def shapes(model: nn.Module):
  """Shapes of the variables of a model that `build` made."""
  return nn.unbox(models.variables(model))


def with_source(model: nn.Module, source: Any) -> nn.Module:
  """The same model, which remembers where it is from."""
  return model.clone(arch=dataclasses.replace(model.arch, source=source))


def describe(arch) -> dict[str, Any]:
  """The options that decide what a model computes of a token.

  They are those that `build` takes, but "layers" has the options of every layer
  with its "kind", "dense" or "moe". Beside it they stand as the first layer has
  them, one with positions if there is one.
  """
  kinds = {kind: _layer(arch, kind) for kind in arch.layers}
  layers = [kinds[kind] for kind in arch.layers]
  ours = {name: getattr(arch, name) for name in (*_OF_MODEL, "d_ff")}
  turns = lambda layer: layer["attention.rope"] != "none"  # noqa: E731
  for layer in sorted(layers[::-1], key=turns):
    ours |= layer
  return ours | {"layers": layers}


def difference(one: Mapping, other: Mapping) -> str | None:
  """The first thing in which two descriptions differ; None if in nothing."""
  layers = enumerate(zip(one["layers"], other["layers"], strict=False))
  pairs = [(f" of layer {i}", x, y) for i, (x, y) in layers]
  model = [{key: x[key] for key in _OF_MODEL} for x in (one, other)]
  for where, x, y in [*pairs, ("", *model)]:
    for key in sorted({*x, *y}):
      if x.get(key) != y.get(key):
        return f"{key}{where} is {y.get(key)}, and would be {x.get(key)}"
  return None


def _layer(arch, kind):
  """The options of a layer of this kind."""
  parts = arch.layer(kind)
  attention = parts.attention
  options, scaling = dict(vars(attention)), vars(attention.rope_scaling)
  name = type(attention.rope_scaling).__name__.lower()
  scaling = {"name": name} | {k: x for k, x in scaling.items() if x is not None}
  options["rope_scaling"] = scaling if name != "plain" else None
  if attention.rope == "none":
    del options["rope_theta"], options["rope_scaling"]
  ours = {
    k if k in _OF_HEADS else f"attention.{k}": options[k] for k in options
  }
  if parts.recipe is not None:
    return ours | {"kind": "moe", **_experts(parts.recipe, arch.d_model)}
  ours |= {"d_ff": parts.mlp.width, "activation": parts.mlp.activation}
  return ours | {"kind": "dense"}


def _experts(recipe, d_model):
  """The options of a section `model.moe`."""
  key, num_experts = jax.random.key(0), recipe.num_experts
  shape = lambda f, *args: jax.eval_shape(lambda: f(*args))  # noqa: E731
  experts = shape(recipe.experts.init, key, num_experts, d_model)
  shared = shape(recipe.shared.init, key, d_model) if recipe.shared else {}
  router = {
    k: x
    for k, x in recipe.router.spec.options.items()
    if k not in _NOT_OF_ROUTER
  }
  score = router.get("score"), router.get("score_before_top_k")
  if score == ("softmax", False):
    # Softmax over the chosen is softmax over all, over the sum of the chosen.
    router |= {"score_before_top_k": True, "renormalize": True}
  if router.get("num_expert_groups") == router.get("top_expert_groups"):
    router |= {"group_score": None, "expert_group_mask": None}
  wide = experts["up"].shape[-1]
  return {
    "activation": recipe.experts.activation,
    "moe.num_experts": num_experts,
    "moe.top_k": recipe.router.top_k,
    "moe.d_expert": wide,
    "moe.num_shared_experts": shared["up"].shape[-1] // wide if shared else 0,
    "moe.shared_gate": "token_gate" in shared,
    "moe.use_bias": "down_bias" in experts,
    "moe.selected by": [
      balancer.spec.name
      for _, balancer in recipe.balancers
      if shape(balancer.init, num_experts)
    ],
    "moe.router.name": recipe.router.spec.name,
    **{f"moe.router.{k}": x for k, x in router.items()},
  }
