"""Every balancer against plain numpy, values and gradients in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.balancers import batches, dynamics, sweep
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import balancers as balancers_lib
from moe_jax.moe import layer, pool
from moe_jax.moe.balancers import bip, cv_squared, quantile
from moe_jax.moe.routers import top_k as top_k_router
from moe_jax.moe.types import Routing, Side, Stats, TokenChoice
from moe_jax.training import metrics
from tests import oracle

G, S, T, E, K = 2, 3, 12, 6, 2


def load(name, **options):
  return registry.load("balancers", name, **options)


def stats_of(seed=0, observed=None) -> Stats:
  """Drawn sums over G groups of S sequences, in float64."""
  rng = np.random.default_rng(seed)
  count = rng.integers(0, 9, (G, S, E))
  tokens = rng.integers(5, 9, (G, S))
  prob = rng.dirichlet(np.ones(E), (G, S)) * tokens[..., None]
  none = np.zeros((G, S))
  return Stats(
    count_E=count,
    first_choice_E=count // 2,
    kept_E=count,
    weight_E=rng.random((G, S, E)) * count,
    dropped={},
    confidence=none,
    tokens=tokens,
    prob_E=prob,
    z=rng.random((G, S)),
    entropy=rng.random((G, S)) * tokens,
    observed=observed or {},
  )


def routing_of(seed=0, top_k=K) -> tuple[Routing, np.ndarray]:
  """A decision of top-k by sigmoid scores for one group, and its mask."""
  rng = np.random.default_rng(seed)
  logits_TE = rng.normal(size=(T, E)) + np.linspace(0, 1, E)
  score_TE = 1 / (1 + np.exp(-logits_TE))
  mask_T = rng.random(T) < 0.8
  expert_TK = np.argsort(-score_TE, axis=1)[:, :top_k]
  choice = TokenChoice(
    jnp.asarray(expert_TK, jnp.int32),
    jnp.ones((T, top_k)),
    jnp.asarray(np.repeat(mask_T[:, None], top_k, 1)),
  )
  routing = Routing(
    choice,
    prob_TE=jnp.asarray(score_TE / score_TE.sum(1, keepdims=True)),
    logits_TE=jnp.asarray(logits_TE),
    chance_TE=jnp.asarray(rng.random((T, E))),
    score_TE=jnp.asarray(score_TE),
  )
  return routing, mask_T


def by_group(sums):
  """Sums of one group, as statistics hold them: [G = 1, S = 1, ...]."""
  return jax.tree.map(lambda x: np.asarray(x)[None, None], sums)


def loss_of(balancer, stats, params=None, state=None):
  """The loss, in float64."""
  with jax.enable_x64(True):
    state = balancer.init(E) if state is None else state
    stats, state, params = jax.tree.map(
      jnp.asarray, (stats, state, params or {})
    )
    so_far_E = jnp.zeros(E, int)
    return float(balancer.loss(state, stats, so_far_E, params).value())


def check_gradient(balancer, stats, leaf, by_hand, params=None):
  """The gradient of a leaf of the statistics or of the router's kernel."""
  rng = np.random.default_rng(1)
  start = params["kernel"] if leaf == "kernel" else getattr(stats, leaf)
  if leaf == "observed":
    start = start["load_E"]
  towards = rng.normal(size=start.shape)
  towards /= np.linalg.norm(towards)
  numeric = oracle.gradient_along(
    lambda leaves: by_hand(leaves[0]), [start], [towards], eps=1e-4
  )
  with jax.enable_x64(True):

    def loss(x):
      if leaf == "kernel":
        return balancer.loss(
          *(balancer.init(E), jax.tree.map(jnp.asarray, stats)),
          *(jnp.zeros(E, int), {"kernel": x}),
        ).value()
      own = {"load_E": x} if leaf == "observed" else x
      changed = jax.tree.map(jnp.asarray, stats).replace(**{leaf: own})
      state = balancer.init(E)
      return balancer.loss(state, changed, jnp.zeros(E, int), {}).value()

    exact = (jax.grad(loss)(jnp.asarray(start)) * towards).sum()
  assert float(exact) == pytest.approx(numeric, rel=1e-6)


# Losses.


def varied(sum_E):
  """1 + the squared coefficient of variation, by a loop."""
  mean = sum(sum_E) / len(sum_E)
  return 1 + sum((x - mean) ** 2 for x in sum_E) / len(sum_E) / mean**2


@pytest.mark.parametrize("scope", cv_squared.SCOPES)
def test_importance(scope):
  stats = stats_of()
  balancer = load("cv_squared", coefficient=0.5, scope=scope)

  def by_hand(prob_GSE):
    if scope == "micro_batch":
      return 0.5 * varied(prob_GSE.sum((0, 1)))
    total = weight = 0
    for g in range(G):
      if scope == "group":
        tokens = stats.tokens[g].sum()
        total += 0.5 * varied(prob_GSE[g].sum(0)) * tokens
        weight += tokens
      else:
        for s in range(S):
          total += 0.5 * varied(prob_GSE[g, s]) * stats.tokens[g, s]
          weight += stats.tokens[g, s]
    return total / weight

  value = loss_of(balancer, stats)
  assert value == pytest.approx(by_hand(stats.prob_E), rel=1e-9)
  check_gradient(balancer, stats, "prob_E", by_hand)


def test_importance_is_that_of_v_moe():
  """The numbers of the published code's own test, without its constant 1."""
  gates_TE = np.array([[5, 4, 1], [3, 3, 4], [1, 2, 7], [8, 2, 0]]) / 10
  value = cv_squared.squared(jnp.asarray(gates_TE.sum(0)))
  assert float(value) - 1 == pytest.approx(0.03874999, abs=1e-6)


def test_load_is_that_of_v_moe():
  """The smooth loads and the loss of the published code's own test."""
  logits_TE = np.array([[9, 0.6, 0.4], [7, 1.8, 1.2], [8.5, 0.5, 1.0]]) / 10
  noise_TE = np.array([[-37, 26, -18], [-74, 45, -15], [-67, -59, 73]]) / 1000
  noisy_TE = logits_TE + noise_TE
  load_E = np.zeros(3)
  for logits_E, noisy_E in zip(logits_TE, noisy_TE):
    last = sorted(noisy_E)[-2]
    for e in range(3):
      far = (last - logits_E[e]) / 0.1
      load_E[e] += 1 - (1 + math.erf(far / math.sqrt(2))) / 2
  assert varied(load_E) - 1 == pytest.approx(0.48573864536, abs=1e-6)

  router = registry.load("routers", "top_k", top_k=2, noise=0.1)
  assert "chance_TE" in router.gives
  expert_TK = np.argsort(-noisy_TE, axis=1)[:, :2]
  args = map(jnp.asarray, (logits_TE, noisy_TE, expert_TK))
  chance_TE = top_k_router.chances(*args, 0.1)
  np.testing.assert_allclose(chance_TE.sum(0), load_E, rtol=1e-5)
  value = float(cv_squared.squared(chance_TE.sum(0))) - 1
  assert value == pytest.approx(0.48573864536, abs=1e-5)


def test_importance_does_not_see_the_noise():
  """Losses get clean probabilities, weights and choices get noisy ones."""
  rng = np.random.default_rng(0)
  x_TD, kernel_DE = rng.normal(size=(T, 5)), rng.normal(size=(5, E))
  clean_TE = np.exp(x_TD @ kernel_DE)
  clean_TE /= clean_TE.sum(1, keepdims=True)
  for name, options in (("top_k", {"noise": 2.0}), ("noisy_top_k", {})):
    router = registry.load("routers", name, top_k=K, **options)
    params = router.init(jax.random.key(0), 5, E)
    params["kernel"] = jnp.asarray(kernel_DE, jnp.float32)
    recipe = layer.Recipe(E, router, None, None)
    routing = layer.route(
      *(recipe, params, {}, jnp.asarray(x_TD, jnp.float32)[None]),
      Side(jnp.ones((1, T), bool)),
      jax.random.split(jax.random.key(1), 1),
    )
    np.testing.assert_allclose(routing.prob_TE[0], clean_TE, atol=1e-5)
    best_TK = np.argsort(-clean_TE, axis=1)[:, :K]
    assert (routing.choice.expert_TK[0] != best_TK).any(), "no noise at all"


def test_load():
  """Sums of routers' observations are those of a group."""
  routing, mask_T = routing_of()
  balancer = load("cv_squared", coefficient=0.5, of="load")
  observed = balancer.observe({}, routing, jnp.asarray(mask_T))
  load_E = np.float64(routing.chance_TE)[mask_T].sum(0)
  np.testing.assert_allclose(observed["load_E"], load_E, rtol=1e-6)

  rng = np.random.default_rng(2)
  loads = rng.random((G, 1, E)) + 0.1
  stats = stats_of(observed={"load_E": loads})

  def by_hand(loads):
    tokens = stats.tokens.sum(1)
    values = [0.5 * varied(loads[g, 0]) * tokens[g] for g in range(G)]
    return sum(values) / tokens.sum()

  value = loss_of(balancer, stats)
  assert value == pytest.approx(by_hand(loads), rel=1e-9)
  check_gradient(balancer, stats, "observed", by_hand)


@pytest.mark.parametrize("of", ["assignments", "tokens"])
def test_device(of):
  """D sum_d f_d P_d, by loops over the devices."""
  devices, size = 3, E // 3
  balancer = load(
    "device", coefficient=0.5, devices=devices, of=of, scope="group"
  )
  rng = np.random.default_rng(3)
  sent = rng.integers(1, 9, (G, 1, devices))
  stats = stats_of(observed={"sent": sent} if of == "tokens" else {})

  def by_hand(prob_GSE):
    total = weight = 0
    for g in range(G):
      counts_E, prob_E = stats.count_E[g].sum(0), prob_GSE[g].sum(0)
      loss = 0
      for d in range(devices):
        mine = slice(d * size, (d + 1) * size)
        count, whole = counts_E[mine].sum(), counts_E.sum()
        if of == "tokens":
          count, whole = sent[g, 0, d], sent[g, 0].sum()
        loss += count / whole * prob_E[mine].sum() / prob_E.sum()
      total += 0.5 * devices * loss * stats.tokens[g].sum()
      weight += stats.tokens[g].sum()
    return total / weight

  value = loss_of(balancer, stats)
  assert value == pytest.approx(by_hand(stats.prob_E), rel=1e-9)
  check_gradient(balancer, stats, "prob_E", by_hand)


@pytest.mark.parametrize("of", ["assignments", "tokens"])
def test_device_where_m_devices_share_all(of):
  """1 where devices are equal, and D/m."""
  devices, size = 3, E // 3
  balancer = load(
    "device", coefficient=1.0, devices=devices, of=of, scope="group"
  )
  for m in (1, 2, 3):
    used_E = (np.arange(E) < m * size) / (m * size)
    prob_E = np.broadcast_to(used_E, (G, 1, E))
    sent = np.broadcast_to((np.arange(devices) < m) * 6, (G, 1, devices))
    stats = stats_of(observed={"sent": sent} if of == "tokens" else {})
    stats = stats.replace(prob_E=prob_E * 12, count_E=(prob_E * 12).astype(int))
    assert loss_of(balancer, stats) == pytest.approx(devices / m, rel=1e-9)


def test_device_counts_a_token_once_for_a_device():
  routing, mask_T = routing_of(top_k=3)
  balancer = load(
    "device", coefficient=1.0, devices=2, of="tokens", scope="group"
  )
  sent = balancer.observe({}, routing, jnp.asarray(mask_T))["sent"]
  expected = np.zeros(2)
  for experts, real in zip(np.asarray(routing.choice.expert_TK), mask_T):
    for d in {e // 3 for e in experts.tolist()}:
      expected[d] += real
  np.testing.assert_array_equal(sent, expected)
  assert expected.sum() < 3 * mask_T.sum()


@pytest.mark.parametrize("norm", ["l1", "squared"])
def test_orthogonality(norm):
  rng = np.random.default_rng(4)
  params = {"kernel": rng.normal(size=(5, E))}
  balancer = load("orthogonality", coefficient=0.5, norm=norm)

  def by_hand(kernel_DE):
    total = 0
    for i in range(E):
      for j in range(E):
        a, b = kernel_DE[:, i], kernel_DE[:, j]
        if norm == "squared":
          a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
          total += (a @ b - (i == j)) ** 2
        else:
          total += abs(a @ b - (i == j))
    return 0.5 * total

  value = loss_of(balancer, stats_of(), params)
  assert value == pytest.approx(by_hand(params["kernel"]), rel=1e-9)
  check_gradient(balancer, stats_of(), "kernel", by_hand, params)
  orthogonal = {"kernel": np.eye(E)}
  assert loss_of(balancer, stats_of(), orthogonal) == 0


def test_entropy():
  stats = stats_of()
  balancer = load("entropy", coefficient=0.5)
  by_hand = lambda x: 0.5 * x.sum() / stats.tokens.sum()  # noqa: E731
  value = loss_of(balancer, stats)
  assert value == pytest.approx(by_hand(stats.entropy), rel=1e-9)
  check_gradient(balancer, stats, "entropy", by_hand)


@pytest.mark.parametrize("balanced", [True, False])
def test_l1(balanced):
  """2412.14711, eq. 8: f_e w_e over the tokens, with f = 1 at even loads."""
  stats = stats_of()
  balancer = load("l1", experts=2.0, start=0.25, balanced=balanced)
  tokens = stats.tokens.sum()

  def by_hand(weight_GSE):
    total = 0
    for e in range(E):
      share = E * stats.count_E[..., e].sum() / (2.0 * tokens)
      total += (share if balanced else 1) * weight_GSE[..., e].sum()
    return 0.25 * total / tokens

  value = loss_of(balancer, stats)
  assert value == pytest.approx(by_hand(stats.weight_E), rel=1e-9)
  check_gradient(balancer, stats, "weight_E", by_hand)


def test_l1_moves_its_coefficient():
  stats = stats_of()
  mean = stats.count_E.sum() / stats.tokens.sum()
  for experts, factor in ((mean / 2, 1.2), (mean * 2, 1 / 1.2)):
    balancer = load("l1", experts=float(experts), start=1e-3, factor=1.2)
    state = balancer.update(balancer.init(E), stats, 0)
    assert float(state["coefficient"]) == pytest.approx(1e-3 * factor)
  # Ends hold.
  balancer = load("l1", experts=1e-3, start=0.5, highest=0.5)
  state = balancer.update(balancer.init(E), stats, 0)
  assert float(state["coefficient"]) == 0.5


def test_adaptive():
  """The switch loss, times a coefficient that follows MaxVio."""
  stats = stats_of()
  max_vio = oracle.max_vio(stats.count_E.sum((0, 1)))
  switch = loss_of(load("switch", coefficient=1.0), stats)
  for target, factor in ((max_vio / 2, 1.5), (max_vio * 2, 1 / 1.5)):
    balancer = load("adaptive", target=float(target), start=0.1, factor=1.5)
    assert loss_of(balancer, stats) == pytest.approx(0.1 * switch, rel=1e-7)
    state = balancer.update(balancer.init(E), stats, 0)
    assert float(state["coefficient"]) == pytest.approx(0.1 * factor)
    again = loss_of(balancer, stats, state=jax.tree.map(np.asarray, state))
    assert again == pytest.approx(0.1 * factor * switch, rel=1e-6)


# Selections.


def bias_by_hand(counts, *, rule, rate, gain, damping, targets):
  """Positions of the controller for a list of loads, from its definition."""
  bias_E, sum_E, before_E = np.zeros(E), np.zeros(E), np.zeros(E)
  for count_E in counts:
    mean = sum(count_E) / E
    goal_E = [mean if targets is None else t * sum(count_E) for t in targets]
    error_E = np.array([(g - c) / mean for g, c in zip(goal_E, count_E)])
    sum_E = sum_E + error_E
    if rule == "pid":
      change_E = error_E - before_E
      bias_E = rate * sum_E + gain * error_E + damping * change_E
    else:
      step_E = np.sign(error_E) if rule == "sign" else error_E
      bias_E = bias_E + rate * step_E
    before_E = error_E
  return bias_E


@pytest.mark.parametrize("rule", ["sign", "proportional", "pid"])
def test_bias_toward_targets(rule):
  targets = (0.3, 0.2, 0.2, 0.1, 0.1, 0.1)
  options = {"rule": rule, "rate": 0.01, "targets": targets}
  blocks = ((1, 0.3), (2, 0.4), (3, 0.3))
  more = {"gain": 0.2, "damping": 0.3}
  balancer = load(
    *("bias",), **options | {"targets": blocks}, **more if rule == "pid" else {}
  )
  with jax.enable_x64(True):
    state, counts = balancer.init(E), []
    for step in range(5):
      stats = stats_of(step)
      state = balancer.update(state, stats, step)
      counts.append(stats.count_E.sum((0, 1)))
      expected_E = bias_by_hand(counts, **options, **more)
      np.testing.assert_allclose(state["bias_E"], expected_E, rtol=1e-9)


def test_bias_that_multiplies():
  balancer = load("bias", rate=0.01, form="multiply")
  state = balancer.init(E)
  score_TE = np.random.default_rng(0).random((T, E)).astype(np.float32)
  select = lambda state: balancer.select(state, score_TE, None)  # noqa: E731
  np.testing.assert_array_equal(select(state), score_TE)
  stats = stats_of()
  state = balancer.update(state, stats, 0)
  count_E = stats.count_E.sum((0, 1))
  factor_E = 1 + 0.01 * np.sign(count_E.mean() - count_E)
  np.testing.assert_allclose(select(state), score_TE * factor_E, rtol=1e-6)
  centered = load("bias", rate=0.01, form="multiply", centered=True)
  state = centered.update(centered.init(E), stats, 0)
  assert float(state["bias_E"].mean()) == pytest.approx(1)


def quantile_by_hand(score_TE, bias_E, mask_T, top_k):
  """The exact bias: cutoffs by sorting, and the two values around each quantile."""
  far = [[] for _ in range(E)]
  for t in np.flatnonzero(mask_T):
    cutoff = sorted(score_TE[t] + bias_E)[-(top_k + 1)]
    for e in range(E):
      far[e].append(cutoff - score_TE[t, e])
  # K/E of the tokens lie below the quantile.
  at = len(far[0]) * top_k / E
  whole = int(at)
  ends = [(v[max(whole - 1, 0)], v[whole]) for v in map(sorted, far)]
  return np.array(ends).T


@pytest.mark.parametrize("bins", [100, 1000])
@pytest.mark.parametrize(
  "tokens,width", [(200, None), (5000, None), (5000, 2.0)]
)
def test_quantile_within_a_bin_of_the_exact_one(bins, tokens, width):
  """Scores are between 0 and 1, or `width` from 0 at most."""
  rng = np.random.default_rng(5)
  balancer, most = load("quantile", bins=bins, width=width), 1.0
  logits_TE = rng.normal(size=(tokens, E)) + np.linspace(0, 2, E)
  score_TE = 1 / (1 + np.exp(-logits_TE))
  if width is not None:
    score_TE, most = width * (2 * score_TE - 1), 2 * width
  mask_T = rng.random(tokens) < 0.9
  choice = TokenChoice(
    *(jnp.zeros((tokens, K), jnp.int32), jnp.ones((tokens, K))),
    jnp.asarray(np.repeat(mask_T[:, None], K, 1)),
  )
  with jax.enable_x64(True):
    state = balancer.init(E)
    routing = Routing(choice, score_TE=jnp.asarray(score_TE))
    for _ in range(3):
      before_E = np.asarray(state["bias_E"], float)
      observed = by_group(balancer.observe(state, routing, mask_T))
      stats = stats_of(observed=observed)
      state = balancer.update(state, stats, 0)
      lower_E, upper_E = quantile_by_hand(score_TE, before_E, mask_T, K)
      step = (2 * most + np.ptp(before_E)) / bins
      found_E = quantile.quantiles(
        *(observed["far_EB"][0, 0], mask_T.sum() * K / E),
        *(before_E.min() - most, before_E.max() + most),
      )
      assert (lower_E - step <= found_E).all()
      assert (found_E <= upper_E + step).all()
      np.testing.assert_allclose(found_E - found_E.mean(), state["bias_E"])
      counts = observed["far_EB"][0, 0]
      assert (counts.sum(1) == mask_T.sum()).all()


def test_quantile_balances_at_once():
  """From a skewed start, loads of new tokens are even after few steps."""
  rng = np.random.default_rng(6)
  tokens, skew_E = 20_000, np.linspace(0, 2, E)
  balancer = load("quantile")
  state, vios = balancer.init(E), []
  for _ in range(12):
    logits_TE = rng.normal(size=(tokens, E)) + skew_E
    score_TE = jnp.asarray(1 / (1 + np.exp(-logits_TE)), jnp.float32)
    mask_T = jnp.ones(tokens, bool)
    biased_TE = balancer.select(state, score_TE, mask_T)
    expert_TK = np.argsort(-np.asarray(biased_TE), axis=1)[:, :K]
    vios.append(oracle.max_vio(np.bincount(expert_TK.ravel(), minlength=E)))
    choice = TokenChoice(
      jnp.asarray(expert_TK, jnp.int32),
      jnp.ones((tokens, K)),
      jnp.ones((tokens, K), bool),
    )
    routing = Routing(choice, score_TE=score_TE)
    observed = by_group(balancer.observe(state, routing, mask_T))
    state = balancer.update(state, stats_of(observed=observed), 0)
  assert vios[0] > 0.8 and vios[-1] < 0.05


def test_quantile_keeps_a_moving_average():
  routing, mask_T = routing_of()
  plain, slow = load("quantile"), load("quantile", decay=0.75)
  state = plain.init(E)
  sums = by_group(plain.observe(state, routing, jnp.asarray(mask_T)))
  stats = stats_of(observed=sums)
  whole_E = plain.update(state, stats, 0)["bias_E"]
  part_E = slow.update(state, stats, 0)["bias_E"]
  np.testing.assert_allclose(part_E, 0.25 * whole_E, rtol=1e-6)
  assert float(abs(whole_E.mean())) < 1e-6 < float(abs(whole_E).max())


def test_threshold_is_the_quantile_of_the_scores():
  balancer = load("threshold", share=0.25, decay=0.5, bins=1000)
  state, expected = balancer.init(E), None
  for seed in range(3):
    routing, mask_T = routing_of(seed)
    sums = by_group(balancer.observe(state, routing, jnp.asarray(mask_T)))
    state = balancer.update(state, stats_of(observed=sums), seed)
    ranked_TE = np.sort(np.asarray(routing.score_TE)[mask_T], axis=0)
    # The quantile lies between two neighbours.
    above = int(0.75 * mask_T.sum())
    ends = ranked_TE[above - 1], ranked_TE[above]
    if expected is None:
      expected = ends
    else:
      expected = [(a + b) / 2 for a, b in zip(expected, ends)]
    found_E = np.asarray(state["threshold_E"])
    assert (found_E >= expected[0] - 2e-3).all()
    assert (found_E <= expected[1] + 2e-3).all()
  score_TE = jnp.ones((2, E))
  np.testing.assert_allclose(
    balancer.select(state, score_TE, None)[0], 1 - state["threshold_E"]
  )


def prices_by_hand(score_TE, mask_T, sweeps):
  """2502.15451: the two prices in turn, by sorting."""
  real, price_E = np.flatnonzero(mask_T), np.zeros(E)
  full = len(real) * K // E
  for _ in range(sweeps):
    price_T = {}
    for t in real:
      price_T[t] = max(0, sorted(score_TE[t] - price_E)[-(K + 1)])
    for e in range(E):
      left = sorted((score_TE[t, e] - price_T[t] for t in real), reverse=True)
      next_, last = left[full], left[full - 1]
      price_E[e] = (max(0, next_) + max(0, last)) / 2 if next_ > 0 else 0
  return price_E


@pytest.mark.parametrize("sweeps", [1, 2, 8])
def test_bip(sweeps):
  """The prices of a group; padding has none."""
  for seed in range(3):
    routing, mask_T = routing_of(seed)
    with jax.enable_x64(True):
      score_TE = jnp.asarray(np.float64(routing.score_TE))
      price_E = bip.prices(score_TE, jnp.asarray(mask_T), K, sweeps)
      expected_E = prices_by_hand(np.asarray(score_TE), mask_T, sweeps)
      np.testing.assert_allclose(price_E, expected_E, rtol=1e-9)
      balancer = load("bip", top_k=K, sweeps=sweeps)
      moved_TE = balancer.select({}, score_TE, jnp.asarray(mask_T))
      np.testing.assert_allclose(
        score_TE - moved_TE, np.tile(expected_E, (T, 1)), atol=1e-12
      )
  assert not balancer.causal


def test_bip_balances_from_the_first_step():
  rng = np.random.default_rng(7)
  tokens = 600
  logits_TE = rng.normal(size=(tokens, E)) + np.linspace(0, 2, E)
  score_TE = jnp.asarray(1 / (1 + np.exp(-logits_TE)), jnp.float32)
  loads = {}
  for sweeps in (1, 16):
    balancer = load("bip", top_k=K, sweeps=sweeps)
    moved_TE = balancer.select({}, score_TE, jnp.ones(tokens, bool))
    expert_TK = np.argsort(-np.asarray(moved_TE), axis=1)[:, :K]
    count_E = np.bincount(expert_TK.ravel(), minlength=E)
    loads[sweeps] = oracle.max_vio(count_E)
  start = np.argsort(-np.asarray(score_TE), axis=1)[:, :K]
  before = oracle.max_vio(np.bincount(start.ravel(), minlength=E))
  assert before > 0.8 and loads[16] < 0.05 and loads[16] < loads[1] < before


# What does not fit.


@pytest.mark.parametrize(
  "options,words",
  [
    ({"targets": ((2, 1.0),)}, "2 shares for num_experts = 6"),
    ({"targets": ((1, 0.7), (5, 0.3))}, "at most 0.5"),
    ({"targets": ((1, 0.7), (5, 0.4))}, "add up to 1.1"),
    ({"gain": 0.1}, 'are of rule = "pid"'),
  ],
)
def test_biases_that_cannot_be(options, words):
  with pytest.raises(ConfigError, match=words):
    balancer = load("bias", rate=0.1, **options)
    check({"b": balancer}, "top_k")


def check(balancers, router, **options):
  router = registry.load("routers", router, **{"top_k": K} | options)
  recipe = layer.Recipe(E, router, None, None, balancers=(*balancers.items(),))
  balancers_lib.check(recipe, "model.moe")


@pytest.mark.parametrize(
  "balancer,router,words",
  [
    ({"name": "bias", "rate": 0.1}, {"name": "relu"}, "can shift"),
    ({"name": "bias", "rate": 0.1}, {"name": "random"}, "can shift"),
    ({"name": "switch", "coefficient": 0.1}, {"name": "random"}, "uneven"),
    (
      {"name": "switch", "coefficient": 0.1},
      {"name": "expert_choice"},
      "can be uneven",
    ),
    (
      {"name": "entropy", "coefficient": 0.1},
      {"name": "random"},
      "a loss can change",
    ),
    ({"name": "quantile"}, {"name": "tile_rounded", "tile": 4}, "fixed number"),
    (
      {"name": "bias", "rate": 0.1},
      {"name": "by_feature", "feature": "domain", "num_values": 2},
      "can shift",
    ),
    ({"name": "z_loss", "coefficient": 0.1}, {"name": "soft"}, "logits"),
    (
      {"name": "quantile"},
      {"name": "top_k", "score": "sqrt_softplus"},
      "between 0 and 1",
    ),
    (
      {"name": "cv_squared", "of": "load", "coefficient": 0.1},
      {"name": "top_k"},
      "noise",
    ),
    ({"name": "l1", "experts": 2.0}, {"name": "top_k"}, "above 0"),
    (
      {"name": "bias", "rate": 0.1, "form": "multiply"},
      {"name": "top_k", "score_before_top_k": False},
      "between 0 and 1",
    ),
    (
      {"name": "quantile"},
      {"name": "top_k", "num_expert_groups": 2},
      "not inside of groups",
    ),
    (
      {"name": "cv_squared", "of": "load", "coefficient": 0.1},
      {"name": "top_k", "noise": 0.1, "num_expert_groups": 2},
      "noise",
    ),
    ({"name": "quantile"}, {"name": "expert_choice"}, "can shift"),
    (
      {"name": "device", "coefficient": 0.1, "devices": 2, "of": "tokens"}
      | {"scope": "group"},
      {"name": "soft"},
      "uneven",
    ),
  ],
)
def test_routers_and_balancers_that_do_not_fit(balancer, router, words):
  balancer, router = dict(balancer), dict(router)
  made = load(balancer.pop("name"), **balancer)
  with pytest.raises(ConfigError, match=rf"balancers\.b needs .*{words}"):
    check({"b": made}, router.pop("name"), **router)


def test_a_router_that_needs_a_balancer():
  with pytest.raises(ConfigError, match="needs a threshold for each expert"):
    check({}, "expert_threshold")
  check({"t": load("threshold", share=K / E)}, "expert_threshold")
  # Wider scores are right where somebody says how wide.
  check({"q": load("quantile", width=5.0)}, "top_k", score="sqrt_softplus")
  with pytest.raises(ConfigError, match="between 0 and 1"):
    check({"b": load("bip", top_k=2)}, "top_k", score_before_top_k=False)


@pytest.mark.parametrize(
  "balancer,router,words",
  [
    ({"name": "bip", "top_k": 3}, {"name": "top_k"}, "is for 3 .* has 2; make"),
    (
      {"name": "threshold", "share": 0.25},
      {"name": "expert_threshold", "average": 2.0},
      "is for 1.5 .* has 2; make .* average or top_k agree",
    ),
    ({"name": "l1", "experts": 1.0}, {"name": "relu"}, "is for 1 .* has 2;"),
  ],
)
def test_balancers_for_another_number_of_experts(balancer, router, words):
  balancer, router = dict(balancer), dict(router)
  made = load(balancer.pop("name"), **balancer)
  with pytest.raises(ConfigError, match=words):
    check({"b": made}, router.pop("name"), **router)


def test_two_balancers_that_shift_scores_are_refused():
  """Each would make up for what the other one does."""
  both = {"a": load("quantile"), "b": load("bias", rate=1e-3)}
  with pytest.raises(ConfigError, match="balancers a and b both shift"):
    check(both, "top_k", score="sigmoid")


def test_smooth_loads_are_of_scores_that_nobody_shifts():
  """Chances do not know of the shift, so that they are not those of the choice."""
  both = {
    "a": load("cv_squared", of="load", coefficient=0.1),
    "b": load("bias", rate=1e-3),
  }
  with pytest.raises(
    ConfigError, match=r"balancers\.a computes .*balancers\.b, "
  ):
    check(both, "top_k", noise=0.1)


@pytest.mark.parametrize("bins,width", [(19, None), (100, 3.0)])
def test_bins_that_are_too_coarse(bins, width):
  with pytest.raises(ConfigError, match=f"bins = {bins} .* raise bins"):
    load("quantile", bins=bins, width=width)


@pytest.mark.parametrize(
  "name,options",
  [("adaptive", {"target": 0.1}), ("l1", {"experts": 2.0})],
)
def test_a_coefficient_begins_between_its_ends(name, options):
  balancer = load(name, **options, lowest=2.0, start=9.0, highest=3.0)
  assert balancer.init(E)["coefficient"] == 3
  with pytest.raises(ConfigError, match="lowest = 2 is above highest = 1"):
    load(name, **options, lowest=2.0, highest=1.0)


def test_a_target_that_loads_never_reach():
  most = E / K - 1
  check({"a": load("adaptive", target=0.99 * most)}, "top_k")
  words = rf"balancers\.a\.target = {most:g} is not below {most:g}"
  with pytest.raises(ConfigError, match=words):
    check({"a": load("adaptive", target=most)}, "top_k")
  # A token may have fewer experts than K.
  check({"a": load("adaptive", target=most)}, "top_p")


def test_losses_of_devices_are_not_for_cheap_experts():
  """Their borders would lie elsewhere than those of the networks."""
  router = registry.load("routers", "top_k", top_k=K)
  balancer = load("device", coefficient=0.1, devices=3)
  options = dict(balancers=(("d", balancer),), cheap=pool.build(zero=3))
  recipe = layer.Recipe(E, router, None, None, **options)
  with pytest.raises(ConfigError, match="without cheap experts, .* has 3"):
    balancers_lib.check(recipe, "model.moe")


def test_the_committed_dynamics():
  """Their table in the README is that of the committed rows, for every balancer."""
  rows = dynamics.read()
  assert [row["balancer"] for row in rows] == [*dynamics.BALANCERS]
  text = (dynamics.FOLDER.parent / "README.md").read_text()
  assert dynamics.table(rows) in text
  used = {
    own["name"] for _, some in dynamics.BALANCERS.values() for own in some
  }
  assert used >= {*registry.names("balancers")}


def test_the_dynamics_of_a_rule(monkeypatch):
  """Loads are skewed at first and even after ten steps, as in the committed rows."""
  monkeypatch.setattr(dynamics, "STEPS", 20)
  row = next(r for r in dynamics.read() if r["balancer"] == "proportional")
  recipe = dynamics.recipe_of(*dynamics.BALANCERS["proportional"])
  loads_SE = dynamics.loads_of(recipe, dynamics.start(), jax.random.key(0))
  assert (np.sum(loads_SE, axis=1) == dynamics.T * dynamics.K).all()
  floor = metrics.max_vio_floor(dynamics.T, dynamics.E, dynamics.K)
  vio_S = dynamics.max_vio(loads_SE) / floor
  assert vio_S[0] == pytest.approx(float(row["first"]), rel=1e-3)
  near = vio_S <= dynamics.NEAR
  assert near.argmax() == int(row["steps"]) == 10 and near[10:].all()


def test_when_loads_have_settled():
  far, near = np.full(30, 9.0), np.full(50, 1.2)
  assert dynamics.settled(np.concatenate([far, near]), 1.0) == 30
  assert dynamics.settled(np.concatenate([near, far]), 1.0) is None
  assert dynamics.settled(near, 1.0) == 0


def test_the_committed_loads_over_batches():
  """Their table is that of the committed rows, for every arm of the headline."""
  rows = batches.read()
  text = (batches.FOLDER.parent / "README.md").read_text()
  assert batches.table(rows) in text
  pairs = {(row["arm"], row["seed"]) for row in rows}
  assert pairs == {(arm, n) for arm in sweep.HEADLINE for n in range(8)}


def test_loads_over_batches_of_growing_size():
  """Windows that are each about one thing are even together, and batches differ."""
  windows_NRE = np.tile(np.eye(4)[:, None], (2, 3, 1)) * 10
  rows = batches.by_size(windows_NRE, length=10, top_k=1)
  assert [row["tokens"] for row in rows] == [10, 20, 40, 80]
  assert rows[0]["max_vio"] == 3 and rows[-1]["max_vio"] == 0
  found = [row["max_vio"] for row in rows]
  assert found == sorted(found, reverse=True)
  order_N = np.random.default_rng(0).permutation(8) % 4
  halves = [
    np.bincount(half, minlength=4) for half in (order_N[:4], order_N[4:])
  ]
  by_hand = np.mean([half.max() / half.mean() - 1 for half in halves])
  assert found[2] == pytest.approx(by_hand)
