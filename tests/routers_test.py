"""Routers beside `top_k`, each against plain loops from its paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import layer, scores
from moe_jax.moe.routers import forced, sinkhorn
from moe_jax.moe.routers import hash as hash_router
from moe_jax.moe.types import Side, SlotChoice
from moe_jax.tasks import next_token
from moe_jax.training import program
from tests import compiled, oracle

T, D, E, V = 12, 5, 8, 40


def routed(router, params, x_TD, side, rng=None, balance=None, balancers=()):
  """The decision of a router for one group, in float64."""
  with jax.enable_x64(True):
    recipe = layer.Recipe(E, router, None, None, balancers=balancers)
    routing = layer.route(
      recipe,
      jax.tree.map(jnp.asarray, params),
      balance or {},
      jnp.asarray(x_TD)[None],
      jax.tree.map(lambda x: jnp.asarray(x)[None], side),
      None if rng is None else rng[None],
    )
    return jax.tree.map(lambda x: np.asarray(x)[0], routing)


def drawn(seed):
  rng = np.random.default_rng(seed)
  params = {
    "kernel": rng.normal(size=(D, E)),
    "groups": rng.normal(size=(D, 4)),
    "noise_kernel": rng.normal(size=(D, E)),
  }
  features = {
    "token_id": rng.integers(0, V, T),
    "timestep": rng.random(T),
  }
  return params, rng.normal(size=(T, D)), Side(np.arange(T) != 2, features)


def of_router(router, params):
  return {k: params[k] for k in router.axes}


def logits_by_hand(x_D, kernel_DE):
  return [sum(x * w for x, w in zip(x_D, column)) for column in kernel_DE.T]


def softmax_by_hand(logits):
  whole = sum(np.exp(z - max(logits)) for z in logits)
  return [np.exp(z - max(logits)) / whole for z in logits]


def sigmoid_by_hand(logits):
  return [1 / (1 + np.exp(-z)) for z in logits]


SCORES = {"softmax": softmax_by_hand, "sigmoid": sigmoid_by_hand}


def best_by_hand(values, count):
  """The indices of the largest values, the largest first."""
  return sorted(range(len(values)), key=lambda i: -values[i])[:count]


# By-hand routers: (params, x_TD, side) -> weights w_TE of all experts, with 0 for
# those that are not chosen.


def hash_by_hand(score, renormalize):
  table_VK = hash_router.drawn(V, E, 3, seed=0)

  def weights(params, x_TD, side):
    w_TE = np.zeros((T, E))
    for t, token in enumerate(side.features["token_id"]):
      scores = SCORES[score](logits_by_hand(x_TD[t], params["kernel"]))
      whole = sum(scores[e] for e in table_VK[token]) if renormalize else 1
      for e in table_VK[token]:
        w_TE[t, e] = 2.5 * scores[e] / whole
    return w_TE

  return weights


def expert_choice_by_hand(params, x_TD, side):
  """2202.09368, 3.2: every expert takes its best tokens."""
  score_TE = np.array(
    [softmax_by_hand(logits_by_hand(x, params["kernel"])) for x in x_TD]
  )
  w_TE, real = np.zeros((T, E)), np.flatnonzero(side.mask_T)
  for e in range(E):
    most = max(1, len(real) * 2 // E)
    for t in sorted(real, key=lambda t: -score_TE[t, e])[:most]:
      w_TE[t, e] = score_TE[t, e]
  return w_TE


def sinkhorn_by_hand(score, renormalize):
  def weights(params, x_TD, side):
    """Rows and columns of the plan scaled in turn, of real tokens alone."""
    logits_TE = np.array([logits_by_hand(x, params["kernel"]) for x in x_TD])
    real = np.flatnonzero(side.mask_T)
    plan = np.exp(logits_TE[real])
    for _ in range(8):
      plan = plan / plan.sum(1, keepdims=True)
      plan = plan / plan.sum(0, keepdims=True)
    w_TE = np.zeros((T, E))
    for row, t in enumerate(real):
      chosen = best_by_hand(plan[row], 2)
      w_E = SCORES[score](logits_TE[t])
      whole = sum(w_E[e] for e in chosen) if renormalize else 1
      for e in chosen:
        w_TE[t, e] = w_E[e] / whole
    return w_TE

  return weights


def relu_by_hand(params, x_TD, side):
  """2412.14711, eq. 3, with at most 3 experts."""
  w_TE = np.zeros((T, E))
  for t, x_D in enumerate(x_TD):
    logits = logits_by_hand(x_D, params["kernel"])
    for e in best_by_hand(logits, 3):
      w_TE[t, e] = max(logits[e], 0)
  return w_TE


def top_p_by_hand(renormalize):
  def weights(params, x_TD, side):
    w_TE = np.zeros((T, E))
    for t, x_D in enumerate(x_TD):
      probs = softmax_by_hand(logits_by_hand(x_D, params["kernel"]))
      chosen, reached = [], 0
      for e in best_by_hand(probs, 4):
        if reached < 0.7:
          chosen.append(e)
          reached += probs[e]
      for e in chosen:
        w_TE[t, e] = probs[e] / (reached if renormalize else 1)
    return w_TE

  return weights


def threshold_by_hand(params, x_TD, side):
  w_TE = np.zeros((T, E))
  for t, x_D in enumerate(x_TD):
    scores = sigmoid_by_hand(logits_by_hand(x_D, params["kernel"]))
    above = [s - b for s, b in zip(scores, THRESHOLD_E)]
    for e in best_by_hand(above, 3):
      if above[e] > 0:
        w_TE[t, e] = scores[e]
  return w_TE


THRESHOLD_E = np.linspace(0.2, 0.9, E)


def hierarchical_by_hand(renormalize):
  def weights(params, x_TD, side):
    """1701.06538, appendix B: p_g of the group times q_ge inside of it."""
    w_TE = np.zeros((T, E))
    for t, x_D in enumerate(x_TD):
      p = softmax_by_hand(logits_by_hand(x_D, params["groups"]))
      logits = logits_by_hand(x_D, params["kernel"])
      for g in best_by_hand(p, 2):
        q = softmax_by_hand(logits[2 * g : 2 * g + 2])
        (best,) = best_by_hand(q, 1)
        w_TE[t, 2 * g + best] = p[g] * q[best]
      if renormalize:
        w_TE[t] /= w_TE[t].sum()
    return w_TE

  return weights


def by_feature_by_hand(params, x_TD, side):
  w_TE = np.zeros((T, E))
  for t, step in enumerate(side.features["timestep"]):
    block = (step >= 0.5) * 4
    logits = logits_by_hand(x_TD[t], params["kernel"])
    probs = softmax_by_hand(logits[block : block + 4])
    for e in best_by_hand(probs, 2):
      w_TE[t, block + e] = probs[e]
  return w_TE


def forced_by_hand(params, x_TD, side):
  """Loads as 1 / (e + 1): the running sum of shares times K, at points."""
  share = [1 / (e + 1) for e in range(E)]
  share = [2 * s / sum(share) for s in share]
  w_TE = np.zeros((T, E))
  for t, x_D in enumerate(x_TD):
    probs = softmax_by_hand(logits_by_hand(x_D, params["kernel"]))
    for k in range(2):
      point, e = t * (5**0.5 - 1) / 2 % 1 + k, 0
      while sum(share[: e + 1]) <= point:
        e += 1
      w_TE[t, e] = probs[e]
  return w_TE


def rounded_by_hand(renormalize):
  def weights(params, x_TD, side):
    """Loads to multiples of 2: the worst leave, or the best spare come in."""
    prob_TE = [
      softmax_by_hand(logits_by_hand(x, params["kernel"])) for x in x_TD
    ]
    own, spare = {}, {}
    for t in np.flatnonzero(side.mask_T):
      ranked = best_by_hand(prob_TE[t], 4)
      for e in ranked[:2]:
        own.setdefault(e, []).append(t)
      for e in ranked[2:]:
        spare.setdefault(e, []).append(t)
    w_TE = np.zeros((T, E))
    for e in range(E):
      queue = [
        t
        for some in (own, spare)
        for t in sorted(some.get(e, []), key=lambda t: -prob_TE[t][e])
      ]
      count = (len(own.get(e, [])) + 1) // 2 * 2
      for t in queue[:count]:
        w_TE[t, e] = prob_TE[t][e]
    if renormalize:
      w_TE /= np.where(w_TE.sum(1) > 0, w_TE.sum(1), 1)[:, None]
    return w_TE

  return weights


def top_k_by_hand(params, x_TD, side):
  """Cosines over a temperature, and a scale of each expert's own."""
  w_TE = np.zeros((T, E))
  for t, x_D in enumerate(x_TD):
    cosines = []
    for column in params["kernel"].T:
      length = np.sqrt(sum(column**2)) * np.sqrt(sum(x_D**2))
      cosines.append(sum(x_D * column) / length / params["temperature"][0])
    probs = softmax_by_hand(cosines)
    for e in best_by_hand(probs, 2):
      w_TE[t, e] = probs[e] * params["expert_scale"][e]
  return w_TE


MORE = {
  "temperature": np.array([0.4]),
  "expert_scale": np.linspace(0.5, 2, E),
}
TABLE = {"top_k": 3, "vocab_size": V, "scale": 2.5}
FEATURE = {"feature": "timestep", "num_values": 2, "boundaries": (0.5,)}
# (router, options, by hand)
CASES = [
  *(
    (
      "hash",
      TABLE | {"score": score, "renormalize": renormalize},
      hash_by_hand(score, renormalize),
    )
    for score in SCORES
    for renormalize in (False, True)
  ),
  ("expert_choice", {"top_k": 2}, expert_choice_by_hand),
  *(
    (
      "sinkhorn",
      {
        **{"top_k": 2, "at_evaluation": True},
        **{"score": score, "renormalize": renormalize},
      },
      sinkhorn_by_hand(score, renormalize),
    )
    for score in SCORES
    for renormalize in (False, True)
  ),
  ("relu", {"top_k": 3}, relu_by_hand),
  *(
    (
      "top_p",
      {"top_k": 4, "threshold": 0.7, "renormalize": renormalize},
      top_p_by_hand(renormalize),
    )
    for renormalize in (False, True)
  ),
  ("expert_threshold", {"top_k": 3}, threshold_by_hand),
  *(
    (
      "hierarchical",
      {
        **{"top_k": 2, "num_groups": 4, "top_groups": 2},
        "renormalize": renormalize,
      },
      hierarchical_by_hand(renormalize),
    )
    for renormalize in (False, True)
  ),
  ("by_feature", {"top_k": 2} | FEATURE, by_feature_by_hand),
  ("forced", {"top_k": 2, "exponent": 1.0}, forced_by_hand),
  *(
    (
      "tile_rounded",
      {"top_k": 2, "tile": 2, "renormalize": renormalize},
      rounded_by_hand(renormalize),
    )
    for renormalize in (False, True)
  ),
  ("top_k", {"top_k": 2, "cosine": True, "expert_scale": True}, top_k_by_hand),
]


def dense(choice):
  """The weights of all experts, w_TE, that a choice makes."""
  if isinstance(choice, SlotChoice):
    w_TE = jnp.zeros((T, E), choice.weight_EC.dtype)
    weight_EC = jnp.where(choice.valid_EC, choice.weight_EC, 0)
    return w_TE.at[choice.token_EC, jnp.arange(E)[:, None]].add(weight_EC)
  w_TE = jnp.zeros((T, E), choice.weight_TK.dtype)
  weight_TK = jnp.where(choice.valid_TK, choice.weight_TK, 0)
  return w_TE.at[jnp.arange(T)[:, None], choice.expert_TK].add(weight_TK)


@pytest.mark.parametrize(
  "name,options,by_hand",
  CASES,
  ids=["-".join(map(str, (c[0], *c[1].values()))) for c in CASES],
)
def test_weights_and_their_gradients(name, options, by_hand):
  """Against plain loops: w of every token and expert, and d w by parameter."""
  router = registry.load("routers", name, **options)
  params, x_TD, side = drawn(1)
  params = of_router(router, params | MORE)
  above = lambda score_TE: score_TE - THRESHOLD_E[None]  # noqa: E731
  select = above if name == "expert_threshold" else lambda score_TE: score_TE

  def weights(params):
    routing = router.route(
      *(params, jnp.asarray(x_TD)),
      num_experts=E,
      select=select,
      side=jax.tree.map(jnp.asarray, side),
      rng=None,
    )
    return dense(routing.choice), routing

  expected_TE = by_hand(params, x_TD, side) * side.mask_T[:, None]
  rng = np.random.default_rng(2)
  factor_TE = rng.normal(size=(T, E)) * side.mask_T[:, None]
  with jax.enable_x64(True):
    found_TE, routing = weights(jax.tree.map(jnp.asarray, params))
    np.testing.assert_allclose(found_TE, expected_TE, rtol=1e-9, atol=1e-12)
    if routing.prob_TE is not None:
      np.testing.assert_allclose(routing.prob_TE.sum(-1), 1, rtol=1e-9)
    projected = lambda params: (weights(params)[0] * factor_TE).sum()  # noqa: E731
    gradients = jax.grad(projected)(jax.tree.map(jnp.asarray, params))
  for leaf, gradient in gradients.items():
    towards = rng.normal(size=gradient.shape)
    towards /= np.linalg.norm(towards)
    numeric = oracle.gradient_along(
      lambda leaves, leaf=leaf: (
        factor_TE * by_hand(params | {leaf: leaves[0]}, x_TD, side)
      ).sum(),
      [params[leaf]],
      [towards],
      eps=1e-5,
    )
    exact = float((np.asarray(gradient) * towards).sum())
    assert exact == pytest.approx(numeric, rel=1e-6, abs=1e-9), leaf


def noisy_by_hand(params, x_TD, draw_TE):
  """1701.06538, eq. 3 to 5 and 9: weights, clean probabilities and chances."""
  weight_TE, prob_TE, chance_TE = np.zeros((3, T, E))
  for t, x_D in enumerate(x_TD):
    clean = logits_by_hand(x_D, params["kernel"])
    size = [
      0.01 + np.log1p(np.exp(z))
      for z in logits_by_hand(x_D, params["noise_kernel"])
    ]
    noisy = [z + n * s for z, n, s in zip(clean, draw_TE[t], size)]
    chosen = best_by_hand(noisy, 2)
    weight_TE[t, chosen] = softmax_by_hand([noisy[e] for e in chosen])
    prob_TE[t] = softmax_by_hand(clean)
    for e in range(E):
      others = sorted((noisy[i] for i in range(E) if i != e), reverse=True)
      far = (clean[e] - others[1]) / size[e]
      chance_TE[t, e] = (1 + math.erf(far / math.sqrt(2))) / 2
  return weight_TE, prob_TE, chance_TE


def fixed_noise_by_hand(params, x_TD, draw_TE):
  """V-MoE's gates (2106.05974, A.2): noise of one size, here 0.5, for choosing."""
  weight_TE, prob_TE, chance_TE = np.zeros((3, T, E))
  for t, x_D in enumerate(x_TD):
    clean = logits_by_hand(x_D, params["kernel"])
    noisy = [z + 0.5 * n for z, n in zip(clean, draw_TE[t])]
    chosen = best_by_hand(noisy, 2)
    weight_TE[t, chosen] = np.array(softmax_by_hand(noisy))[chosen]
    prob_TE[t] = softmax_by_hand(clean)
    for e in range(E):
      far = (clean[e] - min(noisy[i] for i in chosen)) / 0.5
      chance_TE[t, e] = (1 + math.erf(far / math.sqrt(2))) / 2
  return weight_TE, prob_TE, chance_TE


@pytest.mark.parametrize(
  "name,options,by_hand",
  [
    ("noisy_top_k", {}, noisy_by_hand),
    ("top_k", {"noise": 0.5}, fixed_noise_by_hand),
  ],
)
def test_noise_and_smooth_loads(name, options, by_hand):
  """Weights, probabilities and chances, and the gradient of each of them."""
  router = registry.load("routers", name, top_k=2, **options)
  params, x_TD, _ = drawn(3)
  params, key = of_router(router, params), jax.random.key(5)
  rng = np.random.default_rng(6)

  def all_of(params):
    routing = router.route(
      *(params, jnp.asarray(x_TD)),
      num_experts=E,
      select=lambda score_TE: score_TE,
      side=Side(jnp.ones(T, bool)),
      rng=key,
    )
    return dense(routing.choice), routing.prob_TE, routing.chance_TE

  with jax.enable_x64(True):
    # The same draw as the router's: what is under test is what it is used for.
    own = key if name == "noisy_top_k" else jax.random.split(key, 3)[1]
    draw_TE = np.asarray(jax.random.normal(own, (T, E), jnp.float64))
    found = all_of(jax.tree.map(jnp.asarray, params))
    for x, wanted in zip(found, by_hand(params, x_TD, draw_TE)):
      np.testing.assert_allclose(x, wanted, rtol=1e-9, atol=1e-12)
    for which in range(3):
      factor_TE = rng.normal(size=(T, E))
      gradients = jax.grad(lambda p: (all_of(p)[which] * factor_TE).sum())(  # noqa: B023
        jax.tree.map(jnp.asarray, params)
      )
      leaves, tree = jax.tree.flatten(params)
      towards = [rng.normal(size=x.shape) for x in leaves]
      towards = [x / np.linalg.norm(x) for x in towards]
      numeric = oracle.gradient_along(
        lambda some: (
          (
            factor_TE  # noqa: B023
            * by_hand(jax.tree.unflatten(tree, some), x_TD, draw_TE)[which]  # noqa: B023
          ).sum()
        ),
        *(leaves, towards),
        eps=1e-5,
      )
      exact = sum(
        float((g * x).sum())
        for g, x in zip(jax.tree.leaves(gradients), towards)
      )
      assert exact == pytest.approx(numeric, rel=1e-6), which


def test_without_a_key_there_is_no_noise():
  router = registry.load("routers", "noisy_top_k", top_k=2)
  params, x_TD, side = drawn(3)
  quiet = routed(router, of_router(router, params), x_TD, side)
  assert quiet.chance_TE is None
  assert (quiet.choice.expert_TK[:, 0] == quiet.logits_TE.argmax(1)).all()


def test_noise_kernel_learns_in_training():
  """From the weights, and from the loss of smooth loads."""
  router = registry.load("routers", "noisy_top_k", top_k=2)
  params, x_TD, side = drawn(4)
  params = jax.tree.map(jnp.asarray, of_router(router, params))

  def value(params, part):
    routing = router.route(
      *(params, jnp.asarray(x_TD)),
      num_experts=E,
      select=lambda score_TE: score_TE,
      side=jax.tree.map(jnp.asarray, side),
      rng=jax.random.key(0),
    )
    weight = routing.choice.weight_TK if part == "weight" else routing.chance_TE
    return (weight**2).sum()

  for part in ("weight", "chance"):
    gradients = jax.grad(value)(params, part)
    assert all(abs(g).max() > 1e-3 for g in gradients.values())
  # Also where the learnt noise has vanished.
  far = params | {"noise_kernel": jnp.full((D, E), -50.0)}
  gradients = jax.grad(value)(far, "chance")
  assert all(jnp.isfinite(g).all() for g in gradients.values())


def test_the_normal_distribution():
  """Also in its tails, as the C library has it."""
  x = np.linspace(-8, 8, 401)
  expected = [math.erfc(-t / math.sqrt(2)) / 2 for t in x]
  with jax.enable_x64(True):
    found = scores.normal_cdf(jnp.asarray(x))
    slopes = jax.vmap(jax.grad(scores.normal_cdf))(jnp.asarray(x))
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
  np.testing.assert_allclose(slopes, density, rtol=1e-12)
  coarse = scores.normal_cdf(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(coarse, expected, rtol=1e-4, atol=1e-12)
  far = jnp.asarray([-1e30, 1e30])
  assert scores.normal_cdf(far).tolist() == [0, 1]


@pytest.mark.parametrize("cosine", [False, True])
def test_a_router_in_bfloat16(cosine):
  """It sees no more of its inputs than bfloat16 has, and neither do choices."""
  rng = np.random.default_rng(8)
  x_TD = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
  params = {"kernel": jnp.asarray(rng.normal(size=(D, E)), jnp.float32)}
  params["temperature"] = jnp.full((1,), 0.3)
  rounded = lambda tree: jax.tree.map(  # noqa: E731
    lambda x: x.astype(jnp.bfloat16).astype(x.dtype), tree
  )

  def logits_of(dtype, params, x_TD):
    options = {"dtype": dtype, "cosine": cosine, "top_k": 2}
    router = registry.load("routers", "top_k", **options)
    routing = router.route(
      *(of_router(router, params), x_TD),
      num_experts=E,
      select=lambda score_TE: score_TE,
      side=Side(jnp.ones(T, bool)),
      rng=None,
    )
    return np.float64(routing.logits_TE)

  found_TE = logits_of("bfloat16", params, x_TD)
  few = rounded(params), rounded(x_TD)
  np.testing.assert_array_equal(found_TE, logits_of("bfloat16", *few))
  exact_TE = logits_of("float32", *few)
  np.testing.assert_array_equal(found_TE, rounded(jnp.float32(exact_TE)))
  assert (exact_TE != logits_of("float32", params, x_TD)).any()


def test_sinkhorn_balances_a_group():
  rng = np.random.default_rng(0)
  logits_TE = rng.normal(size=(400, E)) + np.linspace(0, 3, E)
  mask_T = np.arange(400) < 360
  plan_TE = sinkhorn.log_plan(
    jnp.asarray(logits_TE), jnp.asarray(mask_T), sweeps=30
  )
  vios = []
  for scores_TE in (logits_TE, np.asarray(plan_TE)):
    chosen_TK = np.argsort(-scores_TE, axis=1)[mask_T, :2]
    vios.append(oracle.max_vio(np.bincount(chosen_TK.ravel(), minlength=E)))
  # Padding has no part in it.
  alone_TE = sinkhorn.log_plan(
    jnp.asarray(logits_TE[mask_T]), jnp.ones(360, bool), sweeps=30
  )
  np.testing.assert_allclose(plan_TE[mask_T], alone_TE, rtol=1e-4)
  # The plan is soft, and its largest entries are not quite as even.
  assert vios[0] > 1.5 and vios[1] < 0.25
  # Outside of training logits choose, unless it is told otherwise.
  router = registry.load("routers", "sinkhorn", top_k=2)
  params, x_TD, side = drawn(5)
  params = of_router(router, params)
  routing = routed(router, params, x_TD, side)
  best_T = routing.logits_TE.argmax(1)
  np.testing.assert_array_equal(routing.choice.expert_TK[:, 0], best_T)


def test_padding_takes_no_capacity():
  """Experts take their share of the tokens that are there, and one at least."""
  router = registry.load("routers", "expert_choice", top_k=4)
  params, x_TD, side = drawn(6)
  side = side.replace(mask_T=np.arange(T) < 2)
  choice = routed(router, of_router(router, params), x_TD, side).choice
  assert choice.token_EC.shape == (E, T * 4 // E)
  assert not choice.valid_EC[np.asarray(choice.token_EC) >= 2].any()
  assert (choice.valid_EC.sum(1) == max(1, 2 * 4 // E)).all()


def test_loads_are_forced():
  """Loads are as wanted to a token, and no expert has more than all tokens."""
  for exponent in (0.0, 0.5, 1.0, 3.0):
    share_E = forced.shares(16, 4, exponent)
    assert share_E.max() <= 1 and share_E.sum() == pytest.approx(4)
    table_TK = forced.table(1000, 16, 4, exponent)
    assert all(len({*row}) == 4 for row in table_TK.tolist())
    count_E = np.bincount(table_TK.ravel(), minlength=16)
    assert abs(count_E - 1000 * share_E).max() <= 3
    if exponent == 0:
      assert np.ptp(count_E) <= 5
  assert (forced.shares(16, 4, 3.0)[:2] == 1).all()


def test_tiles():
  """Loads are multiples of the tile, and near those of top-k."""
  rng = np.random.default_rng(1)
  x_TD, kernel_DE = rng.normal(size=(300, D)), rng.normal(size=(D, E))
  router = registry.load("routers", "tile_rounded", top_k=2, tile=16)
  side = Side(np.arange(300) < 280)
  choice = routed(router, {"kernel": kernel_DE}, x_TD, side).choice
  counts = []
  for some in (slice(None), slice(0, 2)):
    valid_TK = choice.valid_TK if some == slice(None) else side.mask_T[:, None]
    expert_TK = choice.expert_TK[:, some]
    valid_TK = np.broadcast_to(valid_TK, expert_TK.shape)
    counts.append(np.bincount(expert_TK[valid_TK], minlength=E))
  rounded_E, plain_E = counts
  assert (rounded_E % 16 == 0).all() and (rounded_E > 0).any()
  assert abs(rounded_E - plain_E).max() <= 8
  assert (plain_E % 16 != 0).any()


def test_a_threshold_for_each_expert():
  """With the balancer's state experts get their share of tokens like these."""
  rng = np.random.default_rng(2)
  tokens, share = 4000, 2 / E
  kernel_DE = rng.normal(size=(D, E))
  router = registry.load("routers", "expert_threshold", top_k=E)
  balancer = registry.load("balancers", "threshold", share=share, decay=0.5)
  state, recipe = balancer.init(E), None
  recipe = layer.Recipe(E, router, None, None, balancers=(("t", balancer),))
  loads = []
  for _ in range(4):
    x_TD = jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32)
    routing = layer.route(
      *(recipe, {"kernel": jnp.asarray(kernel_DE, jnp.float32)}, {"t": state}),
      *(x_TD[None], Side(jnp.ones((1, tokens), bool)), None),
    )
    routing = jax.tree.map(lambda x: x[0], routing)
    loads.append(dense_counts(routing.choice))
    observed = balancer.observe(state, routing, jnp.ones(tokens, bool))
    observed = jax.tree.map(lambda x: x[None, None], observed)
    stats = type("", (), {"observed": observed})
    state = balancer.update(state, stats, 0)
  assert (loads[0] == tokens).all(), "there are no thresholds yet"
  np.testing.assert_allclose(loads[-1] / tokens, share, rtol=0.15)


def dense_counts(choice):
  expert_TK = np.asarray(choice.expert_TK)
  return np.bincount(expert_TK[np.asarray(choice.valid_TK)], minlength=E)


@pytest.mark.parametrize(
  "name,options,words",
  [
    ("noisy_top_k", {"top_k": E}, "needs top_k = 8 below num_experts = 8"),
    ("sinkhorn", {"top_k": 1, "renormalize": True}, "would learn nothing"),
    (
      "hierarchical",
      {"top_k": 3, "num_groups": 4, "top_groups": 2},
      "top_groups = 2 to divide top_k = 3",
    ),
    ("hierarchical", {"top_k": 2, "num_groups": 3}, "num_groups = 3 groups"),
    ("hierarchical", {"top_k": 4, "num_groups": 4}, "4 experts in each"),
    (
      "hierarchical",
      {"top_k": 1, "num_groups": 4, "renormalize": True},
      "would learn nothing",
    ),
    ("tile_rounded", {"top_k": 5, "tile": 8}, "looks at 2 top_k = 10"),
    (
      "tile_rounded",
      {"top_k": 1, "tile": 8, "renormalize": True},
      "would learn nothing",
    ),
    ("top_p", {"top_k": 1, "renormalize": True}, "would learn nothing"),
    ("forced", {"top_k": 2, "exponent": 2000.0}, "at most 30"),
    ("by_feature", {"top_k": 5} | FEATURE, "2 equal blocks of top_k = 5"),
    (
      "by_feature",
      {"top_k": 1} | FEATURE | {"boundaries": (0.1, 0.2)},
      "not 1 rising numbers",
    ),
    (
      "by_feature",
      {"top_k": 1, "feature": "x", "num_values": 3, "boundaries": (2.0, 2.0)},
      "not 2 rising numbers",
    ),
  ],
)
def test_options_that_do_not_fit(name, options, words):
  with pytest.raises(ConfigError, match=words):
    router = registry.load("routers", name, **options)
    router.init(jax.random.key(0), D, E)


def test_equal_weights_have_no_scores():
  options = {"top_k": 1, "vocab_size": V, "weights": "equal"}
  for more in ({"renormalize": True}, {"score": "sigmoid"}):
    with pytest.raises(ConfigError, match='"equal" has no scores'):
      registry.load("routers", "hash", **options, **more)


def test_groups_that_are_too_small_for_tiles():
  router = registry.load("routers", "tile_rounded", top_k=1, tile=16)
  params, x_TD, side = drawn(0)
  with pytest.raises(ConfigError, match=f"a group of {T} tokens has .* tile"):
    routed(router, of_router(router, params), x_TD, side)


def test_a_feature_that_is_missing():
  router = registry.load("routers", "by_feature", top_k=1, **FEATURE)
  params, x_TD, side = drawn(0)
  side = side.replace(features={"position": np.arange(T)})
  with pytest.raises(ConfigError, match='"timestep".*it gives: position'):
    routed(router, of_router(router, params), x_TD, side)


def test_hash_with_equal_weights_has_nothing_to_learn():
  router = registry.load(
    "routers", "hash", top_k=2, vocab_size=V, weights="equal", seed=3
  )
  assert router.init(jax.random.key(0), D, E) == {}
  params, x_TD, side = drawn(0)
  routing = routed(router, {}, x_TD, side)
  assert (routing.choice.weight_TK == 0.5).all()
  assert routing.logits_TE is None
  expected_TE = np.zeros((T, E))
  for t, experts in enumerate(routing.choice.expert_TK):
    expected_TE[t, experts] = 0.5
  np.testing.assert_array_equal(routing.prob_TE, expected_TE)


def test_a_balanced_table_equals_loads(tmp_path):
  """Greedy by frequency: no expert has more than the rarest ids make up for."""
  rng = np.random.default_rng(0)
  count_V = (1000 / np.arange(1, 401) ** 1.1).round()
  rng.shuffle(count_V)
  table_VK = hash_router.balanced(count_V, E, 2, seed=1)
  assert all(len({*row}) == 2 for row in table_VK.tolist())

  def max_vio(table_VK):
    load_E = np.zeros(E)
    for count, experts in zip(count_V, table_VK):
      for e in experts:
        load_E[e] += count
    return oracle.max_vio(load_E)

  assert max_vio(table_VK) < 0.01
  assert max_vio(hash_router.drawn(400, E, 2, seed=1)) > 0.1
  # Ids that are never seen are spread, too.
  unseen_VK = hash_router.balanced(np.append(count_V, np.zeros(800)), E, 2, 1)
  ids_E = np.bincount(unseen_VK[400:].ravel(), minlength=E)
  assert np.ptp(ids_E) <= 0.2 * ids_E.mean() + np.ptp(
    np.bincount(table_VK.ravel(), minlength=E)
  )
  # By loops: each id takes the two experts that have least.
  load_E = [0.0] * E
  for token in sorted(range(400), key=lambda i: -count_V[i]):
    least = sorted(load_E)[1]
    for e in table_VK[token]:
      assert load_E[e] <= least
    for e in table_VK[token]:
      load_E[e] += count_V[token]
  np.save(tmp_path / "counts.npy", count_V)
  found = hash_router.read_counts(str(tmp_path / "counts.npy"), 400)
  np.testing.assert_array_equal(found, count_V)


def test_what_hash_refuses(tmp_path):
  def refused(**options):
    with pytest.raises(ConfigError) as caught:
      registry.load(
        "routers", "hash", **{"top_k": 2, "vocab_size": V} | options
      )
    return str(caught.value)

  assert "cannot be read" in refused(counts=str(tmp_path / "none.npy"))
  for i, values in enumerate((np.ones(3), -np.ones(V), np.full(V, np.nan))):
    np.save(tmp_path / f"{i}.npy", values)
    text = refused(counts=str(tmp_path / f"{i}.npy"))
    assert f"is not {V} numbers of 0 or more" in text
  (tmp_path / "text.npy").write_text("hello")
  assert "cannot be read" in refused(counts=str(tmp_path / "text.npy"))
  assert "would learn nothing" in refused(top_k=1, renormalize=True)
  router = registry.load("routers", "hash", top_k=2, vocab_size=V)
  params, x_TD, side = drawn(0)
  with pytest.raises(ConfigError, match="needs side.features"):
    routed(router, of_router(router, params), x_TD, side.replace(features={}))


def test_a_decoder_chooses_by_token():
  """The same token has the same experts wherever it stands."""
  c = tiny.get_config()
  c.model.moe.router = {"name": "hash", "vocab_size": 257}
  task = next_token.build(c, prepare=False)
  model = program.build_model(c, task)
  rng = np.random.default_rng(0)
  tokens_BL = rng.integers(0, 257, (1, c.data.seq_len)).astype(np.int32)
  tokens_BL[0, 1::3] = 7
  variables = compiled.init(model, jax.random.key(0))
  _, aux = compiled.apply(model, variables, tokens_BL, collect="routing")
  found = [
    x.expert_TK
    for x in jax.tree.leaves(aux, is_leaf=lambda x: hasattr(x, "expert_TK"))
    if hasattr(x, "expert_TK")
  ]
  assert found
  top_k = c.model.moe.top_k
  for expert in found:
    expert_LK = np.asarray(expert).reshape(-1, c.data.seq_len, top_k)[0]
    assert (expert_LK[1::3] == expert_LK[1]).all()
    assert len(np.unique(expert_LK, axis=0)) > 3


def test_output_masking():
  """NLLB: in training some tokens get nothing, else all weights are smaller."""
  rng = np.random.default_rng(0)
  x_TD, kernel_DE = rng.normal(size=(4000, 8)), rng.normal(size=(8, 4))
  side = Side(jnp.ones(len(x_TD), bool))
  call = {"num_experts": 4, "select": lambda s: s, "side": side}
  weights = {}
  for chance in (0.0, 0.2):
    router = registry.load("routers", "top_k", top_k=2, output_masking=chance)
    for key in (None, jax.random.key(1)):
      choice = router.route({"kernel": kernel_DE}, x_TD, rng=key, **call).choice
      assert choice.valid_TK.all()
      weights[chance, key is None] = np.asarray(choice.weight_TK)
  np.testing.assert_allclose(
    weights[0.2, True], 0.8 * weights[0.0, True], rtol=1e-6
  )
  ratio_TK = weights[0.2, False] / weights[0.0, False]
  assert set(np.unique(ratio_TK)) == {0.0, 1.0}
  assert (ratio_TK[:, 0] == ratio_TK[:, 1]).all()
  assert abs(ratio_TK.mean() - 0.8) < 0.03
