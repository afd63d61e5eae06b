"""Parameters, operations and cache of a model, without allocating any of it."""

import fractions
from collections.abc import Mapping

import flax.linen as nn
import jax

from moe_jax import models
from moe_jax.core import roles


def count(model, variables) -> dict[str, int]:
  """Returns numbers of parameters.

  Active counts, for one token, the chosen K of E routed experts and everything
  else once.

  Args:
    model: from `models.build`.
    variables: shapes of its variables as `model.init` returns them, see
      `models.variables`.

  Returns:
    total, active, active_without_embedding; where there are two stacks of
    layers active_encoder and active_decoder, without norms; by the part that a
    parameter is declared to be of: embedding, head, attention, dense
    (feed-forward layers), experts, shared, router, norm; and selection_bias,
    which no gradient changes and no sum includes.
  """
  shapes = nn.unbox(variables)
  parts: dict[str, int] = {}
  of_segments: dict[str, int] = {}
  of_params = jax.tree.leaves(roles.of(variables["params"]))
  for role, (path, leaf) in zip(
    of_params, jax.tree.leaves_with_path(shapes["params"])
  ):
    parts[role.part] = parts.get(role.part, 0) + leaf.size
    if role.part != "norm":
      segment = path[0].key
      of_segments[segment] = of_segments.get(segment, 0) + leaf.size
  total = sum(parts.values())
  active, biases = total, 0
  for path, sublayer in models.sublayers(model).items():
    recipe = sublayer.recipe
    idle = _idle(recipe, models.at(shapes["params"], f"{path}/experts"))
    active -= idle
    of_segments[path.partition("/")[0]] -= idle
    balancers = [b for _, b in recipe.balancers if b.init(recipe.pool)]
    selecting = sum(b.select is not None for b in balancers)
    biases += selecting * recipe.pool * len(sublayer.numbers)
  return {
    "total": total,
    "active": active,
    "active_without_embedding": active - parts.get("embedding", 0),
    **_by_stack(model, of_segments),
    **parts,
    **({"selection_bias": biases} if biases else {}),
  }


def _by_stack(model, of_segments):
  """{"active_" and the name of a stack: its parameters}, for several stacks."""
  stacks = model.arch.stacks if hasattr(model, "arch") else ()
  return {
    f"active_{stack.names[1]}": sum(of_segments.get(n, 0) for n in stack.names)
    for stack in stacks
    if len(stacks) > 1
  }


def _idle(recipe, experts) -> int:
  """Parameters of the experts that a token does not pass."""
  size = sum(x.size for x in jax.tree.leaves(experts))
  idle = recipe.num_experts - recipe.experts_per_token
  return round(size / recipe.num_experts * idle)


def train_flops_per_token(model, sizes: dict, lengths: Mapping) -> int:
  """Returns the floating-point operations of a training step for one token.

  The forward pass has two for every active weight that multiplies, and 4 L H d
  a layer for attention over L positions; the backward pass has twice as many.
  Empty and dropped slots count nothing: these are the operations of the
  mathematics, not those of a kernel.

  Args:
    model: from `models.build`.
    sizes: from `count`.
    lengths: see `models.lengths`.
  """
  return 3 * flops_per_token(model, sizes, lengths)


def flops_per_token(model, sizes: dict, lengths: Mapping) -> int:
  """Returns the floating-point operations of a forward pass for one token.

  Args:
    model: from `models.build`.
    sizes: from `count`.
    lengths: see `models.lengths`; all tokens of an example share its
      operations.
  """
  if not hasattr(model, "arch"):  # The model of a plugin.
    return 2 * (sizes["active"] - sizes.get("norm", 0))
  flops = model.arch.flops(sizes, lengths)
  return round(fractions.Fraction(flops, sum(lengths.values())))


def kv_cache_per_token(model) -> int:
  """Returns how many numbers attention keeps for a token of a decoder."""
  stack = model.arch.stacks[-1]
  return sum(parts.attention.cached_per_token for parts in stack.each_layer)


def describe(model) -> dict:
  """Returns {layers: recipe in words} of the MoE layers, with all defaults."""
  recipes = {}
  for parts in models.sublayers(model).values():
    recipes.setdefault((parts.recipe, parts.grouping), []).extend(parts.numbers)
  return {
    ", ".join(map(str, sorted(numbers))): {
      "num_experts": recipe.num_experts,
      "router": _part_options(recipe.router),
      "dispatcher": _part_options(recipe.dispatcher),
      "exchange": recipe.exchange,
      "balancers": {k: _part_options(b) for k, b in recipe.balancers},
      "d_expert": recipe.experts.width,
      "activation": recipe.experts.activation,
      "shared": recipe.shared.width if recipe.shared else 0,
      **({"cheap": recipe.cheap.width} if recipe.cheap else {}),
      **({"latent": recipe.latent.width} if recipe.latent else {}),
      **grouping._asdict(),
    }
    for (recipe, grouping), numbers in recipes.items()
  }


def _part_options(part):
  return {"name": part.spec.name, **part.spec.options}
