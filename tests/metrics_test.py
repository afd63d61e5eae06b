"""Metrics by their definitions, against the oracle where it has them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core import registry
from moe_jax.moe import groups, layer
from moe_jax.moe.types import Balancer, Mean, Stats, Sublayer
from moe_jax.training import balancing, evaluation, metrics
from tests import oracle

R, G, S, E, K = 2, 3, 2, 6, 2


def draw(seed, dead=None, num_experts=E, top_k=K) -> Stats:
  """Stats [R, G, S, ...] of 10 tokens a sequence."""
  rng = np.random.default_rng(seed)
  tokens, whole = np.full((R, G, S), 10), (R, G, S)
  p = np.ones(num_experts) if dead is None else np.arange(num_experts) != dead
  count = rng.multinomial(top_k * 10, p / p.sum(), whole)
  prob = rng.dirichlet(np.ones(num_experts), whole) * 10
  dropped = rng.integers(0, 3, whole)
  return Stats(
    tokens=tokens,
    count_E=count,
    first_choice_E=count // 2,
    kept_E=count,
    weight_E=prob,
    dropped={
      "capacity": dropped,
      "buffer": np.zeros(whole, int),
      "unrouted": 2 * dropped,
    },
    confidence=rng.random(whole),
    prob_E=prob,
    z=rng.random(whole),
    entropy=rng.random(whole),
    extra={"mine": rng.random(whole)},
  )


def sublayer(numbers, num_experts=E, **router) -> Sublayer:
  """Layers of these numbers; the options are fields of their router."""
  any_router = registry.load("routers", "random", top_k=1)
  router = dataclasses.replace(any_router, **{"top_k": K, **router})
  recipe = layer.Recipe(num_experts, router, dispatcher=None, experts=None)
  return Sublayer(recipe, groups.Grouping(), numbers)


def balanced(numbers, **balancers) -> Sublayer:
  """Layers of three experts with these balancers, by label."""
  parts = sublayer(numbers, num_experts=3)
  recipe = dataclasses.replace(parts.recipe, balancers=tuple(balancers.items()))
  return parts._replace(recipe=recipe)


def layers_of(stats):
  path = "decoder/0/moe"
  return metrics.by_layer(
    balancing.sum_groups({path: stats}), {path: sublayer((0, 1))}
  )


def test_sums_over_groups_keep_two_axes():
  stats = draw(0)
  total = balancing.sum_groups({"any": stats})["any"]
  assert total.count_E.shape == (R, 1, 1, E)
  assert total.extra["mine"].shape == (R, 1, 1)
  np.testing.assert_array_equal(
    total.count_E[:, 0, 0], stats.count_E.sum((1, 2))
  )
  np.testing.assert_allclose(
    total.extra["mine"][1, 0, 0], stats.extra["mine"][1].sum()
  )


def test_routing_metrics_by_definition():
  stats = draw(1, dead=4)
  found = metrics.divide(metrics.routing(layers_of(stats)))
  count_RE = stats.count_E.sum((1, 2))
  prob_RE = stats.prob_E.sum((1, 2))
  tokens = stats.tokens.sum()
  for name, one in (
    ("max_vio", oracle.max_vio),
    ("min_vio", oracle.min_vio),
    ("load_cv", oracle.load_cv),
  ):
    want = np.mean([one(c) for c in count_RE])
    assert found[name] == pytest.approx(want, rel=1e-12)
  names = [*found]
  start = names.index("max_vio")
  layers = [f"max_vio/{r:02d}" for r in range(R)]
  assert names[start + 1 : start + 1 + R] == layers
  for r in range(R):
    want = oracle.max_vio(count_RE[r])
    assert found[f"max_vio/{r:02d}"] == pytest.approx(want, rel=1e-12)
  want = [
    oracle.switch_loss(c, p, tokens // R) for c, p in zip(count_RE, prob_RE)
  ]
  assert found["balance_loss"] == pytest.approx(np.mean(want), rel=1e-12)
  assert found["dead_experts"] == 1
  for name, value in (
    ("z_loss", stats.z),
    ("router_entropy", stats.entropy),
    ("router_confidence", stats.confidence),
  ):
    assert found[name] == pytest.approx(value.sum() / tokens, rel=1e-12)
  assert found["dropped/buffer"] == 0
  for name, n in stats.dropped.items():
    want = n.sum() / (tokens * K)
    assert found[f"dropped/{name}"] == pytest.approx(want, rel=1e-12)
  want = sum(n.sum() for n in stats.dropped.values()) / (tokens * K)
  assert found["dropped"] == pytest.approx(want, rel=1e-12)
  assert found["experts_per_token"] == K


def test_kinds_of_layers_with_other_numbers_of_experts_and_choices():
  """Each layer by its own E and K; a token counts once in every layer."""
  stats = {
    "decoder/0/moe": draw(1, num_experts=4, top_k=1),
    "decoder/1/moe": draw(2, num_experts=16, top_k=3),
  }
  sublayers = {
    "decoder/0/moe": sublayer((0, 2), num_experts=4, top_k=1),
    "decoder/1/moe": sublayer((1, 3), num_experts=16, top_k=3),
  }
  layers = metrics.by_layer(balancing.sum_groups(stats), sublayers)
  assert [x.count_E.size for x in layers.values()] == [4, 16, 4, 16]
  found = metrics.divide(metrics.routing(layers))
  tokens = 2 * R * G * S * 10
  assert found["experts_per_token"] == (1 + 3) / 2
  dropped = sum(n.sum() for s in stats.values() for n in s.dropped.values())
  # Half the tokens have one choice each, and the others three.
  assert found["dropped"] == pytest.approx(dropped / (tokens / 2 * (1 + 3)))
  few_RE, many_RE = (s.count_E.sum((1, 2)) for s in stats.values())
  for number, count_E in zip(
    ("00", "01", "02", "03"), (few_RE[0], many_RE[0], few_RE[1], many_RE[1])
  ):
    want = oracle.max_vio(count_E)
    assert found[f"max_vio/{number}"] == pytest.approx(want, rel=1e-12)
  want = sum(s.z.sum() for s in stats.values()) / tokens
  assert found["z_loss"] == pytest.approx(want, rel=1e-12)
  each = [metrics.max_vio_floor(tokens // 4, *ek) for ek in ((4, 1), (16, 3))]
  assert metrics.mean_floor(layers) == pytest.approx(np.mean(each), rel=1e-12)


def test_a_router_that_does_not_always_choose_as_many():
  """Fewer choices are no drops; shares are of the choices that were made."""
  stats = draw(1)
  none = np.zeros_like(stats.tokens)
  dropped = {**stats.dropped, "unrouted": none}
  stats = stats.replace(dropped=dropped)
  for top_k in (E, None):
    layers = metrics.by_layer(
      balancing.sum_groups({"a": stats}),
      {"a": sublayer((0, 1), fixed=False, top_k=top_k)},
    )
    found = metrics.divide(metrics.routing(layers))
    assert found["experts_per_token"] == K
    assert found["dropped/unrouted"] == 0
    want = dropped["capacity"].sum() / stats.count_E.sum()
    assert found["dropped"] == pytest.approx(want, rel=1e-12)
    # Every expert with the same probability, independently of the others.
    want = binomial_floor(60, E, K / E)
    assert metrics.mean_floor(layers) == pytest.approx(want, rel=0.1)


def binomial_floor(tokens, num_experts, share):
  """Mean MaxVio of loads that are binomial each."""
  rng = np.random.default_rng(1)
  draws = rng.random((2000, tokens, num_experts)) < share
  return np.mean([oracle.max_vio(count_E) for count_E in draws.sum(1)])


def test_what_a_router_reports_is_per_token():
  stats = draw(1)
  found = metrics.divide(metrics.routing(layers_of(stats)))
  want = stats.extra["mine"].sum() / stats.tokens.sum()
  np.testing.assert_allclose(found["extra/mine"], want)


def test_extremes():
  assert metrics.max_vio([4, 4, 4, 4]) == metrics.min_vio([4, 4, 4, 4]) == 0
  assert metrics.max_vio([8, 0, 0, 0]) == 3
  assert metrics.min_vio([8, 0, 0, 0]) == 1
  assert metrics.max_vio([0, 0]) == metrics.load_cv([0, 0]) == 0
  assert metrics.balance_loss([2, 2], [1.0, 1.0]) == pytest.approx(1, abs=1e-12)
  assert metrics.balance_loss([4, 0], [2.0, 0.0]) == pytest.approx(2)
  assert metrics.balance_loss([0, 0], [0.0, 0.0]) == 0
  assert metrics.routing({}) == {}


def test_layers_are_named_by_their_number():
  c = tiny.get_config().model
  c.update(prefix=("dense", "moe"), pattern=("moe", "dense", "moe"))
  c.num_layers = 8
  stats = {
    "prefix/1/moe": {"x": np.array([[10]])},
    "decoder/0/moe": {"x": np.array([[20], [50]])},
    "decoder/2/moe": {"x": np.array([[40], [70]])},
  }
  found = metrics.by_layer(stats, models.build(c, vocab_size=9).sublayers)
  assert list(found) == ["01", "02", "04", "05", "07"]
  assert [int(v.stats["x"][0]) for v in found.values()] == [10, 20, 40, 50, 70]


def test_several_steps_are_divided_once():
  """A mean over tokens, not a mean of means."""
  many, few = draw(2), draw(3)
  few = few.replace(tokens=few.tokens // 10, z=few.z / 7)
  steps = [metrics.routing(layers_of(s)) for s in (many, few)]
  found = metrics.divide(metrics.add_up(steps))
  want = (many.z.sum() + few.z.sum()) / (many.tokens.sum() + few.tokens.sum())
  assert found["z_loss"] == pytest.approx(want, rel=1e-12)
  # A step's MaxVio is no mean over tokens: every step counts the same.
  each = [metrics.divide(s)["max_vio"] for s in steps]
  assert found["max_vio"] == pytest.approx(np.mean(each), rel=1e-12)
  assert metrics.divide({"nothing": Mean(0.0, 0.0)}) == {"nothing": 0.0}


def test_bias_range():
  """Balancers count that shift the scores, whatever their state is called."""

  shifts = Balancer(
    init=lambda num_experts: {"cutoff_E": jnp.zeros(num_experts)},
    select=lambda state, score_TE, mask_T: score_TE - state["cutoff_E"][None],
  )

  def prefers_the_last(state, score_TE, mask_T):
    assert not state, "it has none"
    return score_TE + np.arange(3.0)[None]

  bias = registry.load("balancers", "bias", rate=0.1)
  loss = registry.load("balancers", "switch", coefficient=0.1)
  sublayers = {
    "decoder/0/moe": balanced((1, 3), bias=bias, load=loss),
    "decoder/1/moe": balanced((2,), mine=shifts)._replace(stacked=False),
    "decoder/2/moe": balanced((4,), load=loss),
    "decoder/3/moe": balanced((5, 6), fixed=Balancer(select=prefers_the_last)),
  }
  balance = {
    "decoder": {
      "0": {"moe": {"bias": {"bias_E": np.array([[0.0, 1, 3], [0, 0, 0]])}}},
      "1": {"moe": {"mine": {"cutoff_E": np.array([1.0, -1, 0])}}},
    }
  }
  found = metrics.divide({"bias_range": metrics.bias_range(balance, sublayers)})
  assert found["bias_range"] == (3 + 0 + 2 + 2 + 2) / 5
  assert metrics.bias_range({}, {}) == Mean(0.0, 1.0)


def test_a_domain_without_assignments_has_no_shares():
  stats = draw(0)
  empty = stats.replace(count_E=np.zeros_like(stats.count_E))
  path = "decoder/0/moe"
  sums = {"none": {"stats": balancing.sum_groups({path: empty})}}
  shares = evaluation.specialisation(sums, {path: sublayer((0, 1))})
  assert [*shares] == [("00", "none"), ("01", "none")]
  for share_E in shares.values():
    np.testing.assert_array_equal(share_E, np.zeros(E))


def simulated_floor(tokens, num_experts, top_k, trials):
  """Mean MaxVio and its standard error, by drawing without replacement."""
  rng = np.random.default_rng(99)
  found = []
  for _ in range(trials):
    order = rng.permuted(
      np.broadcast_to(np.arange(num_experts), (tokens, num_experts)), axis=1
    )
    counts = np.bincount(order[:, :top_k].ravel(), minlength=num_experts)
    found.append(oracle.max_vio(counts))
  return np.mean(found), np.std(found) / np.sqrt(trials)


# Tokens, experts, choices; the last two are beyond the exact simulation.
@pytest.mark.parametrize(
  "tokens,num_experts,top_k",
  [(64, 4, 1), (500, 8, 2), (300, 64, 6), (40_000, 8, 2), (9_000, 64, 6)],
)
def test_floor_of_a_random_router(tokens, num_experts, top_k):
  found = metrics.max_vio_floor(tokens, num_experts, top_k)
  want, error = simulated_floor(tokens, num_experts, top_k, 200)
  assert abs(found - want) < 4 * error * np.sqrt(1 + 200 / 64)
  assert found > 0


def test_both_ways_to_the_floor_agree():
  """Just below and above the number of tokens where the way changes."""
  tokens = int(2e7 / 64 / 16)
  exact = metrics.max_vio_floor(tokens, 16, 2)
  normal = metrics.max_vio_floor(tokens + 1, 16, 2)
  assert exact == pytest.approx(normal, rel=0.1)


def test_floors_of_steps_of_other_paddings_need_no_simulation_each():
  metrics._simulated_floor.cache_clear()
  floors = [metrics.max_vio_floor(n, 16, 2) for n in range(496, 513)]
  assert metrics._simulated_floor.cache_info().misses <= 2
  assert floors == sorted(floors, reverse=True)
  exact = metrics._simulated_floor(500, 16, 2)
  assert metrics.max_vio_floor(500, 16, 2) == pytest.approx(exact, rel=0.05)


def test_floor_of_many_experts_a_token():
  """Drawing again until all are distinct would take forever."""
  for top_k in (24, 40, 64):
    found = metrics.max_vio_floor(512, 128, top_k)
    # Nearly normal loads; 2.6 is the mean of the largest of 128.
    spread = (1 / top_k - 1 / 128) / 512 * 128
    assert found == pytest.approx(2.6 * spread**0.5, rel=0.1)


def test_floor_shrinks_with_tokens():
  few, many = (metrics.max_vio_floor(n, 8, 2) for n in (1000, 100_000))
  assert few / many == pytest.approx(10, rel=0.15)
  assert metrics.max_vio_floor(100, 4, 4) == 0
  assert metrics.max_vio_floor(0, 4, 2) == 0


@pytest.mark.parametrize("share", [0.02, 0.3, 0.95, 0.99])
def test_the_floor_of_independent_choices_is_scaled_from_a_near_one(share):
  tokens, num_experts = 3000, 16
  rng = np.random.default_rng(1)
  counts = rng.binomial(tokens, share, (2000, num_experts))
  want = np.mean([metrics.max_vio(count_E) for count_E in counts])
  found = metrics.independent_floor(tokens, num_experts, share)
  assert found == pytest.approx(want, rel=0.06)
  assert metrics.independent_floor(tokens, num_experts, 1.0) == 0
