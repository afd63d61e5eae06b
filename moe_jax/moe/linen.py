"""The thin linen module around `layer.moe_ffn`."""

from collections.abc import Mapping

import flax.linen as nn
import jax

from moe_jax.moe import groups, layer, sharded
from moe_jax.moe.types import Array, Side, Stats


class MoE(nn.Module):
  """Declares parameters, forms groups, calls the layer."""

  recipe: layer.Recipe
  grouping: groups.Grouping
  mesh: jax.sharding.Mesh | None = None

  @nn.compact
  def __call__(
    self,
    x_BLD: Array,
    mask_BL: Array,
    features: Mapping[str, Array],
    rng_G: Array | None = None,
    *,
    train: bool = False,
    collect: str | None = None,
  ) -> tuple[Array, Stats, dict[str, Array]]:
    _, length, d_model = x_BLD.shape
    tokens, recipe = self.grouping.resolve(self.recipe, length, train)
    num_experts = recipe.num_experts
    params = {
      "router": self._declare(
        "router",
        recipe.router.axes,
        lambda rng: recipe.router.init(rng, d_model, num_experts),
      ),
      "experts": self._declare(
        "experts",
        recipe.experts.axes,
        lambda rng: recipe.experts.init(rng, num_experts, d_model),
      ),
    }
    if recipe.shared is not None:
      params["shared"] = self._declare(
        "shared",
        recipe.shared.axes,
        lambda rng: recipe.shared.init(rng, d_model),
      )
    balance = {
      label: self._balancer_state(label, balancer)
      for label, balancer in recipe.balancers
    }

    def in_groups(feature_BL):
      return feature_BL.reshape(-1, tokens)

    y_GTD, stats, collected = sharded.sharded(recipe, self.mesh)(
      params,
      balance,
      x_BLD.reshape(-1, tokens, d_model),
      Side(*jax.tree.map(in_groups, (mask_BL, dict(features)))),
      rng_G if train or recipe.router.always_draws else None,
      collect=collect,
    )
    return y_GTD.reshape(x_BLD.shape), stats, collected

  def _balancer_state(self, label, balancer):
    """A balancer's state in the collection `balance`, if it has any."""
    init = lambda: balancer.init(self.recipe.num_experts)  # noqa: E731
    if not jax.eval_shape(init):
      return {}
    return self.variable("balance", label, init).value

  def _declare(self, name, axes, init):
    """A dict of parameters at moe/<name>, each with its logical axes."""

    def boxed(rng):
      return {
        k: nn.LogicallyPartitioned(v, axes[k]) for k, v in init(rng).items()
      }

    return self.param(name, boxed)
