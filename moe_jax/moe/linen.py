"""The layer as a linen module."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import parallel, roles
from moe_jax.moe import groups, layer, reduction
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
    replayed: Array | None = None,
    train: bool = False,
    collect: str | None = None,
  ) -> tuple[Array, Stats, dict]:
    """Applies the layer to whole sequences.

    Args:
      x_BLD: tokens of sequences.
      mask_BL: bool, False for padding; None: no padding.
      features: per-token arrays [B, L, ...] that a router may look at.
      rng: the key of a step, for noise; None: no noise.
      first: index of the first sequence in the whole batch of a step, so that
        noise does not depend on micro-batches.
      layer_index: number of the layer, whose noise is its own.
      replayed: experts [B, L, layers, K] of a trace, of which this layer's are
        the feature "replayed"; None: the router chooses.
      train: capacity and noise of training, not of evaluation.
      collect: see `layer.moe_ffn`.

    Returns:
      y_BLD, Stats with leading [G, S], and what was collected.
    """
    batch, length, d_model = x_BLD.shape
    params, balance = self._params(d_model), self._balance()
    if self.is_initializing():  # Accepts any length, even at capacity 0.
      return jnp.zeros_like(x_BLD), None, {}
    tokens, recipe = self.grouping.resolve(self.recipe, length, train)
    if mask_BL is None:
      mask_BL = jnp.ones((batch, length), bool)
    rng_G = None
    if rng is not None and (train or recipe.router.always_draws):
      rng_G = self.grouping.keys(rng, batch, length, first)
      rng_G = jax.vmap(jax.random.fold_in, (0, None))(rng_G, layer_index)

    features = dict(features or {})
    if replayed is not None:
      own = jnp.take(
        replayed, layer_index, axis=2
      )  # Its K is that of the widest layer.
      features["replayed"] = own[..., : recipe.router.top_k]
    inputs = x_BLD, Side(mask_BL, features)
    x_GTD, side = self._with_leading(inputs, -1, tokens)
    args = recipe, params, balance, x_GTD, side, rng_G
    y_GTD, stats, kept = layer.moe_ffn(*args, mesh=self.mesh, collect=collect)
    return self._with_leading(y_GTD, batch, length), stats, kept

  def _with_leading(self, tree, *sizes):
    """Arrays of tokens whose first two axes have these sizes."""

    def reshape(tree):
      return jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[2:]), tree)

    if self.mesh is not None:
      reshape = parallel.automatic(reshape, jax.P(parallel.TOKENS))
    return reshape(tree)

  def _params(self, d_model):
    """{part: its parameters}, which know that they are of that part."""
    recipe, num_experts = self.recipe, self.recipe.num_experts

    def declared(name, part, *sizes):
      def init(rng):
        box = functools.partial(roles.Declared, part=name)
        return jax.tree.map(box, part.init(rng, *sizes), dict(part.axes))

      return self.param(name, init)

    width = recipe.row_width(d_model)
    params = {
      "router": declared("router", recipe.router, d_model, recipe.pool),
      "experts": declared("experts", recipe.experts, num_experts, width),
    }
    for name in ("shared", "latent", "cheap"):
      part = getattr(recipe, name)
      if part and part.axes:
        params[name] = declared(name, part, d_model)
    if self.has_variable("params", reduction.NAME):
      slots = self.get_variable("params", reduction.NAME)
      params[reduction.NAME] = slots
    return params

  def _balance(self):
    """{balancer: its state}, in the collection `balance` if it has any."""
    balance = {label: {} for label, _ in self.recipe.balancers}
    for label, balancer in self.recipe.balancers:
      init = functools.partial(balancer.init, self.recipe.pool)
      if jax.eval_shape(init):
        balance[label] = self.variable("balance", label, init).value
    return balance
