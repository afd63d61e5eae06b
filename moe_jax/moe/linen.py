"""The layer as a linen module."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import roles
from moe_jax.moe import groups, layer, sharded
from moe_jax.moe.types import Array, Side, Stats


class MoE(nn.Module):
  """Declares the parameters of a layer, forms groups and calls `moe_ffn`.

  recipe: the parts of the layer.
  grouping: how sequences form groups, and their capacity.
  mesh: from `parallel.make_mesh`; None: one device.
  """

  recipe: layer.Recipe
  grouping: groups.Grouping = groups.Grouping()
  mesh: jax.sharding.Mesh | None = None

  @nn.compact
  def __call__(
    self,
    x_BLD: Array,
    mask_BL: Array | None = None,
    features: Mapping[str, Array] | None = None,
    rng: Array | None = None,
    *,
    first: int | Array = 0,
    layer_index: int | Array = 0,
    train: bool = False,
    collect: str | None = None,
  ) -> tuple[Array, Stats, dict[str, Array]]:
    """Applies the layer to whole sequences.

    Args:
      x_BLD: tokens of sequences.
      mask_BL: bool, False for padding; None: no padding.
      features: per-token arrays [B, L, ...] that a router may look at.
      rng: the key of a step, for noise; None: no noise.
      first: index of the first sequence in the whole batch of a step, so that
        noise does not depend on micro-batches.
      layer_index: number of the layer, whose noise is its own.
      train: capacity and noise of training, not of evaluation.
      collect: see `layer.moe_ffn`.

    Returns:
      y_BLD, Stats with leading [G, S], and the collected arrays.
    """
    batch, length, d_model = x_BLD.shape
    params, balance = self._variables(d_model)
    if self.is_initializing():  # Of any length, though capacity may be zero.
      return jnp.zeros_like(x_BLD), None, {}
    tokens, recipe = self.grouping.resolve(self.recipe, length, train)
    if mask_BL is None:
      mask_BL = jnp.ones((batch, length), bool)
    rng_G = None
    if rng is not None and (train or recipe.router.always_draws):
      rng_G = self.grouping.keys(rng, batch, length, first)
      rng_G = jax.vmap(jax.random.fold_in, (0, None))(rng_G, layer_index)

    def in_groups(feature_BL):
      return feature_BL.reshape(-1, tokens, *feature_BL.shape[2:])

    y_GTD, stats, collected = sharded.sharded(recipe, self.mesh)(
      params,
      balance,
      in_groups(x_BLD),
      Side(*jax.tree.map(in_groups, (mask_BL, dict(features or {})))),
      rng_G,
      collect=collect,
    )
    return y_GTD.reshape(x_BLD.shape), stats, collected

  def _variables(self, d_model):
    """(parameters, balancers' state), declared where they are not there yet."""
    recipe, num_experts = self.recipe, self.recipe.num_experts
    inits = {
      "router": lambda rng: recipe.router.init(rng, d_model, num_experts),
      "experts": lambda rng: recipe.experts.init(rng, num_experts, d_model),
    }
    if recipe.shared is not None:
      inits["shared"] = lambda rng: recipe.shared.init(rng, d_model)
    params = {
      name: self._declare(name, getattr(recipe, name).axes, init)
      for name, init in inits.items()
    }
    balance = {
      label: self._balancer_state(label, balancer)
      for label, balancer in recipe.balancers
    }
    return params, balance

  def _balancer_state(self, label, balancer):
    """A balancer's state in the collection `balance`, if it has any."""
    init = lambda: balancer.init(self.recipe.num_experts)  # noqa: E731
    if not jax.eval_shape(init):
      return {}
    return self.variable("balance", label, init).value

  def _declare(self, name, axes, init):
    """A dict of parameters at moe/<name>: that part of the model."""

    def boxed(rng):
      return {
        k: roles.Declared(v, axes[k], part=name) for k, v in init(rng).items()
      }

    return self.param(name, boxed)
