"""Tests which assignment gets which slot, against the oracle's queue."""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import dispatchers, groups, layer
from moe_jax.moe.types import Bound, TokenChoice
from tests import oracle

G, T, E = 2, 7, 6


@st.composite
def routings(draw, top_k):
  """expert_GTK, distinct for a token, valid_GTK and coarse priorities."""
  seed = draw(st.integers(0, 2**32 - 1))
  rng = np.random.default_rng(seed)
  # Experts from 1 to E of them, so that queues get long.
  used = draw(st.integers(top_k, E))
  order_GTE = rng.permuted(np.tile(np.arange(used), (G, T, 1)), axis=-1)
  few = arrays.arrays(bool, (G, T, top_k))
  priority_GTK = draw(arrays.arrays(np.int8, (G, T, top_k), elements=LEVELS))
  return (
    order_GTE[..., :top_k].astype(np.int32),
    draw(st.one_of(few, st.just(np.ones((G, T, top_k), bool)))),
    priority_GTK.astype(np.float32) / 2,
  )


LEVELS = st.integers(-2, 2)


@functools.cache
def assign(order, buckets, prioritised):
  """dispatchers.assign, jitted over the number of slots too."""

  @jax.jit
  def run(expert_GTK, valid_GTK, priority_GTK, num_slots):
    choice = TokenChoice(
      expert_TK=expert_GTK,
      weight_TK=jnp.ones(expert_GTK.shape),
      valid_TK=valid_GTK,
      priority_TK=priority_GTK if prioritised else None,
    )
    bound = None if buckets is None else Bound(num_slots, buckets)
    return dispatchers.assign(choice, E, bound, order)

  return run


@pytest.mark.parametrize("order", dispatchers.ORDERS)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("buckets", [None, E, 2])
@pytest.mark.parametrize("prioritised", [False, True])
def test_assign(order, top_k, buckets, prioritised):
  @hypothesis.given(routings(top_k), st.integers(1, T * top_k))
  def check(routing, num_slots):
    slot_GTK, kept_GTK = jax.device_get(
      assign(order, buckets, prioritised)(*routing, num_slots)
    )
    assert slot_GTK.dtype == np.int32 and kept_GTK.dtype == bool
    bound = None if buckets is None else (num_slots, buckets)
    for g in range(G):
      expert_TK, valid_TK, priority_TK = (part[g] for part in routing)
      line = functools.partial(
        oracle.assign_slots,
        expert_TK,
        priority_TK=priority_TK if prioritised else None,
        num_experts=E,
        order=order,
      )
      _, want_TK = line(valid_TK, bound=bound)
      np.testing.assert_array_equal(kept_GTK[g], want_TK)
      # A bucket decides who is in; inside an expert the rows are dense.
      slot_TK, _ = line(want_TK, bound=None)
      np.testing.assert_array_equal(slot_GTK[g][want_TK], slot_TK[want_TK])

  check()


@pytest.mark.parametrize("order", dispatchers.ORDERS)
@pytest.mark.parametrize("prioritised", [False, True])
def test_rank(order, prioritised):
  """Queues of any length, the dropped ones included; no bucket is E."""
  rank = jax.jit(dispatchers.rank, static_argnums=(2, 3))

  @hypothesis.given(routings(3))
  def check(routing):
    expert_TK, valid_TK, priority_TK = (part[0] for part in routing)
    priority_TK = priority_TK if prioritised else None
    bucket_TK = np.where(valid_TK, expert_TK, E)
    rank_TK = np.asarray(rank(bucket_TK, priority_TK, E, order))
    want_TK, _ = oracle.assign_slots(
      expert_TK,
      valid_TK,
      priority_TK,
      num_experts=E,
      bound=(1, E),
      order=order,
    )
    assert rank_TK.dtype == np.int32
    np.testing.assert_array_equal(rank_TK[valid_TK], want_TK[valid_TK])

  check()


@pytest.mark.parametrize("name", ["einsum", "gather", "sorted"])
def test_the_weights_of_what_has_no_slot_go_to_the_other_experts(name):
  """One slot an expert: the first token keeps both, the second one of its two."""
  expert_GTK = np.array([[[0, 1], [1, 2], [0, 1]]], np.int32)
  weight_GTK = np.array([[[0.3, 0.1], [0.2, 0.05], [0.4, 0.4]]], np.float32)
  choice = TokenChoice(expert_GTK, weight_GTK, np.ones((1, 3, 2), bool))
  dispatcher = registry.load("dispatchers", name, renormalize=True)
  plan = dispatcher.plan(choice, 3, Bound(1, 3))
  np.testing.assert_array_equal(
    plan.kept_GTK, [[[True, True], [False, True], [False, False]]]
  )
  x_GTD = np.ones((1, 3, 2), np.float32)
  y_GTD = plan.combine(plan.dispatch(x_GTD))
  np.testing.assert_allclose(y_GTD[..., 0], [[0.4, 0.25, 0]], rtol=1e-6)
  found = plan.choice.weight_TK[0]
  np.testing.assert_allclose(found[0], [0.3, 0.1], rtol=1e-6)
  np.testing.assert_allclose(found[1], [0, 0.25], rtol=1e-6)
  np.testing.assert_array_equal(found[2], [0, 0])


@hypothesis.given(
  arrays.arrays(np.int32, 50, elements=st.integers(0, 9)),
)
def test_both_ways_to_sort(key_N):
  """Packing (key, index) into one number and its fallback both sort stably."""
  want_N = np.argsort(key_N, kind="stable")
  for num_keys in (10, 2**31 // 50, 2**31 // 50 + 1, 2**40):
    np.testing.assert_array_equal(
      dispatchers._stable_argsort(key_N, num_keys),
      want_N,
      err_msg=str(num_keys),
    )


def test_packing_reaches_the_largest_number():
  """The last key that is packed does not overflow; the next is not packed."""
  size = 50
  for num_keys in (2**31 // size, 2**31 // size + 1):
    key_N = np.arange(num_keys - size, num_keys, dtype=np.int32)[::-1]
    np.testing.assert_array_equal(
      dispatchers._stable_argsort(key_N, num_keys), np.arange(size)[::-1]
    )


def test_capacity():
  assert groups.capacity(1.0, 16, 1, 8) == Bound(2, 8)
  assert groups.capacity(1.25, 16, 2, 8) == Bound(5, 8)
  # Switch rounds down.
  assert groups.capacity(1.0, 15, 1, 8) == Bound(1, 8)
  assert groups.capacity(1.99, 8, 1, 8) == Bound(1, 8)
  assert groups.capacity(2.0, 8, 2, 2) == Bound(16, 2)


@hypothesis.given(
  st.integers(1, 400), st.integers(1, 512), st.integers(1, 8), st.booleans()
)
@hypothesis.example(115, 100, 1, False)
def test_capacity_is_the_exact_floor(percent, tokens, top_k, many):
  """1.15 * 100 is 115 slots, whatever the rounding of 1.15."""
  buckets = 8 if many else 1
  exact = percent * tokens * top_k // (100 * buckets)
  hypothesis.assume(exact >= 1)
  assert groups.capacity(percent / 100, tokens, top_k, buckets).slots == exact


@pytest.mark.parametrize(
  "rounding,want",
  [
    # 1.25 * 18 / 8 = 2.8125, 10 / 8 = 1.25 and 12 / 8 = 1.5 slots.
    (("floor",), (2, 1, 1)),
    (("ceil",), (3, 2, 2)),
    (("round",), (3, 1, 2)),
    # V-MoE: up to a multiple of 4 after rounding.
    (("ceil", 4), (4, 4, 4)),
    (("floor", 2), (2, 2, 2)),
    # Mesh TensorFlow's Switch has at least 4.
    (("floor", 1, 4), (4, 4, 4)),
    (("round", 1, 2), (3, 2, 2)),
    # The minimum comes last, and is no multiple then.
    (("floor", 4, 6), (6, 6, 6)),
    (("ceil", 8, 6), (8, 8, 8)),
  ],
)
def test_capacity_rounding(rounding, want):
  loads = ((1.25, 18), (1.0, 10), (1.0, 12))
  found = [groups.capacity(*load, 1, 8, *rounding) for load in loads]
  assert found == [Bound(slots, 8) for slots in want]


@pytest.mark.parametrize("rounding", groups.ROUNDINGS)
def test_whole_capacities_need_no_rounding(rounding):
  """1.1 * 10 is 11.000000000000002, which is still 11 slots."""
  assert groups.capacity(1.1, 10, 1, 1, rounding) == Bound(11, 1)
  assert groups.capacity(1.15, 100, 1, 1, rounding) == Bound(115, 1)


def test_a_capacity_of_zero_is_refused():
  """Unless it is rounded up, or there is a minimum."""
  for rounding in ("floor", "round"):
    with pytest.raises(ConfigError, match="rounds to zero.*min_capacity"):
      groups.capacity(1.0, 3, 1, 8, rounding)
  assert groups.capacity(1.0, 3, 1, 8, "ceil") == Bound(1, 8)
  assert groups.capacity(1.0, 3, 1, 8, minimum=4) == Bound(4, 8)


def test_rounding_options_reach_the_bound_of_a_group():
  """And no bucket has more slots than a group can send to it."""
  router = registry.load("routers", "top_k", top_k=1)
  dispatcher = registry.load("dispatchers", "gather")
  recipe = layer.Recipe(8, router, dispatcher, experts=None)
  options = dict(capacity_factor=1.0, capacity_rounding="round")
  for more, length, slots in (
    ({}, 12, 2),
    ({"capacity_multiple": 4}, 12, 4),
    ({"min_capacity": 5}, 12, 5),
    ({"min_capacity": 5}, 3, 3),
  ):
    grouping = groups.Grouping(**options, **more)
    _, resolved = grouping.resolve(recipe, length, train=True)
    assert resolved.bound == Bound(slots, 8)


def test_capacity_of_a_mean_number_of_experts():
  """A router with room for more experts has slots for those that it aims at."""
  options = {"threshold": 0.5, "average": 1.5}
  router = registry.load("routers", "top_p", top_k=4, **options)
  dispatcher = registry.load("dispatchers", "gather", order="token")
  recipe = layer.Recipe(8, router, dispatcher, experts=None)
  grouping = groups.Grouping(capacity_factor=1.0)
  _, resolved = grouping.resolve(recipe, 64, train=True)
  assert resolved.bound == Bound(12, 8)  # 64 * 1.5 / 8
