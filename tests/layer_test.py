"""The layer against the loops of the oracle: values, statistics, gradients."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core import registry
from moe_jax.moe import experts, layer
from moe_jax.moe.types import Bound, Router, Side
from tests import oracle, tiers

G, T, S, D, E, K, F = 2, 12, 2, 6, 8, 2, 5
AMPLE, TIGHT = Bound(T, E), Bound(2, E)
BUCKETS, AMPLE_BUCKETS = Bound(5, 2), Bound(T * K, 2)

# Dispatcher, order of slots, bound, activation.
LAYOUTS = [
  ("einsum", "token", AMPLE, "relu"),
  ("einsum", "token", TIGHT, "gelu"),
  ("einsum", "choice", TIGHT, "swiglu"),
  ("gather", "token", AMPLE, "geglu"),
  ("gather", "token", TIGHT, "relu"),
  ("gather", "choice", TIGHT, "gelu"),
  ("sorted", "token", None, "swiglu"),
  ("sorted", "choice", None, "geglu"),
  ("sorted", "token", AMPLE, "relu"),
  ("sorted", "token", TIGHT, "gelu"),
  ("sorted", "choice", TIGHT, "swiglu"),
  ("sorted", "token", BUCKETS, "geglu"),
  ("sorted", "choice", BUCKETS, "relu"),
  ("sorted", "token", AMPLE_BUCKETS, "swiglu"),
]
SCORES = ("softmax", "sigmoid", "sqrt_softplus")
ROUTINGS = [
  {
    "top_k": K,
    "score": score,
    "renormalize": renormalize,
    "score_before_top_k": before,
    "scale": scale,
  }
  for (score, renormalize, before), scale in zip(
    itertools.product(SCORES, (False, True), (False, True)),
    itertools.cycle((1.0, 2.5, 0.5)),
  )
]
GROUP_LIMITED = [
  {
    "top_k": K,
    "score": "sigmoid",
    "num_expert_groups": num_groups,
    "top_expert_groups": kept,
    "group_score": group_score,
    "expert_group_mask": mask,
  }
  for group_score, mask, (num_groups, kept) in itertools.product(
    ("max", "sum_top_2"), ("-inf", "0"), ((2, 1), (4, 1), (4, 2))
  )
]


@dataclasses.dataclass(frozen=True)
class Draw:
  """Inputs of one layer, exact in float32. bias_E is for choosing only."""

  params: dict
  x_GTD: np.ndarray
  mask_GT: np.ndarray
  bias_E: np.ndarray


# Inputs whose integers cannot turn on rounding.


def draw(seed, routing, activation, margin=1e-4, shift=0.0, sizes=None):
  """Random inputs without a near tie in what the routing decides.

  Args:
    seed: of the first try.
    routing: options of the router top_k.
    activation: of the experts and the shared expert.
    margin: the least difference that a decision may hang on.
    shift: added to the bias of every expert.
    sizes: T, D, E, F; None: those of the module.
  """
  rng = np.random.default_rng(seed)
  for _ in range(5000):
    inputs = _any_draw(rng, activation, shift, *(sizes or (T, D, E, F)))
    if decision_margin(inputs, **routing) > margin:
      return inputs
  raise ValueError(f"no draw of {routing} with a margin above {margin}")


def _any_draw(rng, activation, shift, T, D, E, F):
  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def network(*lead, hidden):
    shapes = {"up": (D, hidden), "down": (hidden, D)}
    if activation in ("swiglu", "geglu"):
      shapes["gate"] = (D, hidden)
    leaves = {k: normal(*lead, *s) / 2 for k, s in shapes.items()}
    return leaves | {
      f"{k}_bias": normal(*lead, s[1]) / 2 for k, s in shapes.items()
    }

  mask_GT = rng.random((G, T)) > 0.2
  mask_GT[:, 0] = True
  return Draw(
    params={
      "router": {"kernel": normal(D, E)},
      "experts": network(E, hidden=F),
      "shared": network(hidden=F + 2),
    },
    x_GTD=normal(G, T, D),
    mask_GT=mask_GT,
    bias_E=normal(E) / 4 + np.float32(shift),
  )


def decision_margin(
  inputs,
  *,
  top_k,
  score="softmax",
  score_before_top_k=True,
  num_expert_groups=1,
  top_expert_groups=1,
  group_score="max",
  expert_group_mask="-inf",
  priority="none",
  **_,
):
  """The smallest difference that decides who is chosen, in which order."""
  margins, best = [], []
  kernel_DE = np.float64(inputs.params["router"]["kernel"])
  for x_D in np.float64(inputs.x_GTD).reshape(-1, len(kernel_DE)):
    logits_E = x_D @ kernel_DE
    score_E = oracle._scores(logits_E, score)
    select_E = (score_E if score_before_top_k else logits_E) + inputs.bias_E
    if top_expert_groups < num_expert_groups:
      select_GE = select_E.reshape(num_expert_groups, -1)
      take = {"max": 1, "sum_top_2": 2}[group_score]
      good_G = np.sort(select_GE, axis=1)[:, -take:].sum(1)
      order = np.argsort(-good_G)
      margins.append(np.diff(-good_G[order])[top_expert_groups - 1])
      select_GE[order[top_expert_groups:]] = float(expert_group_mask)
      select_E = select_GE.reshape(-1)
    gaps = -np.diff(np.sort(select_E)[::-1][: top_k + 1])
    # Masked experts are exactly equal, and then the first one is taken.
    margins.extend(gaps[gaps > 0])
    chosen = np.argsort(-select_E, kind="stable")[:top_k]
    if score_before_top_k:
      best.append(score_E[chosen].max())
    else:
      best.append(oracle._scores(logits_E[chosen], score).max())
  if priority == "score":
    margins.extend(np.diff(np.sort(best)))
  return min(margins)


# The two sides.


def recipe_of(router, dispatcher, order, bound, activation, **fields):
  return layer.Recipe(
    num_experts=fields.pop("num_experts", E),
    router=router,
    dispatcher=registry.load("dispatchers", dispatcher, order=order),
    experts=experts.build(fields.pop("d_expert", F), activation, use_bias=True),
    bound=bound,
    balancers=(("bias", registry.load("balancers", "bias", rate=1e-3)),),
    shared=experts.dense(7, activation, use_bias=True),
    **{"sequences": S, **fields},
  )


def one_of(routings) -> Router:
  """The router params["which"] of several, so that they share a program."""
  routers = [registry.load("routers", "top_k", **r) for r in routings]

  def route(params, x_TD, **kwargs):
    branches = [
      lambda router=router: router.route(params, x_TD, **kwargs)
      for router in routers
    ]
    return jax.lax.switch(params["which"], branches)

  return Router(None, {}, route, routers[0].causal, K)


# Repeats a decision that was made before, handed over as a feature.
REPLAY = Router(
  init=None,
  axes={},
  route=lambda params, x_TD, *, side, **_: side.features["routing"],
  causal=True,
  top_k=K,
)


def route(recipe, inputs, rng_G=None, **changes):
  """The routing of a Draw, jitted."""
  inputs = dataclasses.replace(inputs, **changes)
  routing = jax.jit(functools.partial(layer.route, recipe))(
    inputs.params["router"],
    {"bias": {"bias_E": inputs.bias_E}},
    inputs.x_GTD,
    Side(inputs.mask_GT),
    rng_G,
  )
  return jax.device_get(routing)


def program(recipe):
  """The jitted layer as a function of a Draw's arrays."""

  @jax.jit
  def run(params, bias_E, x_GTD, mask_GT, rng_G=None):
    balance = {"bias": {"bias_E": bias_E}}
    side = Side(mask_GT)
    return layer.moe_ffn(recipe, params, balance, x_GTD, side, rng_G)[:2]

  def call(inputs, which=None, rng_G=None):
    params = inputs.params
    if which is not None:
      params = {**params, "router": {**params["router"], "which": which}}
    return jax.device_get(
      run(params, inputs.bias_E, inputs.x_GTD, inputs.mask_GT, rng_G)
    )

  return call


def expect(inputs, routing, activation, order, bound, **kwargs):
  """The oracle's y and statistics. Its defaults are not the router's."""
  options = {"renormalize": False, "sequences": S, **routing, **kwargs}
  if options.get("expert_group_mask") == "0":
    options["expert_group_mask"] = "zero"
  return oracle.moe_layer(
    inputs.params,
    inputs.x_GTD,
    inputs.mask_GT,
    activation=activation,
    bias_E=inputs.bias_E,
    bound=bound,
    order=order,
    **options,
  )


def check(got, want, tolerance=1e-5):
  """y and float statistics within the tolerance, integers exactly."""
  (y_GTD, stats), (want_GTD, want_stats) = got, want
  np.testing.assert_allclose(y_GTD, want_GTD, rtol=tolerance, atol=tolerance)
  want_stats = {**want_stats, **want_stats["dropped"]}
  del want_stats["dropped"]
  for name, value in want_stats.items():
    mine = {**vars(stats), **stats.dropped}[name]
    if np.issubdtype(value.dtype, np.integer):
      assert mine.dtype == np.int32, name
      np.testing.assert_array_equal(mine, value, err_msg=name)
    else:
      np.testing.assert_allclose(
        mine, value, rtol=tolerance, atol=tolerance, err_msg=name
      )


# Values and statistics.


@functools.cache
def route_in_any_way():
  """All ROUTINGS as one jitted function (params, bias, x, mask)."""
  recipe = recipe_of(one_of(ROUTINGS), "gather", "token", AMPLE, "relu")

  @jax.jit
  def run(params, bias_E, x_GTD, mask_GT):
    balance = {"bias": {"bias_E": bias_E}}
    return layer.route(recipe, params, balance, x_GTD, Side(mask_GT), None)

  return run


@pytest.mark.parametrize("dispatcher,order,bound,activation", LAYOUTS)
def test_oracle(dispatcher, order, bound, activation):
  """Every way to route through every way to lay out."""
  with_shared = bound not in (TIGHT, BUCKETS)
  recipe = recipe_of(REPLAY, dispatcher, order, bound, activation)
  if not with_shared:
    recipe = dataclasses.replace(recipe, shared=None)

  @jax.jit
  def run(params, x_GTD, side):
    params = {"router": {}, **params}
    return layer.moe_ffn(recipe, params, {}, x_GTD, side)[:2]

  dropped = 0
  for which, routing in enumerate(ROUTINGS):
    for seed in range(2):
      inputs = draw(100 * which + seed, routing, activation)
      if not with_shared:
        inputs.params["shared"] = None
      routed = route_in_any_way()(
        {**inputs.params["router"], "which": which},
        inputs.bias_E,
        inputs.x_GTD,
        inputs.mask_GT,
      )
      rest = {k: v for k, v in inputs.params.items() if k != "router"}
      side = Side(inputs.mask_GT, {"routing": routed})
      got = run(rest, inputs.x_GTD, side)
      got = jax.device_get(got)
      want = expect(inputs, routing, activation, order, bound)
      check(got, want)
      # Tokens without a slot have an output of exactly zero.
      assert (got[0][want[0] == 0] == 0).all()
      dropped += sum(v.sum() for v in want[1]["dropped"].values())
  assert (dropped > 0) == (bound in (TIGHT, BUCKETS))


@pytest.mark.parametrize("shift", [1.0, -2.0])
def test_group_limited(shift):
  """The masks differ where the bias makes the kept scores negative."""
  run = program(
    recipe_of(one_of(GROUP_LIMITED), "gather", "token", TIGHT, "relu")
  )
  for which, routing in enumerate(GROUP_LIMITED):
    inputs = draw(which, routing, "relu", shift=shift)
    want = expect(inputs, routing, "relu", "token", TIGHT)
    check(run(inputs, which), want)
    other = {"0": "-inf", "-inf": "0"}[routing["expert_group_mask"]]
    other = routing | {"expert_group_mask": other}
    _, stats = expect(inputs, other, "relu", "token", TIGHT)
    same = np.array_equal(stats["count_E"], want[1]["count_E"])
    assert same == (shift > 0)


@pytest.mark.parametrize(
  "dispatcher,order,bound",
  [
    ("einsum", "token", TIGHT),
    ("gather", "choice", TIGHT),
    ("sorted", "token", BUCKETS),
  ],
)
def test_batch_prioritized_routing(dispatcher, order, bound):
  """2106.05974: the tokens with the best scores take the slots."""
  routings = [
    {"top_k": K, "priority": "score", "renormalize": True},
    {"top_k": K, "priority": "score", "score": "sigmoid"},
    {"top_k": K, "priority": "score", "score_before_top_k": False},
  ]
  run = program(recipe_of(one_of(routings), dispatcher, order, bound, "relu"))
  for which, routing in enumerate(routings):
    for seed in range(2):
      inputs = draw(seed, routing, "relu", margin=1e-5)
      want = expect(inputs, routing, "relu", order, bound)
      check(run(inputs, which), want)
      plain = expect(
        inputs, routing | {"priority": "none"}, "relu", order, bound
      )
      assert not np.allclose(plain[0], want[0])


def test_one_choice():
  """K = 1, where Switch multiplies by the probability."""
  routing = {"top_k": 1}
  router = registry.load("routers", "top_k", **routing)
  run = program(recipe_of(router, "gather", "choice", TIGHT, "gelu"))
  inputs = draw(0, routing, "gelu")
  check(run(inputs), expect(inputs, routing, "gelu", "choice", TIGHT))


def test_bias_chooses_and_does_not_weigh():
  routing = {"top_k": K, "score": "sigmoid"}
  router = registry.load("routers", "top_k", **routing)
  recipe = recipe_of(router, "gather", "token", AMPLE, "relu")
  inputs = draw(0, routing, "relu")
  only_3_E = (np.arange(E) == 3).astype(np.float32)
  routed = {
    size: route(recipe, inputs, bias_E=size * only_3_E) for size in (0.0, 100.0)
  }
  assert (routed[100.0].choice.expert_TK[..., 0] == 3).all()
  assert not (routed[0.0].choice.expert_TK[..., 0] == 3).all()
  score_GTE = oracle._sigmoid(routed[0.0].logits_TE)
  for routing in routed.values():
    choice = routing.choice
    want = np.take_along_axis(score_GTE, choice.expert_TK, axis=-1)
    np.testing.assert_allclose(choice.weight_TK, want, rtol=1e-6)


def test_low_precision_input():
  """The router works in float32 if x is bfloat16, and y is bfloat16."""
  router = registry.load("routers", "top_k", top_k=K)
  inputs = draw(0, {"top_k": K}, "swiglu")
  x_GTD = jnp.asarray(inputs.x_GTD, jnp.bfloat16)
  inputs = dataclasses.replace(inputs, x_GTD=np.float32(x_GTD))
  want, want_stats = expect(inputs, {"top_k": K}, "swiglu", "token", TIGHT)
  for dispatcher in ("einsum", "sorted"):
    recipe = recipe_of(router, dispatcher, "token", TIGHT, "swiglu")
    run = program(recipe)
    y_GTD, stats = run(dataclasses.replace(inputs, x_GTD=x_GTD))
    assert y_GTD.dtype == jnp.bfloat16
    assert stats.z.dtype == jnp.float32
    np.testing.assert_array_equal(stats.count_E, want_stats["count_E"])
    np.testing.assert_allclose(stats.prob_E, want_stats["prob_E"], rtol=1e-5)
    error = np.float64(y_GTD) - want
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize(
  "dispatcher,bound", [("einsum", TIGHT), ("gather", TIGHT), ("sorted", None)]
)
def test_what_is_under_the_mask_reaches_nothing(dispatcher, bound):
  """NaN there gives the same outputs, statistics and gradients as zeros."""
  router = registry.load("routers", "top_k", top_k=K, noise=0.1)
  recipe = recipe_of(router, dispatcher, "token", bound, "swiglu")
  inputs = draw(0, {"top_k": K}, "swiglu")
  mask_GTD = inputs.mask_GT[..., None]
  rng_G = layer.group_keys(jax.random.key(0), G)

  @jax.jit
  def run(params, bias_E, x_GTD):
    def scalar(params, x_GTD):
      balance = {"bias": {"bias_E": bias_E}}
      y_GTD, stats, _ = layer.moe_ffn(
        recipe, params, balance, x_GTD, Side(inputs.mask_GT), rng_G
      )
      y_GTD = jnp.where(mask_GTD, y_GTD, 0)
      return (y_GTD**2).sum() + stats.z.sum() + stats.prob_E.var(), stats

    return jax.value_and_grad(scalar, (0, 1), has_aux=True)(params, x_GTD)

  found = [
    jax.device_get(
      run(inputs.params, inputs.bias_E, np.where(mask_GTD, inputs.x_GTD, fill))
    )
    for fill in (0, np.nan, np.inf)
  ]
  assert not inputs.mask_GT.all()
  _, (of_params, of_x_GTD) = found[0]
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(of_params))
  assert (of_x_GTD[~inputs.mask_GT] == 0).all()
  for other in found[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, found[0])


def test_collect():
  router = registry.load("routers", "top_k", top_k=K)
  recipe = recipe_of(router, "sorted", "token", TIGHT, "relu")
  inputs = draw(0, {"top_k": K}, "relu")
  balance = {"bias": {"bias_E": inputs.bias_E}}
  side = Side(inputs.mask_GT)

  def run(collect):
    run = functools.partial(layer.moe_ffn, recipe, collect=collect)
    return jax.jit(run)(inputs.params, balance, inputs.x_GTD, side)[2]

  assert run(None) == {}
  choice = run("routing")["choice"]
  for g in range(G):
    routed = oracle.route(
      inputs.params["router"],
      np.where(inputs.mask_GT[g][:, None], inputs.x_GTD[g], 0),
      inputs.mask_GT[g],
      top_k=K,
      renormalize=False,
      bias_E=inputs.bias_E,
    )
    np.testing.assert_array_equal(choice.expert_TK[g], routed.expert_TK)
    np.testing.assert_allclose(choice.weight_TK[g], routed.weight_TK, rtol=1e-5)


# Randomness.


def route_many(routing, x_TD, kernel_DE, keys):
  """The routings of one group under each of many keys, stacked."""
  router = registry.load("routers", "top_k", **routing)

  def route(rng):
    return router.route(
      {"kernel": kernel_DE},
      x_TD,
      num_experts=kernel_DE.shape[1],
      select=lambda score_TE: score_TE,
      side=Side(jnp.ones(len(x_TD), bool)),
      rng=rng,
    )

  if keys is None:
    return jax.device_get(jax.jit(lambda: route(None))())
  return jax.device_get(jax.jit(jax.vmap(route))(keys))


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"renormalize": True, "scale": 3.0},
    {"score": "sigmoid"},
    {"second_threshold": 0.2},
  ],
)
def test_second_expert_is_kept_in_proportion(options):
  """With probability min(1, w2 / threshold), w1 + w2 = 1; GShard: 0.5."""
  inputs = draw(0, {"top_k": K}, "relu")
  x_TD, kernel_DE = inputs.x_GTD[0], inputs.params["router"]["kernel"]
  routing = {"top_k": K, "second_expert": "random", **options}
  keys = jax.random.split(jax.random.key(0), 4000)
  choice = route_many(routing, x_TD, kernel_DE, keys).choice
  weight_TK = np.asarray(choice.weight_TK[0], np.float64)
  share_T = weight_TK[:, 1] / weight_TK.sum(1)
  want_T = np.minimum(1, share_T / options.get("second_threshold", 0.5))
  assert choice.valid_TK[..., 0].all()
  kept_T = np.asarray(choice.valid_TK[..., 1]).mean(0)
  sigma_T = np.sqrt(want_T * (1 - want_T) / len(keys))
  assert (abs(kept_T - want_T) <= 5 * sigma_T + 1e-6).all()
  assert want_T.min() < 0.8, "a draw that decides something"
  assert (choice.weight_TK == choice.weight_TK[:1]).all()
  assert route_many(routing, x_TD, kernel_DE, None).choice.valid_TK.all()


@pytest.mark.parametrize("group_score", ["max", "sum_top_2"])
@pytest.mark.parametrize("groups", [1, 4])
def test_saturated_scores_choose_by_logits(groups, group_score):
  """Sigmoids of 1 or 0 in float32 do not tell experts, or groups, apart."""
  high = [40, 41, 50, 51, 90, 91, 60, 61]
  low = [-200, -190, -180, -170, -130, -120, -160, -150]
  routing = {"top_k": 2, "score": "sigmoid", "group_score": group_score}
  routing |= {"num_expert_groups": groups, "top_expert_groups": 1}
  kernel_DE = jnp.asarray([high, low], jnp.float32)
  choice = route_many(routing, jnp.eye(2), kernel_DE, None).choice
  assert np.sort(choice.expert_TK).tolist() == [[4, 5], [4, 5]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_choosing_is_no_sort_and_no_loop(score):
  """A sort of all scores takes ten times as long on a CPU, and a loop that
  depends on them makes an accelerator wait for the host."""
  router = registry.load("routers", "top_k", top_k=4, score=score)

  def choose(x_TD, kernel_DE):
    side = Side(jnp.ones(len(x_TD), bool))
    return router.route(
      {"kernel": kernel_DE},
      x_TD,
      num_experts=32,
      select=lambda score_TE: score_TE,
      side=side,
      rng=None,
    ).choice

  made = jax.jit(choose).lower(jnp.zeros((64, 8)), jnp.zeros((8, 32)))
  text = made.compile().as_text()
  assert '"TopK"' in text
  assert not re.search(r" (sort|while)\(", text)


def test_second_expert_against_the_oracle():
  """A second choice that was not drawn takes no slot and is unrouted."""
  routing = {"top_k": K, "second_expert": "random", "renormalize": True}
  router = registry.load("routers", "top_k", **routing)
  recipe = recipe_of(router, "gather", "token", TIGHT, "relu")
  inputs = draw(0, routing, "relu")
  rng_G = layer.group_keys(jax.random.key(3), G)
  got = program(recipe)(inputs, rng_G=rng_G)
  routed = route(recipe, inputs, rng_G)
  # The oracle keeps the second choice of every draw below twice its share.
  second_draw_GT = np.where(routed.choice.valid_TK[..., 1], 0.0, 1.0)
  options = {k: v for k, v in routing.items() if k != "second_expert"}
  want = expect(
    inputs,
    options,
    "relu",
    "token",
    TIGHT,
    second_draw_GT=second_draw_GT,
  )
  check(got, want)
  unrouted = want[1]["dropped"]["unrouted"]
  assert unrouted.sum() > 0
  # A router that may choose fewer than K has chosen, and dropped nothing.
  free = dataclasses.replace(recipe.router, fixed=False)
  got = program(dataclasses.replace(recipe, router=free))(inputs, rng_G=rng_G)
  unrouted[...] = 0
  check(got, want)


@pytest.mark.parametrize("option", ["jitter", "noise"])
def test_noise_needs_a_key(option):
  inputs = draw(0, {"top_k": K}, "relu")
  x_TD, kernel_DE = inputs.x_GTD[0], inputs.params["router"]["kernel"]
  plain = route_many({"top_k": K}, x_TD, kernel_DE, None)
  routing = {"top_k": K, option: 0.5}
  quiet = route_many(routing, x_TD, kernel_DE, None)
  jax.tree.map(np.testing.assert_array_equal, quiet, plain)
  keys = jax.random.split(jax.random.key(0), 2)
  noisy = route_many(routing, x_TD, kernel_DE, keys)
  weight_TK = noisy.choice.weight_TK
  assert not np.allclose(weight_TK[0], plain.choice.weight_TK)
  assert not np.allclose(weight_TK[0], weight_TK[1])
  if option == "noise":  # Losses do not see it.
    for found_TE in noisy.logits_TE:
      np.testing.assert_array_equal(found_TE, plain.logits_TE)
    return
  # The weights follow the logits that chose.
  prob_TE = jax.nn.softmax(noisy.logits_TE[0])
  want = np.take_along_axis(prob_TE, noisy.choice.expert_TK[0], axis=-1)
  np.testing.assert_allclose(noisy.choice.weight_TK[0], want, rtol=1e-6)


def test_jitter_scales_the_input_uniformly():
  """The input has width 1, so that each logit is its input's factor."""
  kernel_DE = jnp.ones((1, 3), jnp.float32)
  keys = jax.random.split(jax.random.key(1), 1000)
  logits = route_many(
    {"top_k": K, "jitter": 0.1}, jnp.ones((T, 1)), kernel_DE, keys
  ).logits_TE
  assert (logits[..., 0] == logits[..., 1]).all()
  factor = np.float64(logits[..., 0])
  assert 0.9 <= factor.min() < 0.901 and 1.099 < factor.max() <= 1.1 + 1e-6
  assert abs(factor.mean() - 1) < 0.003
  assert abs(factor.std() - 0.2 / np.sqrt(12)) < 0.002


def test_noise_is_normal_with_its_deviation():
  kernel_DE = jnp.zeros((1, 3), jnp.float32)
  keys = jax.random.split(jax.random.key(2), 1000)
  choice = route_many(
    {"top_k": 3, "noise": 0.25, "score": "sigmoid"},
    *(jnp.ones((T, 1)), kernel_DE, keys),
  ).choice
  # Of all experts, from their weights.
  by_number = np.argsort(choice.expert_TK, axis=-1)
  weight = np.take_along_axis(np.float64(choice.weight_TK), by_number, -1)
  logits = np.log(weight / (1 - weight))
  assert abs(logits.mean()) < 0.005
  assert abs(logits.std() - 0.25) < 0.005
  across = np.corrcoef(np.asarray(logits).reshape(-1, 3).T)
  assert abs(across - np.eye(3)).max() < 0.05


def test_every_group_has_its_own_key():
  rng = jax.random.key(7)
  all_keys = jax.random.key_data(layer.group_keys(rng, 6))
  assert len({tuple(k) for k in np.asarray(all_keys).tolist()}) == 6
  some = jax.random.key_data(layer.group_keys(rng, 2, first=3))
  np.testing.assert_array_equal(all_keys[3:5], some)

  router = registry.load("routers", "top_k", top_k=K, noise=1.0)
  recipe = recipe_of(router, "gather", "token", AMPLE, "relu")
  inputs = draw(0, {"top_k": K}, "relu")
  x_GTD = np.stack([inputs.x_GTD[0]] * G)
  routed = route(recipe, inputs, layer.group_keys(rng, G), x_GTD=x_GTD)
  weight_GTK = routed.choice.weight_TK
  assert not np.allclose(weight_GTK[0], weight_GTK[1])


# Gradients.

SMALL = {"T": 6, "D": 4, "E": 4, "F": 5}
DIRECTIONS = 32


@dataclasses.dataclass(frozen=True)
class Setting:
  """Settings of the oracle's derivative, which the dispatchers share."""

  order: str
  bound: Bound
  activation: str
  routing: tuple
  shared: bool = False


SETTINGS = {
  "ample": Setting(
    "token",
    Bound(6, 4),
    "swiglu",
    (("top_k", K), ("renormalize", True)),
    shared=True,
  ),
  "tight": Setting(
    "choice",
    Bound(2, 4),
    "geglu",
    (("top_k", K), ("score", "sigmoid"), ("scale", 2.5)),
  ),
  "input": Setting(
    "token",
    Bound(2, 4),
    "gelu",
    (("top_k", K), ("score_before_top_k", False), ("apply_to", "input")),
  ),
  "buckets": Setting(
    "token",
    Bound(4, 2),
    "swiglu",
    (("top_k", K), ("score", "sqrt_softplus"), ("renormalize", True)),
  ),
}


@functools.cache
def gradient_draw(setting):
  inputs = draw(
    11,
    dict(setting.routing),
    setting.activation,
    margin=0.02,
    sizes=tuple(SMALL.values()),
  )
  if not setting.shared:
    inputs.params["shared"] = None
  return inputs


def projection(shapes):
  """Fixed random numbers to multiply the outputs with."""
  rng = np.random.default_rng(5)
  return {k: rng.normal(size=s) for k, s in shapes.items()}


R = projection(
  {
    "y": (G, SMALL["T"], SMALL["D"]),
    "prob_E": (G, S, SMALL["E"]),
    "weight_E": (G, S, SMALL["E"]),
    "z": (G, S),
  }
)


@functools.cache
def oracle_side(setting_name):
  """y, stats, and per leaf the directions and the derivatives along them."""
  setting = SETTINGS[setting_name]
  inputs = gradient_draw(setting)
  leaves, tree = jax.tree.flatten((inputs.params, inputs.x_GTD))
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(
      (inputs.params, inputs.x_GTD)
    )
  ]
  routing = dict(setting.routing)

  def both(leaves):
    params, x_GTD = jax.tree.unflatten(tree, leaves)
    moved = dataclasses.replace(inputs, params=params, x_GTD=x_GTD)
    return expect(
      moved, routing, setting.activation, setting.order, setting.bound
    )

  def scalar(i, leaf):
    y_GTD, stats = both(leaves[:i] + leaf + leaves[i + 1 :])
    return (R["y"] * y_GTD).sum() + sum(
      (R[k] * stats[k]).sum() for k in ("prob_E", "weight_E", "z")
    )

  rng = np.random.default_rng(6)
  derivatives = []
  for i, leaf in enumerate(leaves):
    towards = rng.normal(size=(DIRECTIONS, leaf.size))
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    along = [
      oracle.gradient_along(
        functools.partial(scalar, i), [leaf], [t.reshape(leaf.shape)]
      )
      for t in towards
    ]
    derivatives.append((names[i], towards, np.array(along)))
  return both(leaves), derivatives


GRADIENTS = [
  ("ample", "einsum", "float64"),
  ("ample", "gather", "float64"),
  ("ample", "sorted", "float64"),
  ("ample", "dropless", "float64"),
  ("tight", "einsum", "float64"),
  ("tight", "gather", "float64"),
  ("tight", "sorted", "float64"),
  ("input", "einsum", "float64"),
  ("input", "gather", "float64"),
  ("input", "sorted", "float64"),
  ("buckets", "sorted", "float64"),
  ("tight", "gather", "float32"),
  ("ample", "dropless", "float32"),
  ("tight", "einsum", "float32"),
  ("input", "sorted", "float32"),
  ("buckets", "sorted", "float32"),
]


@pytest.mark.parametrize(
  "setting,dispatcher,dtype",
  tiers.only(GRADIENTS[:12], GRADIENTS, several=True),
)
def test_gradient(setting, dispatcher, dtype):
  """Every leaf along 32 directions, relative to their root mean square."""
  tolerance, value_tolerance = {
    "float64": (1e-6, 1e-10),
    "float32": (1e-3, 1e-5),
  }[dtype]
  want, derivatives = oracle_side(setting)
  setting = SETTINGS[setting]
  recipe = recipe_of(
    registry.load("routers", "top_k", **dict(setting.routing)),
    "sorted" if dispatcher == "dropless" else dispatcher,
    setting.order,
    None if dispatcher == "dropless" else setting.bound,
    setting.activation,
    num_experts=SMALL["E"],
    d_expert=SMALL["F"],
  )
  if not setting.shared:
    recipe = dataclasses.replace(recipe, shared=None)
  inputs = gradient_draw(setting)

  def scalar(params, x_GTD, bias_E):
    y_GTD, stats, _ = layer.moe_ffn(
      recipe,
      params,
      {"bias": {"bias_E": bias_E}},
      x_GTD,
      Side(inputs.mask_GT),
    )
    total = (R["y"].astype(dtype) * y_GTD).sum()
    for name in ("prob_E", "weight_E", "z"):
      total += (R[name].astype(dtype) * getattr(stats, name)).sum()
    return total, (y_GTD, stats)

  with jax.enable_x64(dtype == "float64"):
    run = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
    args = jax.tree.map(
      lambda a: a.astype(dtype),
      (inputs.params, inputs.x_GTD, inputs.bias_E),
    )
    (_, got), gradient = jax.device_get(run(*args))
    assert got[0].dtype == dtype and got[1].z.dtype == dtype
  check(got, want, value_tolerance)
  for leaf, (name, towards, along) in zip(
    jax.tree.leaves(gradient), derivatives, strict=True
  ):
    mine = towards @ np.float64(leaf).reshape(-1)
    size = np.sqrt((along**2).mean())
    assert size > 1e-3, name
    error = abs(mine - along).max() / size
    assert error <= tolerance, (name, error)
