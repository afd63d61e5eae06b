"""Parameters, operations and cache of a model, without allocating any of it."""

from collections.abc import Mapping

import flax.linen as nn
import jax

from moe_jax import models
from moe_jax.core import roles


def count(model, variables) -> dict[str, int]:
  """Numbers of parameters.

  Active counts, for one token, the chosen K of E routed experts and
  everything else once.

  Args:
    model: from `models.build`.
    variables: shapes of its variables as `model.init` returns them, see
      `models.variables`.

  Returns:
    total, active, active_without_embedding; where there are two stacks of layers
    active_encoder and active_decoder, without norms; by the part that a parameter is
    declared to be of: embedding, head, attention, dense (feed-forward layers),
    experts, shared, router, norm; and selection_bias, which is not learnt by a
    gradient and in no sum.
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
  """{"active_" and the name of a stack: its parameters}, where it is not alone."""
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
  """Floating-point operations of a training step for one token.

  Forward two for every active weight that multiplies, and 4 L H d a layer for
  attention over L positions; backward twice as much. Nothing for empty or
  dropped slots: it is what the mathematics asks for, not what a kernel does.

  Args:
    model: from `models.build`.
    sizes: from `count`.
    lengths: of the task: L of every sequence.
  """
  return 3 * flops_per_token(model, sizes, lengths)


def flops_per_token(model, sizes: dict, lengths: Mapping) -> int:
  """Floating-point operations of a forward pass for one token.

  Args:
    model: from `models.build`.
    sizes: from `count`.
    lengths: tokens that it looks at, of every sequence; with several it is a mean
      over the tokens of all.
  """
  weights = sizes["active"] - sizes.get("norm", 0)
  arch = getattr(model, "arch", None)
  if arch is None:  # A model of somebody else's.
    return 2 * weights
  if len(arch.stacks) > 1:
    return round(_flops_of_pair(arch, sizes, lengths) / sum(lengths.values()))
  if not arch.tie_embeddings:  # Looked up; tied, it is the output layer.
    weights -= sizes["embedding"]
  return 2 * weights + _per_pair(arch) * lengths["inputs"]


def _flops_of_pair(arch, sizes, lengths):
  """Operations for one input of an encoder-decoder and its target."""
  encoder, decoder = arch.stacks
  inputs, targets = (lengths[one.sequence] for one in arch.stacks)
  flops = 2 * sizes["active_encoder"] * inputs
  flops += 2 * sizes["active_decoder"] * targets
  flops += 2 * arch.vocab_size * arch.d_model * targets
  # Keys and values of the encoder's tokens are made of these.
  across = [decoder.layer(kind).attention.as_cross() for kind in decoder.layers]
  made = sum(layer.cached_per_token for layer in across) * arch.d_model
  flops += 2 * made * (inputs - targets)
  flops += _per_pair(encoder) * inputs**2 + _per_pair(decoder) * targets**2
  return flops + sum(x.flops_per_pair for x in across) * inputs * targets


def _per_pair(stack):
  """Operations of all layers for one query and one key."""
  layers = map(stack.layer, stack.layers)
  return sum(layer.attention.flops_per_pair for layer in layers)


def kv_cache_per_token(model) -> int:
  """Numbers that attention keeps for every token that a decoder has made."""
  stack = model.arch.stacks[-1]
  layers = map(stack.layer, stack.layers)
  return sum(layer.attention.cached_per_token for layer in layers)


def describe(model) -> dict:
  """{layers: recipe in words} of the MoE layers, with no hidden defaults."""
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
