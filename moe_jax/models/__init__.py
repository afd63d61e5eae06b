"""Models by name, built from a config; below here there is no config.

A model is a linen module with

  example(batch): arguments of a call for this many rows, without content;
  mesh: the devices to run on, or `arch` with it, if there are several;
  sublayers: {path: Sublayer}, the places of its MoE layers; if there are any;
  lengths: {kind of sequence: tokens of an example} for the sequences that the
    model
    makes itself of its inputs, such as patches of an image; if there are any;
  adapted(params, path): weights of a model with other inputs or outputs, from a
  path,
    changed for this one; if it can use them.
"""

import inspect
import itertools
import math
from collections.abc import Mapping

import jax

from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError
from moe_jax.models.parts import section as section_lib
from moe_jax.moe import groups
from moe_jax.moe.types import Sublayer

OPTIONS = section_lib.OPTIONS  # Every key of `config.model`.
SHARED = ("counts",)  # Files of this folder that are no models.
# Keys of a section `model.moe` with which experts take every token that is sent
# to them, and each sequence has groups of its own.
DROPLESS = groups.Grouping()._asdict() | {"dispatcher": {"name": "sorted"}}


def build(
  section: Mapping,
  *,
  mesh: jax.sharding.Mesh | None = None,
  plugins: tuple[str, ...] = (),
  **given,
):
  """Returns the model of a config, a linen module.

  Args:
    section: `config.model`, see `configs/base.py`.
    mesh: from `parallel.make_mesh`; None: one device. Its axes may be explicit:
      the model works on the same automatic ones, see `parallel.automatic`.
    plugins: folders with models, routers, balancers, ... of the user.
    **given: the task's arguments for the model, such as the vocabulary's size.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  name = section["name"]
  make = registry.find("models", name, plugins, "model.name").build
  mesh = parallel.of_automatic_axes(mesh)
  options = {"mesh": mesh, "plugins": plugins, **given}
  try:
    inspect.signature(make).bind(section, **options)
  except TypeError as e:
    raise ConfigError(
      f'the model "{name}" is not for this task, which gives it'
      f" {', '.join(given) or 'nothing'} ({e}); change model.name or task.name"
    ) from None
  return make(section, **options)


def dropless(section: Mapping) -> dict:
  """Returns a section `model` whose experts take every token sent to them."""

  def changed(part):
    part = {**part, "moe": {**part.get("moe", {}), **DROPLESS}}
    if "variants" in part:
      variants = part["variants"].items()
      part["variants"] = {name: changed(own) for name, own in variants}
    return part

  # An encoder's section has only the keys that differ from its decoder's.
  encoder = section["encoder"]
  return changed(section) | {"encoder": changed(encoder) if encoder else {}}


def sublayers(model) -> dict[str, Sublayer]:
  """Returns the MoE layers of a model, by path; {} if it has none."""
  return getattr(model, "sublayers", {})


def at(tree: Mapping, path: str) -> Mapping:
  """Returns the part of nested dicts at a path; {} if there is none.

  Args:
    tree: dicts in dicts.
    path: keys from the outside in, "a/b/c".
  """
  for key in path.split("/"):
    tree = tree.get(key, {})
  return tree


def check(
  model, *, lengths: Mapping[str, int], batches: Mapping[str, int], mesh
) -> None:
  """Raises ConfigError for lengths and batches that a model does not take.

  Args:
    model: from `build`.
    lengths: from `lengths`.
    batches: {config key that sets it: sequences of a forward pass}.
    mesh: of the model.
  """
  for parts in sublayers(model).values():
    if parts.sequence not in lengths:
      raise ConfigError(
        f"the model has layers for {parts.sequence}, which a batch of this task does"
        f" not have: {', '.join(sorted(lengths))}; change model.name or task.name"
      )
    length = lengths[parts.sequence]
    for key, batch in batches.items():
      options = {"length": length, "batch": batch, "key": key, "mesh": mesh}
      try:
        groups.check(parts.recipe, parts.grouping, **options)
      except ConfigError as e:
        if len(lengths) == 1:
          raise
        raise ConfigError(f"layers of {parts.sequence}: {e}") from e
  shards = parallel.token_shards(mesh)
  for key, batch in batches.items():
    if batch % shards:
      raise ConfigError(
        f"a batch of {batch} examples does not divide into {shards} token shards;"
        f" make {key} a multiple of {shards}"
      )
  stacks = model.arch.stacks if hasattr(model, "arch") else ()
  for stack, train in itertools.product(stacks, (True, False)):
    stack.check_causal(lengths[stack.sequence], train)


def whole_batch(model, number: int) -> int:
  """Returns the least number of examples, this or more, that fill whole groups.

  On a mesh every device that has tokens has equally many groups.

  Args:
    model: from `build`.
    number: the least number of examples.
  """
  sequences = [1]
  for parts in sublayers(model).values():
    length = model.lengths[parts.sequence]
    sequences.append(max(1, parts.grouping.tokens(length) // length))
  least = math.lcm(*sequences) * parallel.token_shards(mesh_of(model))
  return -(-number // least) * least


def variables(model):
  """Returns the shapes of a model's variables, boxed with logical axes."""
  return jax.eval_shape(lambda: init(model, jax.random.key(0)))


def init(model, rng):
  """Returns new variables of a model, boxed with their logical axes.

  Args:
    model: from `build`.
    rng: a key.
  """
  shards = parallel.token_shards(mesh_of(model))
  return model.init(rng, *model.example(shards))


def mesh_of(model) -> jax.sharding.Mesh | None:
  """Returns the devices that a model runs on; None: one device."""
  return getattr(getattr(model, "arch", model), "mesh", None)


def lengths(model, of_task: Mapping[str, int]) -> dict[str, int]:
  """Returns {kind of sequence: tokens of an example}.

  Args:
    model: from `build`.
    of_task: `tasks.Task.lengths`, the sequences that a batch has.
  """
  return {**of_task, **getattr(model, "lengths", {})}


def shardings(model):
  """Returns the shardings of a model's variables on its mesh."""
  return parallel.shardings(variables(model), mesh_of(model))
