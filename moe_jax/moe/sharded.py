"""The layer on a mesh: `moe_ffn` inside of `shard_map`."""

import functools

import jax

from moe_jax.core import parallel
from moe_jax.moe import layer
from moe_jax.moe.types import Axes


def check(recipe: layer.Recipe, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where experts or their buckets do not divide."""
  widths = {"num_experts": (recipe.num_experts, "expert")}
  if recipe.bound is not None:
    widths["expert_buckets"] = recipe.bound.expert_buckets, "expert"
  parallel.check_widths(mesh, **widths)


def sharded(recipe: layer.Recipe, mesh: jax.sharding.Mesh | None):
  """`moe_ffn` of this recipe over a mesh; the same numbers as without one.

  Args:
    recipe: the parts of the layer.
    mesh: from `make_mesh`; None runs on one device.

  Returns:
    f(params, balance, x_GTD, side, rng_G, collect=None), as `layer.moe_ffn`,
    where G is the global number of groups and divides over the token axes.
  """
  if mesh is None:
    return functools.partial(layer.moe_ffn, recipe)
  axes = Axes(platform=parallel.platform(mesh))
  tokens, everywhere = jax.P(parallel.TOKENS), jax.P()
  weights = {"router": everywhere, "experts": _specs(recipe.experts)}
  if recipe.shared is not None:
    weights["shared"] = _specs(recipe.shared)

  def run(params, balance, x_GTD, side, rng_G=None, *, collect=None):
    return jax.shard_map(
      functools.partial(layer.moe_ffn, recipe, axes=axes, collect=collect),
      mesh=mesh,
      in_specs=(weights, everywhere, tokens, tokens, tokens),
      out_specs=(tokens, tokens, tokens),
      check_vma=recipe.experts.checked or not recipe.dispatcher.ragged,
    )(params, balance, x_GTD, side, rng_G)

  return run


def _specs(experts):
  return {name: parallel.spec(axes) for name, axes in experts.axes.items()}
