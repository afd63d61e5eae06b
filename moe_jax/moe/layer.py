"""The Mixture-of-Experts layer, as a pure function."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe import exchange
from moe_jax.moe.types import (
  Array,
  Axes,
  Balancer,
  Bound,
  Dispatcher,
  Experts,
  Mlp,
  Router,
  Routing,
  Side,
  Stats,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a layer is made of. Hashable; holds no arrays.

  num_experts: E.
  sequences: S, into how many equal parts the statistics of a group are cut.
  groups_per_sequence: how many groups make up a sequence, if S is 1.
  bound: how many rows experts may receive per group; None: dropless.
  balancers: (label, Balancer) pairs; their selections are applied in turn.
  shared: a dense network every token passes, added to the sum; None: no
    shared experts.
  checked: whether every kernel declares over which mesh axes it varies, so
    that shard_map can check them.
  """

  num_experts: int
  router: Router
  dispatcher: Dispatcher
  experts: Experts
  bound: Bound | None = None
  sequences: int = 1
  groups_per_sequence: int = 1
  balancers: tuple[tuple[str, Balancer], ...] = ()
  shared: Mlp | None = None
  checked: bool = True

  @property
  def causal(self) -> bool:
    """Whether a token's output is independent of the tokens after it."""
    top_k = self.router.top_k
    return self.router.causal and self.dispatcher.causal(top_k, self.bound)


def moe_ffn(
  recipe: Recipe,
  params: Mapping[str, Mapping[str, Array]],
  balance: Mapping[str, Mapping[str, Array]],
  x_GTD: Array,
  side: Side,
  rng_G: Array | None = None,
  *,
  axes: Axes | None = None,
  collect: str | None = None,
) -> tuple[Array, Stats, dict[str, Array]]:
  """y_t = sum over the experts e chosen for t of w_te * expert_e(x_t).

  The same body runs on one device and, inside `sharded.sharded`, on many.

  Args:
    recipe: the parts.
    params: {"router": ..., "experts": ..., "shared": ...}.
    balance: {balancer label: its state}; only read.
    x_GTD: tokens in groups; in the sharded region this device's groups.
    side: mask and per-token features, [G, T].
    rng_G: one key per group for the router's noise; None: no noise.
    axes: names of the mesh axes in the sharded region, None outside.
    collect: "routing" also returns expert_GTK and weight_GTK.

  Returns:
    y_GTD in x's dtype; zero (plus the shared experts) for a token without a
      slot, which then passes through the residual alone.
    Stats with leading [G, S].
    What was asked for by `collect`.
  """
  routing = route(recipe, params["router"], balance, x_GTD, side, rng_G)
  routing = place(routing)
  plan = recipe.dispatcher.plan(routing, recipe.num_experts, recipe.bound)
  x_GTD = exchange.enter_tensor(x_GTD, axes)
  rows = plan.dispatch(x_GTD)
  rows, back = exchange.exchange(rows, recipe.bound, axes)
  experts = read(params["experts"], recipe.experts.axes, x_GTD.dtype, axes)
  rows = recipe.experts.apply(experts, rows)
  y_GTD = plan.combine(back(rows))
  if recipe.shared is not None:
    shared = read(params["shared"], recipe.shared.axes, x_GTD.dtype, axes)
    y_GTD += recipe.shared.apply(shared, x_GTD)
  y_GTD = exchange.sum_tensor(y_GTD, axes)
  stats = report(recipe, routing, plan.kept_GTK, side.mask_T)
  kept = {"expert_GTK": routing.expert_TK, "weight_GTK": routing.weight_TK}
  return y_GTD, stats, kept if collect == "routing" else {}


def route(recipe, params, balance, x_GTD, side, rng_G) -> Routing:
  """The router's decision, group by group."""

  def select(score_TE):
    for label, balancer in recipe.balancers:
      score_TE = balancer.select(balance[label], score_TE)
    return score_TE

  def one_group(x_TD, side, rng):
    return recipe.router.route(
      params,
      x_TD,
      num_experts=recipe.num_experts,
      select=select,
      side=side,
      rng=rng,
    )

  return jax.vmap(one_group)(x_GTD, side, rng_G)


def place(routing: Routing) -> Routing:
  """Experts to physical slots: expert e is slot e. Replicas would go here."""
  return routing


def read(params, logical_axes, dtype, axes: Axes | None):
  """Weights as the experts see them: whole in D, in the compute dtype."""
  params = {k: w.astype(dtype) for k, w in params.items()}
  params = exchange.gather_weights(params, logical_axes, axes)
  return {
    # Added to every shard's part of the sum over F, so in all but one as 0.
    k: exchange.once(w, axes) if k == "down_bias" else w
    for k, w in params.items()
  }


def report(recipe: Recipe, routing: Routing, kept_GTK, mask_GT) -> Stats:
  """Sums over the tokens of each sequence; reductions happen outside."""
  groups, tokens, _ = kept_GTK.shape
  prob_GTE, logits_GTE = routing.prob_TE, routing.logits_TE
  valid_GTK = routing.valid_TK
  zero_GT = jnp.zeros((groups, tokens), routing.weight_TK.dtype)

  def by_sequence(value):
    value = jnp.where(_like(mask_GT, value), value, 0)
    shape = (groups, recipe.sequences, -1, *value.shape[2:])
    # Without the dtype, integers grow to int64 in float64 mode.
    return value.reshape(shape).sum(2, dtype=value.dtype)

  def by_expert(value_GTK):
    value = value_GTK.reshape(groups, recipe.sequences, -1)
    expert = routing.expert_TK.reshape(value.shape)
    g, s = jnp.indices(value.shape[:2], sparse=True)
    counts = jnp.zeros(
      (groups, recipe.sequences, recipe.num_experts), value.dtype
    )
    return counts.at[g[..., None], s[..., None], expert].add(value)

  def whole(flags):
    return flags.astype(jnp.int32)

  def choices(flags_GTK):
    return by_sequence(flags_GTK.sum(-1, dtype=jnp.int32))

  # Not a slice of expert_TK: XLA on CPU would sort all scores for that.
  first_GTK = valid_GTK.at[..., 1:].set(False)
  full = valid_GTK & ~kept_GTK
  ordinary = (
    recipe.bound is None or recipe.bound.expert_buckets == recipe.num_experts
  )
  none = jnp.zeros_like(full)
  prob, confidence = zero_GT[..., None], zero_GT
  if prob_GTE is not None:
    prob = prob_GTE
    chosen = jnp.take_along_axis(prob_GTE, routing.expert_TK, axis=-1)
    confidence = jnp.where(valid_GTK, chosen, 0).sum(-1)
  z = zero_GT
  if logits_GTE is not None:
    z = jax.nn.logsumexp(logits_GTE, axis=-1) ** 2
  return Stats(
    tokens=by_sequence(whole(mask_GT)),
    count_E=by_expert(whole(valid_GTK)),
    first_choice_E=by_expert(whole(first_GTK)),
    prob_E=by_sequence(
      jnp.broadcast_to(prob, (groups, tokens, recipe.num_experts))
    ),
    weight_E=by_expert(jnp.where(valid_GTK, routing.weight_TK, 0)),
    kept_E=by_expert(whole(kept_GTK)),
    dropped={
      "capacity": choices(full if ordinary else none),
      "buffer": choices(none if ordinary else full),
      "unrouted": choices(~valid_GTK),
    },
    z=by_sequence(z),
    entropy=by_sequence(jax.scipy.special.entr(prob).sum(-1)),
    confidence=by_sequence(confidence),
    extra={k: by_sequence(v) for k, v in routing.extra.items()},
    groups_per_sequence=recipe.groups_per_sequence,
  )


def group_keys(rng: Array, num_groups: int, first: int | Array = 0) -> Array:
  """One key per group of a step, from its global index, on any mesh.

  Args:
    rng: the key of (seed, step).
    num_groups: groups in this forward pass.
    first: global index of the first of them.
  """
  return jax.vmap(lambda g: jax.random.fold_in(rng, g))(
    first + jnp.arange(num_groups)
  )


def _like(mask_GT, value):
  return mask_GT.reshape(mask_GT.shape + (1,) * (value.ndim - 2))
