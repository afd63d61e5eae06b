"""The Mixture-of-Experts layer, a pure function on one device or a mesh."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.moe import exchange, plans, pool, reduction, types
from moe_jax.moe.types import Array, Side, Stats, TokenChoice


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The parts of a layer. Hashable; holds no arrays.

  num_experts: E, without the cheap ones.
  bound: how many rows experts may receive per group; None: dropless.
  sequences: S, into how many equal parts the statistics of a group are cut.
  groups_per_sequence: how many groups make up a sequence, if S is 1.
  balancers: (label, Balancer) pairs; their selections are applied in turn.
  shared: a dense network every token passes, added to the sum; None: no
    shared experts.
  latent: projections around the experts, see `experts.latent`; None: experts work
    on all of D.
  cheap: experts behind the E networks that cost next to nothing, see `pool`; None:
    there are none.
  real_experts: networks of a token on average, if `cheap` is there; None: as with
    equal shares of all experts.
  exchange: how tokens get to experts on other devices, see `exchange.KINDS`.
  """

  num_experts: int
  router: types.Router
  dispatcher: types.Dispatcher
  experts: types.Experts
  bound: types.Bound | None = None
  sequences: int = 1
  groups_per_sequence: int = 1
  balancers: tuple[tuple[str, types.Balancer], ...] = ()
  shared: types.Mlp | None = None
  latent: types.Mlp | None = None
  cheap: types.Mlp | None = None
  real_experts: float | None = None
  exchange: str = "all_to_all"

  @property
  def looking_ahead(self) -> list[str]:
    """Keys of the parts that let a token's output depend on the tokens after it."""
    found = [] if self.router.causal else ["router"]
    found += [f"balancers.{k}" for k, b in self.balancers if not b.causal]
    causal = self.dispatcher.causal(self.router.top_k, self.bound)
    return found if causal else [*found, "dispatcher"]

  @property
  def pool(self) -> int:
    """The number of experts that the router chooses from, with the cheap ones."""
    return self.num_experts + (self.cheap.width if self.cheap else 0)

  @property
  def experts_per_token(self) -> float:
    """Networks that a token passes on average, for counts of parameters."""
    router = self.router
    taken = router.average_k or router.top_k or self.pool
    if not self.cheap:
      return taken
    return self.real_experts or taken * self.num_experts / self.pool

  def row_width(self, d_model: int) -> int:
    """The width of the experts' rows.

    Args:
      d_model: D.
    """
    return self.latent.width if self.latent else d_model


def moe_ffn(
  recipe: Recipe,
  params: Mapping[str, Mapping[str, Array]],
  balance: Mapping[str, Mapping[str, Array]],
  x_GTD: Array,
  side: Side,
  rng_G: Array | None = None,
  *,
  mesh: Mesh | None = None,
  collect: str | None = None,
) -> tuple[Array, Stats, dict]:
  """y_t = sum over the experts e chosen for t of w_te * expert_e(x_t).

  Args:
    recipe: the parts.
    params: {"router": ..., "experts": ..., and of those that the recipe has
      "shared": ..., "latent": ..., "cheap": ...}; and "unreduced" where
      the gradients of experts are added up later, see `reduction`.
    balance: {balancer label: its state}; only read.
    x_GTD: tokens in groups.
    side: mask and per-token features, [G, T].
    rng_G: one key per group, for noise in router and experts; None: no noise.
    mesh: from `parallel.make_mesh`, or the same with explicit axes; G divides
      over its axes of tokens, and the numbers are those of a single device.
      None: one device.
    collect: "routing" also returns the router's choice, and for tokens that choose
      the probabilities of their experts as "score_TK", with a leading G.

  Returns:
    y_GTD in x's dtype; zero (plus the shared experts) for a token without a
      slot, which then passes through the residual alone. The values of padding
      reach no other token and no gradient.
    Stats with leading [G, S].
    The arrays that `collect` asks for.
  """
  specs = mesh and _specs(recipe, params, mesh)
  run = functools.partial(_moe_ffn, recipe, mesh, specs, collect)
  if mesh is not None:
    tokens, everywhere = jax.P(parallel.TOKENS), jax.P()
    run = parallel.shard_map(
      run,
      mesh,
      in_specs=(specs, everywhere, tokens, tokens, tokens),
      out_specs=tokens,
      check_vma=recipe.experts.checked or not recipe.dispatcher.ragged,
    )
  return run(params, balance, x_GTD, side, rng_G)


def _specs(recipe, params, mesh):
  """{part: how its parameters lie on a mesh}.

  Raises:
    ConfigError: the mesh has other axes than ours; experts, their buckets or
      their hidden width do not divide over it.
  """
  parallel.check_axes(mesh)
  if recipe.bound is not None:
    buckets = recipe.bound.expert_buckets
    parallel.check_widths(mesh, expert_buckets=(buckets, "expert"))
  specs = {"router": jax.P()}
  for name in ("experts", "shared", "latent", "cheap"):
    part = getattr(recipe, name)
    if part is not None and part.axes:
      shapes = {k: params[name][k].shape for k in part.axes}
      specs[name] = {
        k: parallel.spec(axes, shapes[k], mesh) for k, axes in part.axes.items()
      }
      for k, axes in part.axes.items():
        for axis, size in zip(axes, shapes[k]):
          if axis in ("expert", "mlp"):  # Parts of the sum over devices.
            width = {
              f'the axis "{axis}" of {name}': (size, *parallel.RULES[axis])
            }
            parallel.check_widths(mesh, **width)
  if reduction.NAME in params:
    axes = {k: reduction.axes_of(v) for k, v in recipe.experts.axes.items()}
    slots = params[reduction.NAME]
    specs[reduction.NAME] = {
      k: parallel.spec(axes[k], slots[k].shape, mesh) for k in axes
    }
  return specs


def _moe_ffn(recipe, mesh, specs, collect, params, balance, x_GTD, side, rng_G):
  """The body of `moe_ffn`, for all groups or those of a device of the mesh."""
  weights = functools.partial(exchange.read, params, specs, x_GTD.dtype)
  x_GTD = jnp.where(side.mask_T[..., None], x_GTD, 0)
  routing = route(recipe, params["router"], balance, x_GTD, side, rng_G)
  choice = pool.networks(routing.choice, recipe)
  plan = plans.make(choice, recipe, num_tokens=x_GTD.shape[1])
  into_GTD, out_of = _around(recipe, weights, x_GTD, mesh)
  rows, back = exchange.exchange(recipe, choice, plan, into_GTD, mesh)
  rng_GE = exchange.expert_keys(recipe.experts, rng_G, recipe.num_experts, mesh)
  with jax.named_scope("experts"):
    own = weights("experts", recipe.experts)
    rows = recipe.experts.apply(own, rows, rng_GE)
  y_GTD = out_of(back(rows))
  if recipe.cheap:
    y_GTD += pool.output(recipe, weights, routing.choice, x_GTD)
  stats = plans.report(recipe, routing, plan, side, balance)
  collected = {}
  if collect == "routing":
    collected = {"choice": routing.choice} | _scores(routing)
  return y_GTD, stats, collected


def _scores(routing):
  """{"score_TK": probabilities of the chosen experts}, where there are such."""
  if routing.prob_TE is None or not isinstance(routing.choice, TokenChoice):
    return {}
  expert_TK = routing.choice.expert_TK
  score_TK = jnp.take_along_axis(routing.prob_TE, expert_TK, axis=-1)
  return {"score_TK": score_TK}


def _around(recipe, weights, x_GTD, mesh):
  """The experts' input, and the function from their results to the layer's.

  The function adds the shared experts and sums over the shards of F. Latent experts
  are projected to their width here, and back there.
  """
  shared_GTD = entered_GTD = exchange.enter_tensor(x_GTD, mesh)
  if recipe.shared is not None:
    shared_GTD = recipe.shared.apply(
      weights("shared", recipe.shared), entered_GTD
    )

  def plain(y_GTD):
    if recipe.shared is not None:
      y_GTD += shared_GTD
    return exchange.sum_tensor(y_GTD, mesh)

  if recipe.latent is None:
    return entered_GTD, plain
  own = weights("latent", recipe.latent)
  into_GTD = recipe.latent.apply(own, "into", x_GTD)

  def projected(y_GTD):
    y_GTD = exchange.sum_tensor(y_GTD, mesh)
    y_GTD = recipe.latent.apply(own, "out_of", y_GTD)
    if recipe.shared is None:
      return y_GTD
    return y_GTD + exchange.sum_tensor(shared_GTD, mesh)

  return exchange.enter_tensor(into_GTD, mesh), projected


def route(recipe, params, balance, x_GTD, side, rng_G) -> types.Routing:
  """The router's decision, group by group.

  Args:
    recipe: the parts.
    params: of the router.
    balance: {balancer label: its state}; only read.
    x_GTD: tokens in groups.
    side: mask and per-token features, [G, T].
    rng_G: one key per group; None: no noise.

  Returns:
    A `Routing` with a leading G.

  Raises:
    ConfigError: a balancer has no state, or the router returned arrays of other
      shapes than it declares.
  """

  router, num_experts = recipe.router, recipe.pool

  def of_group(x_TD, side, rng):
    select = functools.partial(_selection, recipe, balance, side.mask_T)
    routing = router.route(
      params, x_TD, num_experts=num_experts, select=select, side=side, rng=rng
    )
    _check_routing(routing, router, T=len(x_TD), E=num_experts)
    return routing

  return jax.vmap(of_group)(x_GTD, side, rng_G)


def _selection(recipe, balance, mask_T, score_TE):
  """The scores that choose: shifted by one balancer after the other."""
  for label, balancer in recipe.balancers:
    if label not in balance:
      raise ConfigError(
        f'balance has no state of the balancer "{label}"; give {{"{label}":'
        " balancer.init(num_experts)}"
      )
    if balancer.select is not None:
      score_TE = balancer.select(balance[label], score_TE, mask_T)
  return score_TE


def _check_routing(routing, router, **sizes):
  """Raises ConfigError for arrays that do not have the shapes of their names.

  Args:
    routing: of one group.
    router: that made it.
    **sizes: of the axes, by their letter; the first array sets those not given.
  """
  part = router.spec.name if router.spec else "of this recipe"
  choice = getattr(routing, "choice", None)
  if not isinstance(choice, router.form):
    raise ConfigError(
      f'the router "{part}" returned {type(choice).__name__}, and declares that'
      f" its choices are of the form {router.form.__name__}"
    )
  if router.top_k is not None:
    sizes["K"] = router.top_k
  arrays = {k: x for k, x in vars(routing).items() if k.endswith("_TE")}
  for name, x in {**vars(choice), **arrays}.items():
    axes = name.rpartition("_")[2]
    if x is None or not axes.isupper():
      continue
    wanted = tuple(sizes.setdefault(k, n) for k, n in zip(axes, x.shape))
    if len(axes) != x.ndim or x.shape != wanted:
      known = ", ".join(f"{k} = {sizes.get(k)}" for k in axes)
      raise ConfigError(
        f'the router "{part}" returned {name} of shape {x.shape}, not'
        f" [{', '.join(axes)}] with {known}"
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
