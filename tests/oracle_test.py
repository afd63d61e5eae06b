"""The oracle against examples worked by hand."""

import math

import numpy as np
import pytest

from tests import oracle

LN3, LN4 = math.log(3), math.log(4)
ONE = np.array([[1.0]])  # one token of width 1: its logits are the kernel


def route_one(logits_E, **options):
  kernel = np.array([logits_E])
  routed = oracle.route({"kernel": kernel}, ONE, [True], **options)
  return routed.expert_TK[0].tolist(), routed.weight_TK[0], routed


# Softmax of (ln 1, ln 2, ln 5) is (1, 2, 5) / 8.
OF_8 = [math.log(1), math.log(2), math.log(5)]
# Sigmoid of (-ln 3, 0, ln 3) is (1/4, 1/2, 3/4).
OF_4 = [-LN3, 0.0, LN3]


def test_softmax_weights():
  expert, weight, routed = route_one(OF_8, top_k=2, renormalize=False)
  assert expert == [2, 1]
  np.testing.assert_allclose(weight, [5 / 8, 2 / 8])
  np.testing.assert_allclose(routed.prob_TE, [[1 / 8, 2 / 8, 5 / 8]])
  np.testing.assert_allclose(routed.logits_TE, [OF_8])
  assert routed.priority_TK is None

  # Renormalized over the two: 5 / 7 and 2 / 7, then scaled.
  _, weight, _ = route_one(OF_8, top_k=2, scale=2.5)
  np.testing.assert_allclose(weight, [2.5 * 5 / 7, 2.5 * 2 / 7])


def test_softmax_of_the_chosen_logits_is_the_renormalized_softmax():
  expert, weight, routed = route_one(
    OF_8, top_k=2, score_before_top_k=False, renormalize=False
  )
  assert expert == [2, 1]
  np.testing.assert_allclose(weight, [5 / 7, 2 / 7])
  # The probabilities stay those over all experts.
  np.testing.assert_allclose(routed.prob_TE, [[1 / 8, 2 / 8, 5 / 8]])


def test_sigmoid_weights():
  expert, weight, routed = route_one(
    OF_4, top_k=2, score="sigmoid", renormalize=False
  )
  assert expert == [2, 1]
  np.testing.assert_allclose(weight, [3 / 4, 1 / 2])
  # Probabilities: (1/4, 1/2, 3/4) / (3/2).
  np.testing.assert_allclose(routed.prob_TE, [[1 / 6, 1 / 3, 1 / 2]])

  # 3/4 and 1/2 of 5/4.
  _, weight, _ = route_one(OF_4, top_k=2, score="sigmoid")
  np.testing.assert_allclose(weight, [0.6, 0.4])

  # Llama 4: top-1 of the logits, its sigmoid, not renormalized.
  expert, weight, _ = route_one(
    OF_4,
    top_k=1,
    score="sigmoid",
    score_before_top_k=False,
    renormalize=False,
    apply_to="input",
  )
  assert expert == [2]
  np.testing.assert_allclose(weight, [3 / 4])


def test_sqrt_softplus_weights():
  # softplus(ln(e^4 - 1)) = 4 and softplus(ln(e - 1)) = 1: scores 2 and 1.
  logits = [math.log(math.exp(1) - 1), math.log(math.exp(4) - 1)]
  expert, weight, routed = route_one(logits, top_k=2, score="sqrt_softplus")
  assert expert == [1, 0]
  np.testing.assert_allclose(weight, [2 / 3, 1 / 3])
  np.testing.assert_allclose(routed.prob_TE, [[1 / 3, 2 / 3]])


def test_bias_chooses_but_does_not_weigh():
  # Biased: (0.25 + 0.6, 0.5, 0.75): expert 0, then 2, with their own scores.
  options = dict(top_k=2, score="sigmoid", bias_E=[0.6, 0.0, 0.0])
  expert, weight, routed = route_one(OF_4, renormalize=False, **options)
  assert expert == [0, 2]
  np.testing.assert_allclose(weight, [1 / 4, 3 / 4])
  np.testing.assert_allclose(routed.prob_TE, [[1 / 6, 1 / 3, 1 / 2]])

  # Added to the logits (-ln 3, 0, ln 3) = (-1.1, 0, 1.1), 0.6 changes nothing.
  expert, _, _ = route_one(OF_4, score_before_top_k=False, **options)
  assert expert == [2, 1]


def test_ties_go_to_the_lower_index():
  assert route_one([0.0, 1.0, 1.0, 0.0], top_k=3)[0] == [1, 2, 0]


@pytest.mark.parametrize(
  "group_score, mask, want",
  [
    # Groups {0, 1} and {2, 3}, one is kept. Best: 0.9 beats 0.7.
    ("max", "-inf", [0, 1]),
    # 0 instead of -inf: (0.9, -0.2, 0, 0), so 2 comes before 1.
    ("max", "zero", [0, 2]),
    # Sums of two: 0.9 - 0.2 = 0.7 loses against 0.6 + 0.7 = 1.3.
    ("sum_top_2", "-inf", [3, 2]),
    ("sum_top_2", "zero", [3, 2]),
  ],
)
def test_group_limit(group_score, mask, want):
  # Sigmoid scores are all 0.5; with the bias (0.9, -0.2, 0.6, 0.7).
  expert, weight, _ = route_one(
    [0.0, 0.0, 0.0, 0.0],
    top_k=2,
    score="sigmoid",
    renormalize=False,
    bias_E=[0.4, -0.7, 0.1, 0.2],
    num_expert_groups=2,
    top_expert_groups=1,
    group_score=group_score,
    expert_group_mask=mask,
  )
  assert expert == want
  np.testing.assert_allclose(weight, [0.5, 0.5])


def test_priority_is_the_largest_weight_before_renormalizing_and_scaling():
  _, _, routed = route_one(OF_8, top_k=2, scale=9.0, priority="score")
  np.testing.assert_allclose(routed.priority_TK, [[5 / 8, 5 / 8]])


def test_second_expert_is_drawn_with_twice_its_weight():
  # w2 = 2 / 7: used below a draw of 4 / 7 = 0.571.
  routed = oracle.route(
    {"kernel": np.array([OF_8])},
    np.ones((4, 1)),
    [True, True, False, True],
    top_k=2,
    renormalize=False,
    second_draw_T=[0.57, 0.58, 0.0, 0.0],
  )
  want = [[True, True], [True, False], [False, False], [True, True]]
  assert routed.valid_TK.tolist() == want


def slots_of(expert_TK, bound, *, order="token", valid=None, priority=None):
  expert_TK = np.array(expert_TK)
  slot_TK, kept_TK = oracle.assign_slots(
    expert_TK,
    np.ones(expert_TK.shape, bool) if valid is None else valid,
    priority,
    num_experts=4,
    bound=bound,
    order=order,
  )
  return slot_TK.tolist(), kept_TK.astype(int).tolist()


THREE_TOKENS = [[0, 1], [0, 1], [1, 0]]


def test_slots_token_major():
  # Line: a0 a1 b0 b1 c1 c0. Experts 0 and 1 are full after token b.
  slot, kept = slots_of(THREE_TOKENS, (2, 4))
  assert slot == [[0, 0], [1, 1], [2, 2]]
  assert kept == [[1, 1], [1, 1], [0, 0]]


def test_slots_choice_major():
  # First choices a0 b0 c1, then second choices a1 b1 c0. Expert 0: a b c,
  # expert 1: c a b. The third of each is dropped.
  slot, kept = slots_of(THREE_TOKENS, (2, 4), order="choice")
  assert slot == [[0, 1], [1, 2], [0, 2]]
  assert kept == [[1, 1], [1, 0], [1, 0]]


def test_slots_dropless():
  slot, kept = slots_of(THREE_TOKENS, None)
  assert slot == [[0, 0], [1, 1], [2, 2]]
  assert kept == [[1, 1], [1, 1], [1, 1]]


def test_invalid_assignments_take_no_slot():
  # Token a is padding, b's second choice was not made: expert 0 gets b c,
  # expert 1 gets c.
  valid = [[False, False], [True, False], [True, True]]
  slot, kept = slots_of(THREE_TOKENS, (2, 4), valid=valid)
  assert slot == [[-1, -1], [0, -1], [0, 1]]
  assert kept == [[0, 0], [1, 0], [1, 1]]


def test_slots_of_a_bucket():
  # Experts {0, 1} share 3 slots, {2, 3} too. Bucket 0 gets tokens a b c e.
  expert = [[0], [1], [1], [2], [0]]
  slot, kept = slots_of(expert, (3, 2))
  assert slot == [[0], [1], [2], [0], [3]]
  assert kept == [[1], [1], [1], [1], [0]]
  # 3 slots an expert: 0 gets a e, 1 gets b c, 2 gets d.
  slot, kept = slots_of(expert, (3, 4))
  assert slot == [[0], [0], [1], [0], [1]]
  assert kept == [[1]] * 5


def test_slots_by_priority():
  # b and c before a; b before c, in token order.
  priority = [[0.2], [0.9], [0.9]]
  slot, kept = slots_of([[0], [0], [0]], (2, 4), priority=priority)
  assert slot == [[2], [0], [1]]
  assert kept == [[0], [1], [1]]


def test_slots_by_priority_in_both_orders():
  priority = [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]
  # Token-major line: c1 c0 b0 b1 a0 a1.
  slot, _ = slots_of(THREE_TOKENS, (2, 4), priority=priority)
  assert slot == [[2, 2], [1, 1], [0, 0]]
  # Choice-major line: c1 b0 a0, then c0 b1 a1.
  slot, _ = slots_of(THREE_TOKENS, (2, 4), priority=priority, order="choice")
  assert slot == [[1, 2], [0, 1], [0, 2]]


def test_activations():
  one = np.ones((1, 1, 1))
  params = {"gate": one, "up": 2 * one, "down": 3 * one}
  run = lambda x, act: oracle.experts(params, 0, [x], act)[0]  # noqa: E731
  assert run(1.0, "relu") == 6 and run(-1.0, "relu") == 0
  # silu(ln 3) = 3/4 ln 3, times 2 ln 3, times 3.
  np.testing.assert_allclose(run(LN3, "swiglu"), 4.5 * LN3**2)
  # gelu(2) = 1.954598 by the tanh approximation (1.954500 exactly); gelu(1) =
  # 0.841192.
  np.testing.assert_allclose(run(1.0, "gelu"), 3 * 1.954598, rtol=1e-6)
  np.testing.assert_allclose(run(1.0, "geglu"), 6 * 0.841192, rtol=1e-6)
  # relu(2 * 1 - 1) * 3 + 0.5
  biased = params | {
    "up_bias": np.array([[-1.0]]),
    "down_bias": np.array([[0.5]]),
  }
  assert oracle.experts(biased, 0, [1.0], "relu")[0] == 3.5
  # silu(0 + ln 3) * (0 - 1) * 3 + 0.5
  biased["gate_bias"] = np.array([[LN3]])
  np.testing.assert_allclose(
    oracle.experts(biased, 0, [0.0], "swiglu")[0], -2.25 * LN3 + 0.5
  )


def test_weight_on_the_input_is_not_weight_on_the_output():
  # One expert, silu(x) x; logit 0, so the weight is sigmoid(0) = 1/2.
  one = np.ones((1, 1, 1))
  params = {
    "router": {"kernel": np.zeros((1, 1))},
    "experts": {"gate": one, "up": one, "down": one},
  }
  options = dict(
    activation="swiglu", top_k=1, score="sigmoid", renormalize=False
  )
  x, mask = np.full((1, 1, 1), 2 * LN3), [[True]]
  # Output: 1/2 (2 ln 3)^2 sigmoid(2 ln 3) = 2 (ln 3)^2 9/10.
  y, _ = oracle.moe_layer(params, x, mask, **options)
  np.testing.assert_allclose(y, [[[1.8 * LN3**2]]])
  # Input: (ln 3)^2 sigmoid(ln 3) = (ln 3)^2 3/4.
  y, _ = oracle.moe_layer(params, x, mask, apply_to="input", **options)
  np.testing.assert_allclose(y, [[[0.75 * LN3**2]]])


def small_layer(**options):
  """Two experts that multiply by 1 and 2, a shared one by 10; 4 tokens.

  Tokens a b c are (1, 0), d is padding. Logits are (ln 3, 0), so every token
  goes to expert 0 with probability 3/4. Sequences are {a, b} and {c, d}.
  """
  eye = np.eye(2)
  params = {
    "router": {"kernel": LN3 * eye},
    "experts": {
      "up": np.stack([eye, eye]),
      "down": np.stack([eye, 2 * eye]),
    },
    "shared": {"up": eye, "down": 10 * eye},
  }
  x_GTD = np.array([[[1.0, 0.0]] * 4])
  mask_GT = np.array([[True, True, True, False]])
  return oracle.moe_layer(
    params,
    x_GTD,
    mask_GT,
    activation="relu",
    sequences=2,
    renormalize=False,
    **options,
  )


def test_layer_with_capacity():
  y, stats = small_layer(top_k=1, bound=(2, 2))
  # a and b get 3/4 of expert 0; c is dropped: shared only; d is padding: zero.
  np.testing.assert_allclose(y[0, :, 0], [10.75, 10.75, 10, 0])
  np.testing.assert_array_equal(y[0, :, 1], 0)

  assert stats["tokens"].tolist() == [[2, 1]]
  assert stats["count_E"].tolist() == [[[2, 0], [1, 0]]]
  assert stats["first_choice_E"].tolist() == [[[2, 0], [1, 0]]]
  assert stats["kept_E"].tolist() == [[[2, 0], [0, 0]]]
  assert stats["dropped"]["capacity"].tolist() == [[0, 1]]
  assert stats["dropped"]["buffer"].tolist() == [[0, 0]]
  assert stats["dropped"]["unrouted"].tolist() == [[0, 0]]
  want = [[[1.5, 0.5], [0.75, 0.25]]]
  np.testing.assert_allclose(stats["prob_E"], want)
  np.testing.assert_allclose(stats["weight_E"], [[[1.5, 0], [0.75, 0]]])
  np.testing.assert_allclose(stats["confidence"], [[1.5, 0.75]])
  # logsumexp(ln 3, 0) = ln 4.
  np.testing.assert_allclose(stats["z"], [[2 * LN4**2, LN4**2]])
  # -3/4 ln 3/4 - 1/4 ln 1/4 = ln 4 - 3/4 ln 3.
  nats = LN4 - 0.75 * LN3
  np.testing.assert_allclose(stats["entropy"], [[2 * nats, nats]])


def test_layer_with_two_choices_and_a_buffer():
  # Both experts share 5 slots, token-major: only c's second choice is dropped.
  y, stats = small_layer(top_k=2, bound=(5, 1))
  # 3/4 * 1 + 1/4 * 2 = 1.25.
  np.testing.assert_allclose(y[0, :, 0], [11.25, 11.25, 10.75, 0])
  assert stats["count_E"].tolist() == [[[2, 2], [1, 1]]]
  assert stats["first_choice_E"].tolist() == [[[2, 0], [1, 0]]]
  assert stats["kept_E"].tolist() == [[[2, 2], [1, 0]]]
  assert stats["dropped"]["buffer"].tolist() == [[0, 1]]
  assert stats["dropped"]["capacity"].tolist() == [[0, 0]]
  np.testing.assert_allclose(stats["confidence"], [[2, 1]])


def test_layer_with_undrawn_second_experts():
  # w2 = 1/4: used below a draw of 1/2, so b's is not.
  y, stats = small_layer(top_k=2, second_draw_GT=[[0.4, 0.6, 0.4, 0.6]])
  np.testing.assert_allclose(y[0, :, 0], [11.25, 10.75, 11.25, 0])
  assert stats["count_E"].tolist() == [[[2, 1], [1, 1]]]
  assert stats["dropped"]["unrouted"].tolist() == [[1, 0]]
  np.testing.assert_allclose(stats["confidence"], [[1.75, 1]])


def test_groups_have_their_own_slots():
  params = {
    "router": {"kernel": np.zeros((1, 2))},
    "experts": {"up": np.ones((2, 1, 1)), "down": np.ones((2, 1, 1))},
  }
  # All logits tie: everybody wants expert 0, which has one slot a group.
  y, stats = oracle.moe_layer(
    params,
    np.ones((2, 2, 1)),
    np.ones((2, 2), bool),
    activation="relu",
    top_k=1,
    bound=(1, 2),
  )
  assert y[:, :, 0].tolist() == [[1, 0], [1, 0]]
  assert stats["kept_E"].tolist() == [[[1, 0]], [[1, 0]]]


def test_switch_loss():
  # Uniform: 4 * 4 * (1/4 * 1/4) = 1, however many choices were counted.
  assert oracle.switch_loss([4, 4, 4, 4], [2, 2, 2, 2], 8) == 1
  # Collapsed on m of E experts: E * m * (1/m * 1/m) = E / m.
  assert oracle.switch_loss([8, 0, 0, 0], [8, 0, 0, 0], 8) == 4
  assert oracle.switch_loss([4, 4, 0, 0], [4, 4, 0, 0], 8) == 2
  assert oracle.switch_loss([0, 0], [0, 0], 0) == 0
  assert oracle.z_loss(12.0, 8) == 1.5


def test_bias_update():
  # Mean 4: expert 0 has 5 too many, 1 and 2 have too few.
  bias, count = [0.5, 0.0, 0.0, 0.0], [9, 1, 2, 4]
  np.testing.assert_allclose(
    oracle.bias_update(bias, count, 0.1), [0.4, 0.1, 0.1, 0.0]
  )
  # Mean of the new bias: 0.6 / 4 = 0.15.
  np.testing.assert_allclose(
    oracle.bias_update(bias, count, 0.1, centered=True),
    [0.25, -0.05, -0.05, -0.15],
  )
  # (4 - 9) / 4 = -1.25, 3/4, 2/4, 0.
  np.testing.assert_allclose(
    oracle.bias_update(bias, count, 0.1, rule="proportional"),
    [0.375, 0.075, 0.05, 0.0],
  )


def test_load_metrics():
  # Mean 4, deviations 5, -3, -2, 0: variance 38 / 4.
  count = [9, 1, 2, 4]
  assert oracle.max_vio(count) == 1.25
  assert oracle.min_vio(count) == 0.75
  assert oracle.load_cv(count) == pytest.approx(math.sqrt(9.5) / 4)
  # All on one of E experts: E - 1.
  assert oracle.max_vio([8, 0, 0, 0]) == 3
  assert oracle.max_vio([2, 2]) == oracle.load_cv([2, 2]) == 0


def test_gradient_along():
  # f = sum(a^3) + sin(b): 3 a^2 along (1, 2), cos(b) along -1.
  f = lambda leaves: np.sum(leaves[0] ** 3) + np.sin(leaves[1])  # noqa: E731
  got = oracle.gradient_along(
    f, [np.array([1.0, -2.0]), 0.5], [np.array([1.0, 2.0]), -1.0]
  )
  want = 3 * 1 * 1 + 3 * 4 * 2 - math.cos(0.5)
  assert abs(got / want - 1) < 1e-11


def test_gradient_along_of_a_layer_is_accurate():
  # Halving the step must not move the result: its error is below 1e-8.
  rng = np.random.default_rng(0)
  shapes = [(3, 4), (4, 3, 5), (4, 3, 5), (4, 5, 3), (1, 6, 3)]
  leaves = [rng.normal(size=s) for s in shapes]
  direction = [rng.normal(size=s) for s in shapes]
  norm = math.sqrt(sum(np.sum(d**2) for d in direction))
  direction = [d / norm for d in direction]

  def f(leaves):
    kernel, gate, up, down, x = leaves
    y, _ = oracle.moe_layer(
      {
        "router": {"kernel": kernel},
        "experts": {"gate": gate, "up": up, "down": down},
      },
      x,
      np.ones((1, 6), bool),
      activation="swiglu",
      top_k=2,
    )
    return np.sum(np.sin(y))

  coarse = oracle.gradient_along(f, leaves, direction, 1e-3)
  fine = oracle.gradient_along(f, leaves, direction, 5e-4)
  assert abs(coarse / fine - 1) < 1e-8
