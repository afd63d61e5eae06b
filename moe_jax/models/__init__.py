"""Models by name, built from a config; below here there is no config."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError
from moe_jax.models import attention
from moe_jax.moe import experts, groups, kernels, layer

# Of a section `model.moe`: experts take every token that is sent to them, and no
# sequence shares a group with another.
DROPLESS = {
  "tokens_per_group": "sequence",
  "capacity_factor": None,
  "eval_capacity_factor": None,
  "expert_buckets": None,
  "dispatcher": {"name": "sorted"},
}


def build(
  config: Mapping,
  *,
  vocab_size: int,
  end_of_document: int | None = None,
  seq_len: int,
  batch_sizes: tuple[int, ...],
  mesh: jax.sharding.Mesh | None = None,
  plugins: tuple[str, ...] = (),
):
  """The model of `config.model`, after checking all that can be checked.

  Args:
    config: the section `model` of a config, see `configs/base.py`.
    vocab_size: V of the data; `config.vocab_size` takes its place.
    end_of_document: a token across which there is no attention; None: none.
    seq_len: L.
    batch_sizes: sequences in one micro-batch, and in an evaluation batch.
    mesh: from `parallel.make_mesh`; None: one device.
    plugins: folders with routers, balancers, ... of the user.

  Returns:
    A linen module; `model.arch` holds what it is made of.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  options = dict(config)
  name, layer_options = options.pop("name"), dict(options.pop("moe"))
  vocab_size = _vocab_size(options.pop("vocab_size"), vocab_size)
  options |= _attention(options)
  kinds = layer_kinds(config)
  if "moe" in kinds:
    recipe, grouping = _moe(layer_options, mesh, plugins)
    for batch in batch_sizes:
      groups.check(recipe, grouping, length=seq_len, batch=batch, mesh=mesh)
    options |= {"recipe": recipe, "grouping": grouping}
  if mesh is not None:
    _check_widths(mesh, options, layer_options, kinds)
  model = registry.load(
    "models",
    name,
    plugins=plugins,
    vocab_size=vocab_size,
    end_of_document=end_of_document,
    mesh=mesh,
    **{k: _hashable(v) for k, v in options.items()},
  )
  for train in (True, False):
    model.arch.check_causal(seq_len, train)
  return model


def variables(model):
  """Shapes of a model's variables, boxed with their logical axes."""
  shards = parallel.token_shards(model.arch.mesh)
  tokens_BL = jnp.zeros((shards, 1), jnp.int32)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens_BL))


def shardings(model):
  """Of a model's variables, on its mesh."""
  return parallel.shardings(variables(model), model.arch.mesh)


def layer_kinds(config: Mapping) -> set[str]:
  """Which of "dense" and "moe" a model of `config.model` has."""
  kinds = set(config["prefix"])
  if config["num_layers"] > len(config["prefix"]):
    kinds |= set(config["pattern"])
  return {kind.partition("@")[0] for kind in kinds}


def _vocab_size(own, of_data):
  """The vocabulary of the model, which has that of the data in it."""
  if own is not None and own < of_data:
    raise ConfigError(
      f"model.vocab_size = {own} is less than the {of_data} tokens of the data;"
      " raise it, or set it to None"
    )
  return own or of_data


_OF_ATTENTION = ("num_heads", "num_kv_heads", "head_dim", "rope_theta")


def _attention(options):
  """{"attention", "variants"}, taking what they are made of out of options."""
  common = {key: options.pop(key) for key in _OF_ATTENTION}
  common["norm_eps"] = options["norm_eps"]
  section = dict(options["attention"])
  return {
    "attention": attention.options(section, **common),
    "variants": tuple(
      (name, attention.options(section | dict(more), **common))
      for name, more in sorted(dict(options["variants"]).items())
    ),
  }


def _check_widths(mesh, options, layer_options, kinds):
  """Attention, dense layers and experts over the mesh axes that split them."""
  widths = {
    "model.d_model": (options["d_model"], "fsdp"),
    "model.num_heads": (options["attention"].num_heads, "tensor"),
    "model.num_kv_heads": (options["attention"].num_kv_heads, "tensor"),
  }
  if "dense" in kinds:
    widths["model.d_ff"] = (options["d_ff"], "tensor")
  if "moe" in kinds:
    widths["model.moe.d_expert"] = (layer_options["d_expert"], "tensor")
  parallel.check_widths(mesh, **widths)


def _moe(options, mesh, plugins):
  """Recipe and grouping from the section `model.moe`."""
  for key in ("num_experts", "top_k", "d_expert"):
    if not isinstance(options[key], int) or options[key] < 1:
      raise ConfigError(f"model.moe.{key} = {options[key]!r} is not 1 or more")
  if options["num_shared_experts"] < 0:
    raise ConfigError(
      f"model.moe.num_shared_experts = {options['num_shared_experts']} is"
      " negative; 0 is none"
    )
  if options["shared_gate"] and not options["num_shared_experts"]:
    raise ConfigError(
      "model.moe.shared_gate needs shared experts; set num_shared_experts, or"
      " shared_gate = False"
    )
  num_experts, top_k = options["num_experts"], options["top_k"]
  if top_k > num_experts:
    raise ConfigError(
      f"model.moe.top_k = {top_k} is more than model.moe.num_experts ="
      f" {num_experts}; lower top_k or raise num_experts"
    )

  def part(kind, section, **more):
    name, section = registry.split(kind, section)
    section = {k: _hashable(v) for k, v in section.items()}
    twice = set(section) & set(more)
    if twice:
      raise ConfigError(f"{sorted(twice)} of {name} is set by model.moe itself")
    return registry.load(kind, name, plugins=plugins, **section, **more)

  backend = kernels.backend_for(
    parallel.platform(mesh), options["grouped_matmul"]
  )
  activation, d_expert = options["activation"], options["d_expert"]
  shared = None
  if options["num_shared_experts"]:
    shared = experts.dense(
      options["num_shared_experts"] * d_expert,
      activation,
      options["use_bias"],
      options["init_scale"],
    )
    if options["shared_gate"]:
      shared = experts.gated(shared)
  dispatcher = part("dispatchers", options["dispatcher"])
  recipe = layer.Recipe(
    num_experts=num_experts,
    router=part("routers", options["router"], top_k=top_k),
    dispatcher=dispatcher,
    experts=experts.build(
      d_expert,
      activation,
      options["use_bias"],
      options["init_scale"],
      backend,
    ),
    balancers=tuple(
      (label, part("balancers", section))
      for label, section in sorted(dict(options["balancers"]).items())
    ),
    shared=shared,
    # Slots need no backend, nor what it would have to import.
    checked=not dispatcher.ragged or kernels.is_checked(backend),
  )
  grouping = groups.Grouping(
    options["tokens_per_group"],
    options["capacity_factor"],
    options["eval_capacity_factor"],
    options["expert_buckets"],
  )
  return recipe, grouping


def _hashable(value):
  return tuple(value) if isinstance(value, list) else value
