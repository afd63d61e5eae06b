"""Auxiliary-loss-free balancing does what it is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core import registry
from moe_jax.moe import layer
from moe_jax.moe.types import Side, Stats
from tests import oracle

T, E, K = 1024, 8, 2
STEPS, LAST = 400, 100


def stats_of(count_E) -> Stats:
  """Statistics in which only the loads are set, [1, 1, E]."""
  count_GSE = jnp.asarray(count_E, jnp.int32).reshape(1, 1, -1)
  none = jnp.zeros((1, 1))
  return Stats(
    tokens=count_GSE.sum(-1) // K,
    **loads_of(count_GSE),
    prob_E=jnp.zeros(count_GSE.shape),
    z=none,
    entropy=none,
  )


def loads_of(count_GSE) -> dict:
  """Loads of which everything has a slot, and every choice is a first one."""
  return dict(
    count_E=count_GSE,
    first_choice_E=count_GSE,
    kept_E=count_GSE,
    weight_E=count_GSE.astype(np.float32),
    dropped={},
    confidence=np.zeros(count_GSE.shape[:2], np.float32),
  )


def max_vio(count_E):
  """MaxVio of loads with any leading axes."""
  count_E = np.float64(count_E)
  return count_E.max(-1) / count_E.mean(-1) - 1


def random_floor(seed=0, trials=300):
  """MaxVio of T tokens that each draw K distinct experts uniformly."""
  rng = np.random.default_rng(seed)
  chosen = rng.random((trials, T, E)).argsort(-1)[..., :K]
  counts = (chosen[..., None] == np.arange(E)).sum((1, 2))
  assert np.isclose(max_vio(counts[0]), oracle.max_vio(counts[0]))
  return max_vio(counts).mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def loads(balancer, router, skew_E, rng):
  """Loads of every step of route, count, update on fresh scores."""
  params = {"kernel": jnp.eye(E)}
  mask_T = jnp.ones(T, bool)

  def one_step(state, step):
    # The router's kernel is the identity, so its logits are its input.
    x_TD = jax.random.normal(jax.random.fold_in(rng, step), (T, E))
    routing = router.route(
      params,
      x_TD + skew_E[None],
      num_experts=E,
      select=lambda score_TE: balancer.select(state, score_TE, mask_T),
      side=Side(mask_T),
      rng=None,
    )
    count_E = jnp.zeros(E, jnp.int32).at[routing.choice.expert_TK].add(1)
    return balancer.update(state, stats_of(count_E), step), count_E

  state, count_E = jax.lax.scan(
    one_step, balancer.init(E), jnp.arange(STEPS, dtype=jnp.int32)
  )
  return state, count_E


@pytest.mark.parametrize(
  "score,rule,rate",
  [
    ("sigmoid", "sign", 2e-3),
    ("sigmoid", "proportional", 2e-2),
    ("softmax", "sign", 1e-3),
  ],
)
def test_bias_balances(score, rule, rate):
  """Down to what a random router would do, from many times that."""
  balancer = registry.load("balancers", "bias", rate=rate, rule=rule)
  router = registry.load("routers", "top_k", top_k=K, score=score)
  skew_E = jnp.linspace(-0.5, 0.5, E)
  state, count_E = loads(balancer, router, skew_E, jax.random.key(0))
  count_E = np.asarray(count_E)
  assert (count_E.sum(1) == T * K).all()
  floor = random_floor()
  assert max_vio(count_E[:5]).mean() > 5 * floor
  assert max_vio(count_E[-LAST:]).mean() < 1.5 * floor
  # The more an expert is liked, the lower its bias.
  assert (np.diff(state["bias_E"]) < 0).all()


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("centered", [False, True])
def test_update_against_the_oracle(rule, centered):
  balancer = registry.load(
    "balancers", "bias", rate=0.01, rule=rule, centered=centered
  )
  rng = np.random.default_rng(0)
  state, bias_E = balancer.init(E), np.zeros(E)
  update = jax.jit(balancer.update)
  for step in range(20):
    count_E = rng.integers(0, 30, E)
    state = update(state, stats_of(count_E), step)
    bias_E = oracle.bias_update(bias_E, count_E, 0.01, rule, centered)
    np.testing.assert_allclose(state["bias_E"], bias_E, atol=1e-6)
  if centered:
    assert abs(state["bias_E"].mean()) < 1e-6


def test_rules_by_hand():
  """Loads 0, 2, 4, 10 of mean 4."""
  stats = stats_of([0, 2, 4, 10])
  sign = registry.load("balancers", "bias", rate=0.5)
  state = sign.update(sign.init(4), stats, 0)
  np.testing.assert_array_equal(state["bias_E"], [0.5, 0.5, 0, -0.5])
  proportional = registry.load(
    "balancers", "bias", rate=0.5, rule="proportional"
  )
  state = proportional.update(proportional.init(4), stats, 0)
  np.testing.assert_allclose(state["bias_E"], [0.5, 0.25, 0, -0.75])


@pytest.mark.parametrize("experts", [3, 7, 60, 64, 384])
def test_the_sign_rule_is_exact(experts):
  """Experts whose load is the mean stay, also where 1/E is no exact float."""
  sign = registry.load("balancers", "bias", rate=1.0)
  update = jax.jit(sign.update)
  rng = np.random.default_rng(experts)
  at_the_mean = np.full(experts, 100)
  at_the_mean[:2] = 101, 99
  one_above = at_the_mean + (np.arange(experts) == 2)  # No load is the mean.
  large = rng.integers(0, 2**31 // experts, experts)
  for count_E in (at_the_mean, one_above, rng.integers(0, 9, experts), large):
    # The mean as a fraction: E * load against the sum, in whole numbers.
    excess_E = [experts * int(c) - int(count_E.sum()) for c in count_E]
    state = update(sign.init(experts), stats_of(count_E), 0)
    np.testing.assert_array_equal(state["bias_E"], -np.sign(excess_E))


def test_shares_of_a_mixture_move_the_bias_too():
  """Loads that are no whole numbers."""
  sign = registry.load("balancers", "bias", rate=0.5)
  stats = stats_of([0, 2, 4, 10])
  share_E = stats.count_E / 3
  stats = stats.replace(count_E=share_E)
  state = sign.update(sign.init(4), stats, 0)
  assert np.sign(state["bias_E"])[[0, 1, 3]].tolist() == [1, 1, -1]


def test_freeze():
  balancer = registry.load("balancers", "bias", rate=0.5, freeze_after=2)
  stats, state = stats_of([0, 2, 4, 10]), balancer.init(4)
  biases = []
  for step in range(4):
    state = jax.jit(balancer.update)(state, stats, step)
    biases.append(np.asarray(state["bias_E"]))
  np.testing.assert_array_equal(biases[0], [0.5, 0.5, 0, -0.5])
  np.testing.assert_array_equal(biases[1], 2 * biases[0])
  np.testing.assert_array_equal(biases[2], biases[1])
  np.testing.assert_array_equal(biases[3], biases[1])


def test_centered_chooses_the_same():
  """Subtracting one number from all scores changes no choice."""
  router = registry.load("routers", "top_k", top_k=K, score="sigmoid")
  skew_E = jnp.linspace(-0.5, 0.5, E)
  results = []
  for centered in (False, True):
    balancer = registry.load(
      "balancers", "bias", rate=2e-3, rule="proportional", centered=centered
    )
    results.append(loads(balancer, router, skew_E, jax.random.key(1)))
  (state, _), (centered_state, _) = results
  assert abs(state["bias_E"].mean()) < 1e-5, "proportional sums to zero itself"
  np.testing.assert_allclose(
    centered_state["bias_E"], state["bias_E"], atol=1e-4
  )


def test_biases_of_several_balancers_add_up():
  balancer = registry.load("balancers", "bias", rate=1.0)
  recipe = layer.Recipe(
    num_experts=E,
    router=registry.load("routers", "top_k", top_k=1),
    dispatcher=registry.load("dispatchers", "gather"),
    experts=None,
    balancers=(("a", balancer), ("b", balancer)),
  )
  first, second = np.zeros((2, E), np.float32)
  first[2] = second[5] = 10
  both = {"a": {"bias_E": first}, "b": {"bias_E": second + 2 * first}}
  x_GTD = np.zeros((1, 4, E), np.float32)
  side = Side(np.ones((1, 4), bool))
  params = {"kernel": np.eye(E, dtype=np.float32)}
  route = functools.partial(layer.route, recipe, params)
  assert (route(both, x_GTD, side, None).choice.expert_TK == 2).all()
  swapped = {"a": {"bias_E": second}, "b": {"bias_E": first * 0}}
  assert (route(swapped, x_GTD, side, None).choice.expert_TK == 5).all()


def test_scope_sequence_sums_the_groups_of_a_sequence():
  """Two sequences, each cut into two groups, are two terms and not four."""
  count = np.array([[4, 0, 0], [0, 4, 0], [2, 2, 0], [0, 0, 4]], np.int32)
  zero = np.zeros((4, 1), np.int32)
  halves = Stats(
    tokens=count.sum(1).reshape(4, 1),
    **loads_of(count[:, None]),
    prob_E=count[:, None].astype(np.float32),
    z=zero,
    entropy=zero,
    groups_per_sequence=2,
  )
  switch = registry.load(
    "balancers", "switch", coefficient=1.0, scope="sequence"
  )
  # f = P = (1/2, 1/2, 0), then (1/4, 1/4, 1/2): 3 * 1/2 and 3 * 3/8.
  loss = switch.loss({}, halves, np.zeros(3, np.int32), {}).value()
  np.testing.assert_allclose(loss, (1.5 + 1.125) / 2, rtol=1e-6)


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_small_scores_do_not_escape_the_loss(score):
  """The load loss is of shares, whatever size the scores have.

  A constant in the division would let a router lower all scores instead of
  balancing them.
  """
  router = registry.load("routers", "top_k", top_k=K, score=score)
  loss = registry.load("balancers", "switch", coefficient=1.0)
  skew_E = jnp.linspace(0, 2, E)
  values = []
  for lower in (0.0, 20.0, 60.0, 90.0):
    x_TD = jnp.tile(skew_E[None] - lower, (T, 1))
    routing = router.route(
      {"kernel": jnp.eye(E)},
      x_TD,
      num_experts=E,
      select=lambda score_TE: score_TE,
      side=Side(jnp.ones(T, bool)),
      rng=None,
    )
    count_E = jnp.zeros(E, jnp.int32).at[routing.choice.expert_TK].add(1)
    stats = stats_of(count_E)
    stats = stats.replace(prob_E=routing.prob_TE.sum(0).reshape(1, 1, -1))
    values.append(float(loss.loss({}, stats, jnp.zeros(E, int), {}).value()))
  assert min(values) > 1.1
  # Far below zero a score is the exponential of its logit, and shares stay.
  np.testing.assert_allclose(values[1:], values[1], rtol=1e-3)
