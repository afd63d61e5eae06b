"""Models by name, built from a config; below here there is no config."""

from collections.abc import Mapping

import jax

from moe_jax import experts, grouped_matmul, layer, parallel, registry
from moe_jax.errors import ConfigError
from moe_jax.models import moe


def build(
  config: Mapping,
  *,
  vocab_size: int,
  separate_documents: bool = False,
  seq_len: int,
  batch_sizes: tuple[int, ...],
  mesh: jax.sharding.Mesh | None = None,
  plugins: tuple[str, ...] = (),
):
  """The model of `config.model`, after checking all that can be checked.

  Args:
    config: the section `model` of a config, see `configs/base.py`.
    vocab_size: V, of the data; its last token ends a document.
    separate_documents: no attention across the ends of documents.
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
  kinds = layer_kinds(config)
  if "moe" in kinds:
    recipe, grouping = _moe(layer_options, mesh, plugins)
    for batch in batch_sizes:
      moe.check(recipe, grouping, length=seq_len, batch=batch, mesh=mesh)
    options |= {"recipe": recipe, "grouping": grouping}
  if mesh is not None:
    _check_widths(mesh, options, layer_options, kinds)
  model = registry.load(
    "models",
    name,
    plugins=plugins,
    vocab_size=vocab_size,
    separate_documents=separate_documents,
    mesh=mesh,
    **{k: _hashable(v) for k, v in options.items()},
  )
  for train in (True, False):
    model.arch.check_causal(seq_len, train)
  return model


def layer_kinds(config: Mapping) -> set[str]:
  """Which of "dense" and "moe" a model of `config.model` has."""
  prefix = set(config["prefix"])
  repeats = config["num_layers"] > len(config["prefix"])
  return prefix | set(config["pattern"]) if repeats else prefix


def _check_widths(mesh, options, layer_options, kinds):
  """Attention, dense layers and experts over the mesh axes that split them."""
  widths = {
    "model.d_model": (options["d_model"], "fsdp"),
    "model.num_heads": (options["num_heads"], "tensor"),
    "model.num_kv_heads": (options["num_kv_heads"], "tensor"),
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

  backend = grouped_matmul.backend_for(
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
    checked=not dispatcher.ragged or grouped_matmul.is_checked(backend),
  )
  grouping = moe.Grouping(
    options["tokens_per_group"],
    options["capacity_factor"],
    options["eval_capacity_factor"],
    options["expert_buckets"],
  )
  return recipe, grouping


def _hashable(value):
  return tuple(value) if isinstance(value, list) else value
