"""Every router, balancer and dispatcher keeps the contract of its kind.

The files of `moe_jax/moe/{routers,balancers,dispatchers}` are found by themselves,
and so are those of the plugin folders in the environment variable
MOE_JAX_PLUGINS (separated as in PATH). A file may hold

  CONTRACT_OPTIONS = {...}: what its `build` is called with here.
  CONTRACT_EXCEPTIONS = {property: reason}: what it does not keep, and why;
    the properties are PROPERTIES below, and docs/extending.md explains them.
"""

import functools
import inspect
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import dispatchers, experts, layer, plans
from moe_jax.moe.types import (
  Bound,
  Mean,
  Mixture,
  Router,
  Routing,
  Side,
  SlotChoice,
  Stats,
  TokenChoice,
)

# All different, so that an axis is known by its length.
G, T, S, D, E, F = 2, 12, 3, 8, 6, 5
TIGHT, BUCKETS = Bound(2, E), Bound(5, 2)
# Parts of the tests, which show what a plugin can be, and those of the user.
OWN_PLUGINS = pathlib.Path(__file__).parent / "plugins"
PLUGINS = (
  *filter(None, os.environ.get("MOE_JAX_PLUGINS", "").split(os.pathsep)),
  str(OWN_PLUGINS),
)
PROPERTIES = {
  "routers": (
    "shapes",
    "weights",
    "extreme",
    "gradient",
    "expert_symmetry",
    "token_symmetry",
    "padding",
    "capacity",
    "causality",
    "groups",
    "one_trace",
  ),
  "dispatchers": (
    "layout",
    "padding",
    "capacity",
    "causality",
    "groups",
    "one_trace",
  ),
  "balancers": (
    "select",
    "update",
    "splitting",
    "empty",
    "loss",
    "uniform",
    "collapse",
  ),
}
DEFAULTS = {"top_k": 2, "coefficient": 1.0, "rate": 1e-3}
# More settings of a file, for what depends on the router alone.
VARIANTS = {
  "top_k": (
    {"top_k": 2, "score": "sigmoid", "renormalize": True, "scale": 2.5},
    {"top_k": 3, "score": "sqrt_softplus", "score_before_top_k": False},
    {"top_k": 2, "score_before_top_k": False, "apply_to": "input"},
    {"top_k": 2, "priority": "score", "renormalize": True},
    {"top_k": 2, "second_expert": "random", "jitter": 0.1, "noise": 0.1},
    {"top_k": 2, "cosine": True, "expert_scale": True, "use_bias": True},
    {"top_k": 2, "dtype": "bfloat16"},
  )
}
# More settings for what depends on the pair of router and dispatcher.
PAIRED = {"top_k": ({"top_k": 2, "priority": "score"},)}


# Settings under test.


def module_of(kind, name):
  return registry._module(kind, name, PLUGINS)


def options_of(kind, name):
  """CONTRACT_OPTIONS, or a default for each option that is needed."""
  module = module_of(kind, name)
  if hasattr(module, "CONTRACT_OPTIONS"):
    return dict(module.CONTRACT_OPTIONS)
  known = inspect.signature(module.build).parameters
  return {
    option: value
    for option, value in DEFAULTS.items()
    if option in known and known[option].default is inspect.Parameter.empty
  }


def keeps(kind, name, property_name):
  return property_name not in getattr(
    module_of(kind, name), "CONTRACT_EXCEPTIONS", {}
  )


def case(*values):
  """A pytest parameter whose name shows names and options."""

  def words(value):
    if isinstance(value, tuple):
      return "-".join(words(v) for v in value)
    return str(value)

  return pytest.param(*values, id="-".join(words(v) for v in values))


def parts(kind, property_name, more=None):
  """(name, options) of all files that keep a property, as parameters."""
  found = []
  for name in registry.names(kind, PLUGINS):
    if not keeps(kind, name, property_name):
      continue
    variants = [options_of(kind, name)]
    if name not in _plugin_names(kind):
      variants += (more or {}).get(name, ())
    found += [case(name, tuple(sorted(v.items()))) for v in variants]
  return found


def _plugin_names(kind):
  return {n for f in PLUGINS for n in registry.names(kind, (f,))} - set(
    registry.names(kind)
  )


def layouts(property_name):
  """(dispatcher, options, bound): each order, each bound it can hold."""
  found = []
  for name in registry.names("dispatchers", PLUGINS):
    if not keeps("dispatchers", name, property_name):
      continue
    base = options_of("dispatchers", name)
    known = inspect.signature(module_of("dispatchers", name).build).parameters
    orders = dispatchers.ORDERS if "order" in known else (None,)
    for order in orders:
      options = base if order is None else base | {"order": order}
      options = tuple(sorted(options.items()))
      dispatcher = load("dispatchers", name, options)
      for bound in (TIGHT, BUCKETS):
        if holds(dispatcher, bound):
          found.append((name, options, bound))
  return found


@functools.cache
def holds(dispatcher, bound):
  """Whether a dispatcher can lay out under such a bound."""
  recipe = layer.Recipe(E, None, dispatcher, None, bound)
  try:
    jax.eval_shape(lambda c: plans.make(c, recipe, T), any_choice(0))
  except ConfigError:
    return False
  return True


def pairs(property_name):
  """Router and layout, for all that keep the property both."""
  return [
    case(*router.values, *layout)
    for router in parts("routers", property_name, PAIRED)
    # Dispatchers lay out token choices only; other routers need one layout.
    for layout in layouts(property_name)[
      : None if lays_out(*router.values) else 1
    ]
  ]


@functools.cache
def lays_out(name, options):
  """Whether a dispatcher lays out the choices of a router."""
  return isinstance(shape_of_routing(name, options).choice, TokenChoice)


@functools.cache
def shape_of_routing(name, options, dtype=np.float32):
  """The shapes of a router's decision for all groups."""
  router = load("routers", name, options)
  params = jax.eval_shape(lambda: router.init(jax.random.key(0), D, E))
  return jax.eval_shape(
    functools.partial(layer.route, layer.Recipe(E, router, None, None)),
    params,
    {},
    tokens(0)["x"].astype(dtype),
    side_of(tokens(0)),
    None,
  )


def load(kind, name, options):
  return registry.load(kind, name, plugins=PLUGINS, **dict(options))


# Comparisons.


def leaves(tree):
  """(name, array) of every leaf, with names such as stats.extra.margin."""
  return [
    (jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def same(got, want, words, rtol=1e-7, atol=1e-6):
  """Two trees are equal; else the message names the leaves that are not.

  Args:
    got, want: of one structure.
    words: what is wrong with a leaf that differs.
    rtol, atol: as in numpy.testing.assert_allclose.
  """
  assert jax.tree.structure(got) == jax.tree.structure(want)
  wrong = []
  for (name, a), (_, b) in zip(leaves(got), leaves(want), strict=True):
    assert a.shape == b.shape, f"{name} has shape {a.shape}, and not {b.shape}"
    if not np.allclose(a, b, rtol, atol, equal_nan=True):
      most = abs(a.astype(float) - b.astype(float)).max()
      wrong.append(f"{name} {words} (by up to {most:.2g})")
  assert not wrong, "; ".join(wrong)


def test_a_difference_is_named_by_its_leaf():
  one = {"y": np.zeros(2), "stats": random_stats(0)}
  other = {"y": np.full(2, 1e-7), "stats": random_stats(0)}
  same(one, other, "differs")
  extra = {"margin": np.array([1.0, 2.0]), "fine": np.zeros(3)}
  one["stats"] = one["stats"].replace(extra=extra)
  other["stats"] = other["stats"].replace(
    extra=extra | {"margin": np.array([1.0, 2.5])}
  )
  text = r"^stats.extra.margin changes \(by up to 0.5\)"
  with pytest.raises(AssertionError, match=text):
    same(one, other, "changes")
  with pytest.raises(AssertionError, match="^y has shape"):
    same({"y": np.zeros(2)}, {"y": np.zeros((1, 2))}, "changes")


def check_finite(tree, words=""):
  for name, leaf in leaves(tree):
    assert np.isfinite(leaf).all(), f"{name} is not finite {words}"


# Inputs.


def tokens(seed, skew=0.0, padded=0.25):
  """x, mask, and features, all [G, T, ...]; skew draws them to few experts."""
  rng = np.random.default_rng(seed)
  towards_D = np.random.default_rng(99).normal(size=D)
  x_GTD = rng.normal(size=(G, T, D)) + skew * towards_D
  return {
    "x": x_GTD.astype(np.float32),
    "mask": rng.random((G, T)) >= padded,
    "token_id": rng.integers(0, 1000, (G, T)).astype(np.int32),
    "position": np.tile(np.arange(T, dtype=np.int32), (G, 1)),
  }


def side_of(tokens):
  features = {k: tokens[k] for k in ("token_id", "position")}
  return Side(tokens["mask"], features)


def where(mask_GT, these, those):
  """Tokens of the one where the mask says so, of the other elsewhere."""
  return jax.tree.map(
    lambda a, b: np.where(mask_GT.reshape(G, T, *[1] * (a.ndim - 2)), a, b),
    these,
    those,
  )


def permuted(tokens, order_GT):
  return jax.tree.map(
    lambda a: np.stack([row[o] for row, o in zip(a, order_GT)]), tokens
  )


def any_choice(seed, top_k=2, groups=G, weight_input=False):
  """Valid decisions of no router in particular."""
  rng = np.random.default_rng(seed)
  expert = rng.permuted(np.tile(np.arange(E), (groups, T, 1)), axis=-1)
  return TokenChoice(
    expert_TK=expert[..., :top_k].astype(np.int32),
    weight_TK=rng.random((groups, T, top_k)).astype(np.float32),
    valid_TK=rng.random((groups, T, top_k)) < 0.8,
    weight_input=weight_input,
  )


# Routers alone.


@functools.cache
def router_program(name, options):
  """params and the jitted (params, tokens, keys or None) -> Routing."""
  router = load("routers", name, options)
  params = router.init(jax.random.key(0), D, E)
  params = jax.tree.map(lambda w: np.asarray(w) * 2, params)

  @jax.jit
  def run(params, tokens, rng_G):
    recipe = layer.Recipe(E, router, None, None)
    side = side_of(tokens)
    return layer.route(recipe, params, {}, tokens["x"], side, rng_G)

  return params, run


def keys(seed=0):
  return layer.group_keys(jax.random.key(seed), G)


@pytest.mark.parametrize("name,options", parts("routers", "shapes", VARIANTS))
def test_router_shapes(name, options):
  router = load("routers", name, options)
  params, _ = router_program(name, options)
  assert set(params) == set(router.axes)
  for leaf, names in router.axes.items():
    assert params[leaf].ndim == len(names)
  for dtype in (np.float32, jnp.bfloat16):
    routing = shape_of_routing(name, options, dtype)
    check_shapes(routing.choice, router.top_k)
    for field in ("prob_TE", "logits_TE"):
      value = getattr(routing, field)
      if value is not None:
        assert value.shape == (G, T, E) and value.dtype == np.float32, field


def check_shapes(choice, top_k):
  """Every array of a choice has the axes of its name, and its dtype."""
  if isinstance(choice, TokenChoice):
    sizes = {"T": T, "E": E, "K": top_k}
  elif isinstance(choice, SlotChoice):
    sizes = {"T": T, "E": E, "C": choice.token_EC.shape[-1]}
  else:
    sizes = {"T": T, "E": E, "C": choice.dispatch_TEC.shape[-1]}
  dtypes = {"expert": np.int32, "token": np.int32, "valid": bool}
  for field, value in vars(choice).items():
    if field == "priority_TK" and value is None or field == "weight_input":
      continue
    name, axes = field.split("_")
    assert value.shape == (G, *(sizes[a] for a in axes)), field
    assert value.dtype == dtypes.get(name, np.float32), field


@pytest.mark.parametrize("name,options", parts("routers", "shapes", VARIANTS))
def test_router_scores(name, options):
  """A router returns the scores that it gives to balancers."""
  router, seen = load("routers", name, options), []
  these = jax.tree.map(lambda a: a[0], tokens(0))

  def select(score_TE):
    seen.append(np.asarray(score_TE, np.float32))
    return score_TE

  routing = router.route(
    *(router_program(name, options)[0], jnp.asarray(these["x"])),
    num_experts=E,
    select=select,
    side=jax.tree.map(jnp.asarray, side_of(these)),
    rng=None,
  )
  assert bool(seen) == ("selection" in router.gives)
  if seen and name not in _plugin_names("routers"):
    np.testing.assert_array_equal(routing.score_TE, seen[0])
    if "score_range" in router.gives:
      assert seen[0].min() >= 0 and seen[0].max() <= 1


def check_decision(routing, mask_GT):
  choice = routing.choice
  if isinstance(choice, TokenChoice):
    check_numbers(choice.expert_TK, E, axis=-1)
    valid, weight = choice.valid_TK, choice.weight_TK
    assert not valid[~mask_GT].any() and valid[mask_GT].any()
  elif isinstance(choice, SlotChoice):
    check_numbers(choice.token_EC, T, axis=-1)
    valid, weight = choice.valid_EC, choice.weight_EC
    real = np.take_along_axis(mask_GT[:, None], choice.token_EC, axis=-1)
    assert not valid[~real].any() and valid.any()
  else:
    weight = np.concatenate([choice.dispatch_TEC, choice.combine_TEC], -1)
    assert (weight[~mask_GT] == 0).all()
  assert np.isfinite(weight).all() and (weight >= 0).all()
  if routing.prob_TE is not None:
    assert (routing.prob_TE >= 0).all()
    np.testing.assert_allclose(routing.prob_TE.sum(-1), 1, atol=1e-5)


def check_numbers(number, below, axis):
  """Numbers are in range, and none is there twice."""
  assert (number >= 0).all() and (number < below).all()
  assert (np.diff(np.sort(number, axis), axis=axis) > 0).all(), "chosen twice"


@pytest.mark.parametrize("name,options", parts("routers", "weights", VARIANTS))
def test_router_weights(name, options):
  params, run = router_program(name, options)
  for seed in range(3):
    tokens_ = tokens(seed, skew=seed)
    for rng_G in (None, keys(seed)):
      routing = jax.device_get(run(params, tokens_, rng_G))
      check_decision(routing, tokens_["mask"])


@functools.cache
def router_gradient(name, options):
  """Jitted gradients of a projection of the weights, and of all outputs."""
  router = load("routers", name, options)

  def project(params, tokens):
    recipe = layer.Recipe(E, router, None, None)
    side = side_of(tokens)
    routing = layer.route(recipe, params, {}, tokens["x"], side, None)
    total = weights = sum(map(projection, weights_of(routing.choice)))
    if routing.prob_TE is not None:
      total += (routing.prob_TE**2).sum()
    if routing.logits_TE is not None:
      total += (jax.nn.logsumexp(routing.logits_TE, axis=-1) ** 2).sum()
    return weights, total

  def gradients(params, tokens):
    return [
      jax.grad(lambda params: project(params, tokens)[i])(params)  # noqa: B023
      for i in (0, 1)
    ]

  run = jax.jit(gradients)
  return lambda params, tokens: jax.device_get(run(params, tokens))


def weights_of(choice):
  """The weights that an expert's work is multiplied by."""
  if isinstance(choice, TokenChoice):
    return [jnp.where(choice.valid_TK, choice.weight_TK, 0)]
  if isinstance(choice, SlotChoice):
    return [jnp.where(choice.valid_EC, choice.weight_EC, 0)]
  return [choice.dispatch_TEC, choice.combine_TEC]


def projection(array):
  """A sum with random factors."""
  return (np.random.default_rng(7).normal(size=array.shape) * array).sum()


@pytest.mark.parametrize("name,options", parts("routers", "gradient", VARIANTS))
def test_router_gradient(name, options):
  """The weights alone carry a gradient to every parameter."""
  params, _ = router_program(name, options)
  # That of the weights, and that of all outputs.
  gradients = router_gradient(name, options)(params, tokens(0))
  assert jax.tree.leaves(gradients)
  check_finite(gradients)
  for gradient in gradients:
    for parameter, leaf in leaves(gradient):
      assert abs(leaf).max() > 1e-4, f"{parameter} gets no gradient"


@pytest.mark.parametrize("name,options", parts("routers", "extreme", VARIANTS))
def test_router_extremes(name, options):
  """Zero inputs tie all experts; large ones saturate every score."""
  params, run = router_program(name, options)
  for size in (0.0, 30.0, 1000.0):
    tokens_ = tokens(1)
    tokens_["x"] = tokens_["x"] * np.float32(size)
    routing = jax.device_get(run(params, tokens_, None))
    check_decision(routing, tokens_["mask"])
    gradients = router_gradient(name, options)(params, tokens_)
    check_finite(gradients, f"for inputs of size {size}")


@pytest.mark.parametrize(
  "name,options", parts("routers", "expert_symmetry", VARIANTS)
)
def test_router_expert_symmetry(name, options):
  """Experts that are renumbered are chosen under their new numbers."""
  params, run = router_program(name, options)
  order_E = np.array([3, 0, 5, 1, 4, 2])  # New expert i is the old order[i].
  renumbered = jax.tree.map(
    lambda w: functools.reduce(
      lambda w, axis: np.take(w, order_E, axis) if w.shape[axis] == E else w,
      range(w.ndim),
      w,
    ),
    params,
  )
  for seed in range(3):
    before, after = jax.device_get(
      [run(p, tokens(seed), None) for p in (params, renumbered)]
    )
    check_renumbered(after.choice, before.choice, order_E)
    if before.prob_TE is not None:
      want = {"prob_TE": before.prob_TE[..., order_E]}
      same({"prob_TE": after.prob_TE}, want, NUMBERED)


NUMBERED = "depends on the numbers of the experts"


def check_renumbered(after, before, order_E):
  """The same decision, with expert i for what was expert order[i]."""
  if isinstance(before, TokenChoice):
    after = after.replace(expert_TK=order_E[after.expert_TK])
  else:
    axis = 1 if isinstance(before, SlotChoice) else 2
    before = jax.tree.map(lambda a: np.take(a, order_E, axis), before)
  same(after, before, NUMBERED)


@pytest.mark.parametrize(
  "name,options", parts("routers", "token_symmetry", VARIANTS)
)
def test_router_token_symmetry(name, options):
  """A token's experts do not depend on where in its group it stands."""
  params, run = router_program(name, options)
  order_GT = np.stack([np.random.default_rng(g).permutation(T) for g in (1, 2)])
  for seed in range(3):
    before, after = tokens(seed), permuted(tokens(seed), order_GT)
    before, after = jax.device_get(
      [run(params, t, None) for t in (before, after)]
    )
    placed = "depends on a token's place in its group"
    if before.prob_TE is not None:
      want = {"prob_TE": permuted(before.prob_TE, order_GT)}
      same({"prob_TE": after.prob_TE}, want, placed)
    if isinstance(before.choice, SlotChoice):
      # New token i is the old token order[i].
      token_EC = [order_GT[g][after.choice.token_EC[g]] for g in range(G)]
      choice = after.choice.replace(token_EC=np.stack(token_EC))
      same(choice, before.choice, placed)
      continue
    same(after.choice, permuted(before.choice, order_GT), placed)


@pytest.mark.parametrize("name,options", parts("routers", "groups", VARIANTS))
def test_router_groups(name, options):
  """All groups at once choose as they do one by one, with noise too."""
  router = load("routers", name, options)
  params, run = router_program(name, options)
  tokens_ = tokens(0)

  @jax.jit
  def route_one(tokens, rng):
    return router.route(
      params,
      tokens["x"],
      num_experts=E,
      select=lambda score_TE: score_TE,
      side=side_of(tokens),
      rng=rng,
    )

  together = jax.device_get(run(params, tokens_, keys()))
  for g in range(G):
    alone = route_one(jax.tree.map(lambda a, g=g: a[g], tokens_), keys()[g])
    alone = jax.device_get(alone)
    part = jax.tree.map(lambda a, g=g: a[g], together)
    # Logits may be large, and a dot product rounds relative to its terms.
    scale = jax.tree.map(lambda a: max(1, np.abs(a).max()), alone)
    part, alone = (
      jax.tree.map(np.divide, tree, scale) for tree in (part, alone)
    )
    same(part, alone, "differs from that of the group alone", rtol=0)


# Routers and dispatchers in the layer.


class Program:
  """The layer of a router and a layout: first the one, then the other.

  The two are jitted apart, so that all routers share a layout's program.
  """

  def __init__(self, router, router_options, dispatcher, options, bound):
    self.recipe = layer.Recipe(
      num_experts=E,
      router=load("routers", router, router_options),
      dispatcher=load("dispatchers", dispatcher, options),
      experts=experts.build(F, "gelu"),
      bound=bound,
      sequences=S,
    )
    self.params, self.route = router_program(router, router_options)
    self.shapes = shape_of_routing(router, router_options)
    self.lay_out = layout_program(dispatcher, options, bound)

  def __call__(self, tokens):
    routing = self.route(self.params, tokens, None)
    if routing.logits_TE is None:
      routing = routing.replace(logits_TE=jnp.zeros((G, T, E)))
    return jax.device_get(self.lay_out(routing, tokens))


@functools.cache
def layout_program(dispatcher, options, bound):
  """The jitted (Routing, tokens) -> y, Stats."""
  rng = np.random.default_rng(3)
  params = {
    "router": {},
    "experts": {
      "up": rng.normal(size=(E, D, F)).astype(np.float32),
      "down": rng.normal(size=(E, F, D)).astype(np.float32),
    },
  }

  @jax.jit
  def run(routing, tokens):
    expert_TK = getattr(routing.choice, "expert_TK", np.zeros((1, 2)))
    repeat = Router(
      init=None,
      axes={},
      route=lambda params, x_TD, *, side, **_: side.features["routing"],
      causal=True,
      top_k=expert_TK.shape[-1],
      form=type(routing.choice),
    )
    recipe = layer.Recipe(
      num_experts=E,
      router=repeat,
      dispatcher=load("dispatchers", dispatcher, options),
      experts=experts.build(F, "gelu"),
      bound=bound,
      sequences=S,
    )
    side = Side(tokens["mask"], {"routing": routing})
    return layer.moe_ffn(recipe, params, {}, tokens["x"], side)[:2]

  return run


program = functools.cache(Program)
PAIR = "router,router_options,dispatcher,options,bound"


def close(got, want, words):
  """What a layer returned twice, (y, stats), is the same but for rounding."""
  got, want = (dict(zip(("y", "stats"), pair)) for pair in (got, want))
  same(got, want, words, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(PAIR, pairs("padding"))
def test_padding(router, router_options, dispatcher, options, bound):
  """It takes no slot, gets no output, and what it holds changes nothing."""
  run = program(router, router_options, dispatcher, options, bound)
  movable = keeps("routers", router, "token_symmetry")
  for seed in range(3):
    tokens_ = tokens(seed, skew=1.0, padded=0.5)
    mask_GT = tokens_["mask"]
    y_GTD, stats = run(tokens_)
    assert (y_GTD[~mask_GT] == 0).all()
    np.testing.assert_array_equal(
      stats.tokens, mask_GT.reshape(G, S, -1).sum(-1)
    )
    top_k = run.recipe.router.top_k or E
    mixed = isinstance(run.shapes.choice, Mixture)  # Shares of slots.
    assert mixed or (stats.count_E.sum(-1) <= top_k * stats.tokens).all()

    other = tokens(seed + 100, skew=-5.0) | {"mask": mask_GT}
    filled = where(mask_GT, tokens_, other)
    close(run(filled), (y_GTD, stats), "changes with what padding holds")

    if movable:
      # Behind all other tokens instead of among them.
      order_GT = np.argsort(~mask_GT, axis=1, kind="stable")
      moved_GTD, moved_stats = run(permuted(tokens_, order_GT))
      kept_GE, moved_GE = (s.kept_E.sum(1) for s in (stats, moved_stats))
      before = permuted(y_GTD, order_GT), {"kept_E": kept_GE}
      moved = moved_GTD, {"kept_E": moved_GE}
      close(moved, before, "changes with the place of padding")


@pytest.mark.parametrize(PAIR, pairs("capacity"))
def test_capacity(router, router_options, dispatcher, options, bound):
  """No bucket receives more than its slots, nor less than it could."""
  run = program(router, router_options, dispatcher, options, bound)
  full = 0
  if not lays_out(router, router_options):
    return check_slots(run)
  for seed in range(5):
    _, stats = run(tokens(seed, skew=seed / 2, padded=0.1))
    count_GB = stats.count_E.sum(1).reshape(G, bound.expert_buckets, -1).sum(-1)
    kept_GE = stats.kept_E.sum(1)
    kept_GB = kept_GE.reshape(G, bound.expert_buckets, -1).sum(-1)
    np.testing.assert_array_equal(kept_GB, np.minimum(count_GB, bound.slots))
    assert (stats.kept_E <= stats.count_E).all()
    cause = "capacity" if bound.expert_buckets == E else "buffer"
    dropped_GS = (stats.count_E - stats.kept_E).sum(-1)
    np.testing.assert_array_equal(stats.dropped[cause], dropped_GS)
    unrouted_GS = stats.dropped["unrouted"]
    total_GS = stats.count_E.sum(-1) + unrouted_GS
    top_k = run.recipe.router.top_k
    np.testing.assert_array_equal(total_GS, top_k * stats.tokens)
    full += (kept_GB == bound.slots).sum()
  assert full > 0


def check_slots(run):
  """Experts that name their tokens, or mix them, have as many slots each."""
  slots = jax.tree.leaves(run.shapes.choice)[0].shape[-1]
  for seed in range(10):
    padded = 0.1 * (seed % 2)
    _, stats = run(tokens(seed, skew=seed / 4, padded=padded))
    kept_GE = stats.kept_E.sum(1)
    assert (kept_GE <= slots + 1e-5).all()
    assert (
      padded or kept_GE.max() > slots - 1
    )  # With padding there is less to take.
    assert all((n == 0).all() for n in stats.dropped.values())


def changes(run, draws):
  """Change of y by new tokens behind a cut: before the cut, and behind it.

  Both are arrays with the largest change in each draw.
  """
  before, behind = [], []
  for seed in range(draws):
    these, others = tokens(seed, skew=0.3), tokens(seed + 100, skew=0.3)
    early_GT = np.broadcast_to(np.arange(T) < (4, 8)[seed % 2], (G, T))
    change_GT = run(these)[0] - run(where(early_GT, these, others))[0]
    change_GT = abs(change_GT).max(-1)
    before.append(change_GT[early_GT].max())
    behind.append(change_GT[~early_GT].max())
  return np.array(before), np.array(behind)


@pytest.mark.parametrize(PAIR, pairs("causality"))
def test_causality(router, router_options, dispatcher, options, bound):
  """A causal layer ignores later tokens; any other sees them in some draw."""
  run = program(router, router_options, dispatcher, options, bound)
  before, behind = changes(run, draws=20)
  assert (behind > 1e-2).any()
  if not run.recipe.looking_ahead:
    assert (before < 1e-4).all()
  elif router != "random" or ("order", "choice") in options:
    # Weights that are all equal put nobody before others.
    assert (before > 1e-2).any()


@pytest.mark.parametrize(PAIR, pairs("groups"))
def test_groups(router, router_options, dispatcher, options, bound):
  """A group's result is its own: the same beside any other, in any place."""
  run = program(router, router_options, dispatcher, options, bound)
  these = tokens(0, skew=0.5)
  twice = jax.tree.map(lambda a: np.stack([a[0], a[0]]), these)
  swapped = jax.tree.map(lambda a: a[::-1], these)
  first = lambda result: jax.tree.map(lambda a: a[0], result)  # noqa: E731
  last = lambda result: jax.tree.map(lambda a: a[1], result)  # noqa: E731
  words = "of a group changes with other groups"
  close(first(run(these)), first(run(twice)), words)
  close(first(run(these)), last(run(twice)), words)
  close(first(run(these)), last(run(swapped)), words)


@pytest.mark.parametrize(PAIR, pairs("one_trace"))
def test_one_trace(router, router_options, dispatcher, options, bound):
  """Whatever the loads, there is one program."""
  run = program(router, router_options, dispatcher, options, bound)
  run(tokens(0))
  traces = run.route._cache_size(), run.lay_out._cache_size()
  for skew, padded in ((0.0, 0.0), (5.0, 0.0), (0.0, 1.0)):
    y_GTD, stats = run(tokens(0, skew, padded))
    check_finite({"y": y_GTD, "stats": stats}, f"with {padded:.0%} of padding")
  assert traces == (run.route._cache_size(), run.lay_out._cache_size())


@pytest.mark.parametrize("dispatcher", ["gather", "sorted"])
def test_one_choice_is_causal(dispatcher):
  """Switch's order of slots does not matter."""
  options = (("order", "choice"),)
  run = program("top_k", (("top_k", 1),), dispatcher, options, TIGHT)
  assert not run.recipe.looking_ahead
  before, _ = changes(run, draws=10)
  assert (before < 1e-4).all()


# Dispatchers alone.


@pytest.mark.parametrize(
  "name,options,bound", [case(*layout) for layout in layouts("layout")]
)
def test_layout(name, options, bound):
  """y = sum of w x over the kept choices, if experts are the identity."""
  dispatcher = load("dispatchers", name, options)

  @jax.jit
  def run(choices, x_GTD):
    results = []
    for choice in choices:
      plan = dispatcher.plan(choice, E, bound)
      rows = plan.dispatch(x_GTD)
      results.append((rows, plan.combine(rows), plan.kept_GTK))
    return results

  for seed in range(3):
    x_GTD = tokens(seed)["x"]
    choices = [any_choice(seed, weight_input=w) for w in (False, True)]
    results = jax.device_get(run(choices, x_GTD))
    for choice, result in zip(choices, results, strict=True):
      check_layout(dispatcher, bound, choice, x_GTD, *result)


def check_layout(dispatcher, bound, choice, x_GTD, rows, y_GTD, kept_GTK):
  assert not kept_GTK[~choice.valid_TK].any() and kept_GTK.any()
  weight_GT = np.where(kept_GTK, choice.weight_TK, 0).sum(-1)
  np.testing.assert_allclose(y_GTD, weight_GT[..., None] * x_GTD, atol=1e-5)
  kept_GE = np.zeros((G, E), int)
  np.add.at(kept_GE, (np.arange(G)[:, None, None], choice.expert_TK), kept_GTK)
  assert (rows.tokens_per_expert_GE is not None) == dispatcher.ragged
  if dispatcher.ragged:
    np.testing.assert_array_equal(rows.tokens_per_expert_GE, kept_GE)
    check_rows(rows, x_GTD, choice, kept_GTK)
  else:
    assert rows.x.shape == (G, E, bound.slots, D)
    filled_GE = (rows.x != 0).any(-1).sum(-1)
    np.testing.assert_array_equal(filled_GE, kept_GE)


def check_rows(rows, x_GTD, choice, kept_GTK):
  """Rows stand by expert, and inside an expert by group."""
  row = 0
  for e in range(E):
    for g in range(G):
      here_TK = (choice.expert_TK[g] == e) & kept_GTK[g]
      weight_T = (here_TK * choice.weight_TK[g]).sum(1)
      want = x_GTD[g] * (weight_T[:, None] if choice.weight_input else 1)
      want = want[here_TK.any(1)]
      mine = rows.x[row : row + len(want)]
      np.testing.assert_allclose(
        mine[np.argsort(mine[:, 0])],
        want[np.argsort(want[:, 0])],
        rtol=1e-6,
      )
      row += len(want)
  assert (rows.x[row:] == 0).all()


@pytest.mark.parametrize(
  "name,options,bound",
  # The first order and bound of each dispatcher.
  [case(*v) for v in {v[0]: v for v in layouts("groups")[::-1]}.values()],
)
def test_one_group_alone(name, options, bound):
  """A program of one group gives what the program of all groups gives."""
  run = layout_program(name, options, bound)
  tokens_ = tokens(0)
  routing = Routing(
    any_choice(0),
    prob_TE=np.full((G, T, E), 1 / E, np.float32),
    logits_TE=np.zeros((G, T, E), np.float32),
  )
  together = jax.device_get(run(routing, tokens_))
  for g in range(G):
    one = functools.partial(jax.tree.map, lambda a, g=g: a[g : g + 1])
    alone = jax.device_get(run(one(routing), one(tokens_)))
    close(one(together), alone, "differs from that of the group alone")


# Balancers.

K, TOKENS = 2, 12  # Tokens of a sequence; E, 3 and 2 divide K * TOKENS.


def stats_of(count_GSE, prob_GSE, tokens_GS, z_GS=None) -> Stats:
  count_GSE = np.asarray(count_GSE, np.int32)
  zeros_GS = np.zeros(count_GSE.shape[:2], np.float32)
  return Stats(
    tokens=np.asarray(tokens_GS, np.int32),
    count_E=count_GSE,
    first_choice_E=count_GSE // K,
    kept_E=count_GSE,
    weight_E=np.asarray(prob_GSE, np.float32),
    dropped={
      cause: np.zeros(count_GSE.shape[:2], np.int32)
      for cause in ("capacity", "buffer", "unrouted")
    },
    confidence=zeros_GS,
    prob_E=np.asarray(prob_GSE, np.float32),
    z=zeros_GS if z_GS is None else np.asarray(z_GS, np.float32),
    entropy=zeros_GS,
  )


def even_stats(experts_used=E) -> Stats:
  """All sequences alike, evenly over the first experts; one is empty."""
  share_E = (np.arange(E) < experts_used) / experts_used
  tokens_GS = np.full((G, S), TOKENS)
  tokens_GS[1, 2] = 0
  count_GSE = tokens_GS[..., None] * share_E * K
  return stats_of(
    np.round(count_GSE), tokens_GS[..., None] * share_E, tokens_GS
  )


def random_stats(seed) -> Stats:
  rng = np.random.default_rng(seed)
  expert = rng.random((G, S, TOKENS, E)) ** 2
  expert = (expert + np.linspace(0, 0.5, E)).argsort(-1)[..., :K]
  count_GSE = (expert[..., None] == np.arange(E)).sum((2, 3))
  prob_GSE = rng.dirichlet(np.ones(E), (G, S)) * TOKENS
  z_GS = rng.random((G, S)) * TOKENS
  return stats_of(count_GSE, prob_GSE, np.full((G, S), TOKENS), z_GS)


def observed(balancer, seed, state=None) -> Stats:
  """Random statistics, with what the balancer observes of random scores."""
  stats = random_stats(seed)
  if balancer.observe is None:
    return stats
  rng = np.random.default_rng(seed)
  sums = []
  for _ in range(G):
    prob_TE = rng.dirichlet(np.ones(E), T).astype(np.float32)
    choice = jax.tree.map(lambda a: a[0], any_choice(seed, groups=1))
    routing = Routing(
      choice,
      prob_TE=prob_TE,
      logits_TE=np.log(prob_TE),
      chance_TE=rng.random((T, E)).astype(np.float32),
      score_TE=rng.random((T, E)).astype(np.float32),
    )
    mask_T = rng.random(T) < 0.8
    sums.append(
      balancer.observe(state or balancer.init(E), routing, jnp.asarray(mask_T))
    )
  # The layer gives sums by group, with one entry for all sequences.
  of_groups = jax.tree.map(lambda *a: np.stack(a)[:, None], *sums)
  whole = jax.tree.map(lambda a: a.sum(0, keepdims=True), of_groups)
  spread = jax.tree.map(
    lambda a: (
      np.concatenate([a, np.zeros((G - 1, 1, *a.shape[2:]), a.dtype)]).repeat(
        S, axis=1
      )
      * (np.arange(S) == 0).reshape(1, S, *[1] * (a.ndim - 2))
    ),
    whole,
  )
  return stats.replace(observed=spread)


def value(balancer, stats, so_far_E=None):
  """The loss as a number, jitted."""
  so_far_E = np.zeros(E, np.int32) if so_far_E is None else so_far_E
  loss = jax.jit(balancer.loss)(balancer.init(E), stats, so_far_E, {})
  assert isinstance(loss, Mean)
  assert np.shape(loss.total) == np.shape(loss.weight) == ()
  assert float(loss.weight) >= 0
  return float(loss.value())


def losses(property_name):
  """Every balancer that adds a loss, in each of its scopes and counts."""
  found = []
  for name in registry.names("balancers", PLUGINS):
    if not keeps("balancers", name, property_name):
      continue
    base = options_of("balancers", name)
    if load("balancers", name, base.items()).loss is None:
      continue
    module = module_of("balancers", name)
    known = inspect.signature(module.build).parameters
    scopes = getattr(module, "SCOPES", (None,)) if "scope" in known else (None,)
    for scope in scopes:
      options = base if scope is None else base | {"scope": scope}
      found.append(case(name, tuple(sorted(options.items()))))
    if "count" in known and name not in _plugin_names("balancers"):
      options = base | {"count": "first", "scope": "group"}
      found.append(case(name, tuple(sorted(options.items()))))
  return found


SELECTING = [
  p
  for p in parts("balancers", "select")
  if load("balancers", *p.values).select is not None
]


@pytest.mark.parametrize("name,options", SELECTING)
def test_balancer_select(name, options):
  """It gives scores of the same shape and dtype, and leaves the state alone."""
  balancer = load("balancers", name, options)
  state = balancer.update(balancer.init(E), observed(balancer, 0), 0)
  before = jax.tree.map(np.array, state)
  for dtype in (np.float32, jnp.bfloat16):
    score_TE = jnp.asarray(tokens(0)["x"][0][:, :E], dtype)
    selection_TE = balancer.select(state, score_TE, jnp.ones(T, bool))
    assert selection_TE.shape == score_TE.shape
    assert selection_TE.dtype == score_TE.dtype
    assert jnp.isfinite(selection_TE).all()
  same(state, before, "of the state is changed by select", rtol=0, atol=0)


@pytest.mark.parametrize("name,options", parts("balancers", "update"))
def test_balancer_update(name, options):
  """The state keeps its shape and stays finite, without any token too."""
  balancer = load("balancers", name, options)
  update = jax.jit(balancer.update)
  first = state = balancer.init(E)
  empty = jax.tree.map(np.zeros_like, observed(balancer, 0))
  for step in range(5):
    stats = empty if step == 3 else observed(balancer, step)
    state = update(state, stats, step)
    assert jax.tree.structure(state) == jax.tree.structure(first)
    for (leaf, a), (_, b) in zip(leaves(state), leaves(first), strict=True):
      assert a.shape == b.shape and a.dtype == b.dtype, leaf
    check_finite(state, f"after step {step}")


@pytest.mark.parametrize("name,options", parts("balancers", "splitting"))
def test_balancer_splitting(name, options):
  """A state depends on the sums of a step, not on how groups share them."""
  balancer = load("balancers", name, options)
  state = balancer.update(balancer.init(E), observed(balancer, 0), 0)
  stats = observed(balancer, 1)
  want = balancer.update(state, stats, 1)
  flat = jax.tree.map(lambda a: a.reshape(1, G * S, *a.shape[2:]), stats)
  tall = jax.tree.map(lambda a: a.reshape(G * S, 1, *a.shape[2:]), stats)
  whole = jax.tree.map(lambda a: a.sum((0, 1), keepdims=True), stats)
  for other in (flat, tall, whole):
    got = balancer.update(state, other, 1)
    words = "of the state depends on how groups share the sums"
    same(got, want, words, atol=1e-7)


@pytest.mark.parametrize("name,options", parts("balancers", "empty"))
def test_balancer_empty(name, options):
  """Sequences and groups of padding count for nothing."""
  balancer = load("balancers", name, options)
  stats = observed(balancer, 0)
  longer = jax.tree.map(
    lambda a: np.pad(a, [(0, 1), (0, 2)] + [(0, 0)] * (a.ndim - 2)), stats
  )
  state = balancer.init(E)
  got, want = (balancer.update(state, s, 0) for s in (longer, stats))
  words = "of the state changes with empty sequences"
  same(got, want, words, atol=1e-7)
  if balancer.loss is not None:
    np.testing.assert_allclose(
      value(balancer, longer), value(balancer, stats), rtol=1e-6
    )
    nothing = jax.tree.map(np.zeros_like, stats)
    assert value(balancer, nothing) == 0


@pytest.mark.parametrize("name,options", losses("loss"))
def test_balancer_loss(name, options):
  """At least 0, finite, and so is its gradient."""
  balancer = load("balancers", name, options)
  for seed in range(3):
    assert 0 <= value(balancer, random_stats(seed)) < np.inf

  def loss(prob_E, z, stats):
    stats = stats.replace(prob_E=prob_E, z=z)
    return balancer.loss(
      balancer.init(E), stats, jnp.zeros(E, jnp.int32), {}
    ).value()

  gradient = jax.jit(jax.grad(loss, (0, 1)))
  nothing = jax.tree.map(np.zeros_like, random_stats(0))
  for stats in (random_stats(0), even_stats(), nothing):
    for leaf in gradient(stats.prob_E, stats.z, stats):
      assert jnp.isfinite(leaf).all()
  gradients = gradient(*(lambda s: (s.prob_E, s.z, s))(random_stats(0)))
  assert max(abs(np.asarray(g)).max() for g in gradients) > 1e-4


@pytest.mark.parametrize("name,options", losses("uniform"))
def test_balancer_uniform(name, options):
  """A load loss is 1 at f = P = 1/E, whatever K and the scope."""
  balancer = load("balancers", name, options)
  for so_far in (0, 7):
    so_far_E = np.full(E, so_far, np.int32)
    assert abs(value(balancer, even_stats(), so_far_E) - 1) <= 1e-6


@pytest.mark.parametrize("name,options", losses("collapse"))
def test_balancer_collapse(name, options):
  """And E/m where loads and probabilities sit evenly on m >= K experts."""
  balancer = load("balancers", name, options)
  for m in (2, 3):
    got = value(balancer, even_stats(experts_used=m))
    assert abs(got - E / m) <= 1e-5


# The exceptions themselves.


@pytest.mark.parametrize("kind", sorted(PROPERTIES))
def test_each_property_is_explained(kind):
  text = (pathlib.Path(__file__).parents[1] / "docs/extending.md").read_text()
  table = text[text.index("| property |") :].partition("\n\n")[0]
  rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
  named = [row[0].strip(" `") for row in rows if kind in row[1]]
  assert sorted(named) == sorted(PROPERTIES[kind])


@pytest.mark.parametrize("kind", sorted(PROPERTIES))
def test_exceptions_have_reasons(kind):
  for name in registry.names(kind, PLUGINS):
    exceptions = getattr(module_of(kind, name), "CONTRACT_EXCEPTIONS", {})
    for property_name, reason in exceptions.items():
      assert property_name in PROPERTIES[kind], (name, property_name)
      assert len(reason) > 10, (name, property_name)
