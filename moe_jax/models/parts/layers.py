"""A kind of layer of a model, from a config."""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import (
  integer,
  labelled,
  number,
  of,
  optional,
  part,
  section,
  word,
)
from moe_jax.models import attention
from moe_jax.moe import (
  balancers,
  exchange,
  experts,
  groups,
  kernels,
  layer,
  pool,
)
from moe_jax.moe.types import Mlp

_MOE = of(experts.build) | of(groups.Grouping)
_MOE |= {
  "num_experts": integer(1),
  "top_k": integer(1),
  "num_shared_experts": integer(0),
  "shared_gate": bool,
  **{f"num_{kind}_experts": integer(0) for kind in pool.KINDS},
  "real_experts": optional(number(above=0)),
  "d_latent": optional(integer(1)),
  "router": part(),
  "dispatcher": part(),
  "balancers": labelled(part()),
  "exchange": word(*exchange.KINDS),
}
FFNS = ("dense", "moe", "moe+dense")  # The networks of a layer.
_DENSE = {"d_ff": integer(1), "activation": word(*experts.ACTIVATIONS)}
# Options of attention whose keys stand beside the section `attention`.
OF_ATTENTION = ("num_heads", "num_kv_heads", "head_dim", "rope_theta")
# Keys of the model that attention has too.
_SHARED = ("norm_eps", "init_scale")
# Keys of a variant besides the options of attention.
OF_A_VARIANT = _DENSE | {"moe": section(_MOE, required=())}
# Keys of `config.model` that belong to its layers.
OPTIONS = {key: of(attention.Options)[key] for key in OF_ATTENTION} | _DENSE
OPTIONS |= {
  "attention": attention.OPTION,
  "variants": labelled(attention.OPTION),
  "moe": section(_MOE),
  "use_bias": bool,
  "init_scale": number(above=0),
}


class Layer(NamedTuple):
  """A kind of layer. Hashable.

  attention: see `attention.Options`.
  mlp: the dense network; None in a layer that has experts only.
  recipe, grouping: of the experts; None in a dense layer.
  """

  attention: attention.Options
  mlp: Mlp | None = None
  recipe: layer.Recipe | None = None
  grouping: groups.Grouping | None = None


def check(model: Mapping, plugins) -> None:
  """Raises ConfigError for an impossible option of attention, or variant.

  Args:
    model: `config.model`.
    plugins: as in `models.build`.
  """
  for variant in ("", *model["variants"]):
    _variant(model, variant, plugins)


def _variant(model, variant, plugins):
  """(options of attention, other keys) of a variant; "" is the model's own."""
  shared = {"name": "grouped"} | dict(model["attention"])
  own = dict(model["variants"].get(variant, {}))
  name, place = own.get("name", shared["name"]), "model.attention"
  if variant:
    place = f"model.variants.{variant}"
  attend = attention.find(name, plugins, f"{place}.name")
  if variant:
    section(of(attend) | OF_A_VARIANT, required=()).check(own, place)
  options = {key: model[key] for key in (*OF_ATTENTION, *_SHARED)}
  # A variant with another kind of attention takes no options of the model's.
  options |= shared if name == shared["name"] else {}
  options |= {key: own.pop(key) for key in of(attend) if key in own}
  return attention.read(attend, options, place), own


def kinds(model: Mapping, mesh, plugins) -> tuple[tuple[str, Layer], ...]:
  """Returns (kind, Layer) of every kind in a model; raises as `make`.

  Args:
    model, mesh, plugins: as in `make`.
  """
  names = sorted({*model["prefix"], *model["pattern"]})
  return tuple((kind, make(kind, model, mesh, plugins)) for kind in names)


def make(kind: str, model: Mapping, mesh, plugins) -> Layer:
  """Returns a kind of layer: the model's options, with its variant's keys.

  Args:
    kind: see `stack.Stack`.
    model: `config.model`.
    mesh, plugins: as in `models.build`.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  names = ["", *(f"@{name}" for name in model["variants"])]
  known = [ffn + name for ffn in FFNS for name in names]
  word(*known).check(kind, "a kind of layer in model.prefix or model.pattern")
  ffn, _, variant = kind.partition("@")
  heads, own = _variant(model, variant, plugins)

  def place(key):
    return f"model.variants.{variant}.{key}" if key in own else f"model.{key}"

  parts, widths = Layer(heads), {}
  if "dense" in ffn:
    d_ff, activation = (own.get(key, model[key]) for key in _DENSE)
    options = activation, model["use_bias"], model["init_scale"]
    parts = parts._replace(mlp=experts.dense(d_ff, *options))
    widths |= {place("d_ff"): (d_ff, "tensor")}
  if "moe" in ffn:
    moe = dict(model["moe"]) | dict(own.get("moe", {}))
    # By default hidden units of experts drop out as those of dense networks.
    rates = moe["expert_dropout"], model["hidden_dropout"], model["dropout"]
    moe["expert_dropout"] = next(r for r in rates if r is not None)
    recipe, grouping = sparse(moe, place("moe"), mesh, plugins)
    parts = parts._replace(recipe=recipe, grouping=grouping)
    widths |= {f"{place('moe')}.d_expert": (moe["d_expert"], "tensor")}
  widths |= {
    "model.d_model": (model["d_model"], "fsdp"),
    "model.num_heads": (heads.num_heads, "tensor"),
    "model.num_kv_heads": (heads.num_kv_heads, "tensor"),
  }
  if mesh is not None:
    parallel.check_widths(mesh, **widths)
  return parts


def sparse(
  options: Mapping, place: str, mesh, plugins
) -> tuple[layer.Recipe, groups.Grouping]:
  """Returns recipe and grouping from a section `moe`.

  Args:
    options: the section.
    place: its key, for messages.
    mesh, plugins: as in `models.build`.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  if options["shared_gate"] and not options["num_shared_experts"]:
    raise ConfigError(
      f"{place}.shared_gate needs shared experts; set num_shared_experts, or"
      " shared_gate = False"
    )
  cheap = tuple(options[f"num_{kind}_experts"] for kind in pool.KINDS)

  def made(kind, key, own, **more):
    key = f"{place}.{key}"
    return registry.from_config(kind, own, key, plugins=plugins, **more)

  def networks(build, **more):
    """Calls `build` with the options of the section that it takes."""
    return build(**{k: options[k] for k in of(build) if k in options} | more)

  shared = None
  if options["num_shared_experts"]:
    width = options["num_shared_experts"] * options["d_expert"]
    shared = networks(experts.dense, width=width)
  dispatcher = made("dispatchers", "dispatcher", options["dispatcher"])
  backend = options["grouped_matmul"]
  backend = kernels.backend_for(parallel.platform(mesh), backend)
  # Slots need no backend, and its library need not be imported.
  ragged = backend if dispatcher.ragged else None
  recipe = layer.Recipe(
    num_experts=options["num_experts"],
    router=made("routers", "router", options["router"], top_k=options["top_k"]),
    dispatcher=dispatcher,
    experts=networks(experts.build, grouped_matmul=ragged),
    balancers=tuple(
      (label, made("balancers", f"balancers.{label}", own))
      for label, own in sorted(dict(options["balancers"]).items())
    ),
    shared=shared,
    cheap=pool.build(*cheap) if sum(cheap) else None,
    real_experts=options["real_experts"],
    latent=options["d_latent"] and experts.latent(options["d_latent"]),
    exchange=options["exchange"],
  )
  _check_top_k(recipe, options["top_k"], place)
  pool.check(recipe, place)
  balancers.check(recipe, place)
  return recipe, groups.Grouping(*map(options.get, groups.Grouping._fields))


def _check_top_k(recipe, top_k, place):
  """Raises ConfigError for more experts of a token than there are."""
  router = recipe.router
  # top_k may have another meaning, such as slots of an expert.
  of_tokens = top_k in (router.top_k, router.average_k)
  if of_tokens and top_k > recipe.pool:
    raise ConfigError(
      f"{place}.top_k = {top_k} is more than {place}.num_experts ="
      f" {recipe.pool}; lower top_k or raise num_experts"
    )
  most = router.top_k or recipe.pool
  if router.average_k is not None and router.average_k > most:
    raise ConfigError(
      f"{place}.router has {router.average_k:g} experts of a token on average and"
      f" at most {most}; lower average, or raise top_k"
    )
