"""One kind of layer of a model, from a config."""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.core.options import integer, labelled, of, part, section, word
from moe_jax.models import attention
from moe_jax.moe import experts, groups, kernels, layer
from moe_jax.moe.types import Mlp

_MOE = of(experts.build) | of(groups.Grouping)
_MOE |= {
  "num_experts": integer(1),
  "top_k": integer(1),
  "num_shared_experts": integer(0),
  "shared_gate": bool,
  "grouped_matmul": _MOE.pop("backend"),
  "router": part(),
  "dispatcher": part(),
  "balancers": labelled(part()),
}
OF_ATTENTION = ("num_heads", "num_kv_heads", "head_dim", "rope_theta")
# Keys of a layer that a variant may set beside those of attention and "moe".
OF_A_LAYER = ("d_ff", "activation")
_DENSE = {"d_ff": integer(1), "activation": word(*experts.ACTIVATIONS)}
# Keys of `config.model` that belong to its layers.
OPTIONS = {key: attention.OPTIONS[key] for key in OF_ATTENTION} | _DENSE
OPTIONS |= {
  "attention": section(attention.OPTIONS, required=()),
  "variants": labelled(
    section(
      attention.OPTIONS | _DENSE | {"moe": section(_MOE, required=())},
      required=(),
    )
  ),
  "moe": section(_MOE),
}


class Layer(NamedTuple):
  """One kind of layer. Hashable.

  attention: see `attention.Options`.
  mlp: the network of a dense layer; None in an MoE layer.
  recipe, grouping: of an MoE layer; None in a dense one.
  """

  attention: attention.Options
  mlp: Mlp | None = None
  recipe: layer.Recipe | None = None
  grouping: groups.Grouping | None = None


def make(kind: str, model: Mapping, mesh, plugins) -> Layer:
  """The parts of a kind of layer: the model's, but for its variant's keys.

  Args:
    kind: "dense" or "moe", or either with "@VARIANT".
    model: `config.model`.
    mesh, plugins: as in `models.build`.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  ffn, _, variant = kind.partition("@")
  if ffn not in ("dense", "moe"):
    raise ConfigError(f'a layer is "dense" or "moe", not "{kind}"')
  variants = dict(model["variants"])
  if variant and variant not in variants:
    raise ConfigError(
      f'a layer is "{kind}", but model.variants has no "{variant}"'
      + did_you_mean(variant, variants)
    )
  own = dict(variants[variant]) if variant else {}
  place, d_ff_key = (
    f"model.variants.{variant}.{key}" if key in own else f"model.{key}"
    for key in ("moe", "d_ff")
  )
  moe = dict(model["moe"]) | dict(own.pop("moe", {}))
  wide = {key: own.pop(key, model[key]) for key in OF_A_LAYER}
  attend = attention.read(
    dict(model["attention"]) | own,
    norm_eps=model["norm_eps"],
    **{key: model[key] for key in OF_ATTENTION},
  )
  if ffn == "dense":
    parts = Layer(attend, mlp=experts.dense(wide["d_ff"], wide["activation"]))
  else:
    for key in sorted(set(moe) - set(model["moe"])):
      raise ConfigError(
        f'{place} has no "{key}"' + did_you_mean(key, model["moe"])
      )
    parts = Layer(attend, None, *sparse(moe, place, mesh, plugins))
  if mesh is not None:
    parallel.check_widths(
      mesh,
      **{
        "model.d_model": (model["d_model"], "fsdp"),
        "model.num_heads": (parts.attention.num_heads, "tensor"),
        "model.num_kv_heads": (parts.attention.num_kv_heads, "tensor"),
        d_ff_key if parts.recipe is None else f"{place}.d_expert": (
          (parts.mlp or parts.recipe.experts).width,
          "tensor",
        ),
      },
    )
  return parts


def sparse(
  options: Mapping, place: str, mesh, plugins
) -> tuple[layer.Recipe, groups.Grouping]:
  """Recipe and grouping from a section `moe`.

  Args:
    options: the section.
    place: its key, for messages.
    mesh, plugins: as in `models.build`.
  """
  if options["shared_gate"] and not options["num_shared_experts"]:
    raise ConfigError(
      f"{place}.shared_gate needs shared experts; set num_shared_experts, or"
      " shared_gate = False"
    )
  if options["top_k"] > options["num_experts"]:
    raise ConfigError(
      f"{place}.top_k = {options['top_k']} is more than {place}.num_experts ="
      f" {options['num_experts']}; lower top_k or raise num_experts"
    )

  def made(kind, key, own, **more):
    key = f"{place}.{key}"
    return registry.from_config(kind, own, key, plugins=plugins, **more)

  backend = kernels.backend_for(
    parallel.platform(mesh), options["grouped_matmul"]
  )
  network = options["activation"], options["use_bias"], options["init_scale"]
  d_expert, shared = options["d_expert"], None
  if options["num_shared_experts"]:
    shared = experts.dense(options["num_shared_experts"] * d_expert, *network)
    if options["shared_gate"]:
      shared = experts.gated(shared)
  dispatcher = made("dispatchers", "dispatcher", options["dispatcher"])
  # Slots need no backend, nor what it would have to import.
  ragged = backend if dispatcher.ragged else None
  recipe = layer.Recipe(
    num_experts=options["num_experts"],
    router=made("routers", "router", options["router"], top_k=options["top_k"]),
    dispatcher=dispatcher,
    experts=experts.build(d_expert, *network, ragged),
    balancers=tuple(
      (label, made("balancers", f"balancers.{label}", own))
      for label, own in sorted(dict(options["balancers"]).items())
    ),
    shared=shared,
  )
  fields = {k: options[k] for k in groups.Grouping._fields}
  return recipe, groups.Grouping(**fields)


def hashable(value):
  """Lists, which JSON has for tuples, as tuples."""
  return tuple(value) if isinstance(value, list) else value
