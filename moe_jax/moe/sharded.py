"""The layer on a mesh: `moe_ffn` inside of `shard_map`."""

import jax

from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.moe import layer
from moe_jax.moe.types import Axes, Side


def check(recipe: layer.Recipe, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where experts or their buckets do not divide."""
  expert = mesh.shape["expert"]
  parallel.check_widths(mesh, num_experts=(recipe.num_experts, "expert"))
  bound = recipe.bound
  if bound is not None and bound.expert_buckets % expert:
    raise ConfigError(
      f"expert_buckets = {bound.expert_buckets} does not divide over the mesh"
      f" axis expert = {expert}; choose a multiple of it"
    )


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
    return lambda *args, collect=None: layer.moe_ffn(
      recipe, *args, collect=collect
    )
  axes = Axes(platform=parallel.platform(mesh))
  tokens, everywhere = jax.P(parallel.TOKENS), jax.P()
  weights = {"router": everywhere, "experts": _specs(recipe.experts)}
  if recipe.shared is not None:
    weights["shared"] = _specs(recipe.shared)

  def run(params, balance, x_GTD, side: Side, rng_G, collect=None):
    def body(params, balance, x_GTD, side, rng_G):
      return layer.moe_ffn(
        recipe, params, balance, x_GTD, side, rng_G, axes=axes, collect=collect
      )

    return jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(weights, everywhere, tokens, tokens, tokens),
      out_specs=(tokens, tokens, tokens),
      check_vma=recipe.experts.checked or not recipe.dispatcher.ragged,
    )(params, balance, x_GTD, side, rng_G)

  return run


def _specs(experts):
  return {name: parallel.spec(axes) for name, axes in experts.axes.items()}
