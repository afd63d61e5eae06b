"""The question about Switch: what its report makes of rows and curves."""

import pytest

from experiments import intervals
from experiments.switch import plot, sweep
from moe_jax import models
from moe_jax.data import spans


def row(arm, seed=0, **more):
  return {"arm": arm, "seed": seed, "steps": 300, **more}


def curves(arm, losses, metric="loss", every=50, seed=0):
  return [
    {"arm": arm, "seed": seed, "step": (i + 1) * every, metric: loss}
    for i, loss in enumerate(losses)
  ]


@pytest.mark.parametrize(
  ("losses", "failed"),
  [
    ((5.0, 4.0, 3.0, 3.4, 2.9), 0),
    ((5.0, 4.0, 3.0, 3.6, 2.9), 1),  # It came back, and was not stable.
    ((5.0, 5.6, 3.0), 1),
    ((9.0, 3.0, 2.9), 0),
    ((), 0),
  ],
)
def test_runs_that_fail(losses, failed):
  found = plot.derive([row("fast")], curves("fast", losses))
  assert [x["failed"] for x in found] == [failed]


def test_the_warm_up_may_be_rough():
  found = plot.derive([row("fast")], curves("fast", (3, 9, 3), every=20))
  assert found[0]["failed"] == 0
  found = plot.derive([row("fast", diverged=1.0)], [])
  assert found[0]["failed"] == 1


def test_speed_ups_are_over_the_dense_twin_of_the_seed():
  rows = [
    row(arm, seed, train_seconds=300 * seconds)
    for arm, seconds in (("t5", 1.0), ("switch_2.0", 2.0), ("fast", 1.0))
    for seed in (0, 1)
  ]
  points = []
  for seed in (0, 1):
    dense = [10 - 0.1 * step - seed for step in range(1, 31)]
    sparse = [10 - 0.2 * step - seed for step in range(1, 31)]
    points += curves("t5", dense, plot.LOSS, 10, seed)
    points += curves("switch_2.0", sparse, plot.LOSS, 10, seed)
  found = {(x["arm"], x["seed"]): x for x in plot.derive(rows, points)}
  for seed in (0, 1):
    assert found["t5", seed]["step_speedup"] == 1
    new = found["switch_2.0", seed]
    assert new["step_speedup"] == pytest.approx(2, rel=0.01)
    assert new["time_speedup"] == pytest.approx(1, rel=0.01)
    assert "step_speedup" not in found["fast", seed]


def test_counts_have_wilson_intervals():
  """By the formula in Wilson (1927): of 4 of 6, and of none of 16."""
  low, high = intervals.wilson(4, 6)
  assert (round(low, 3), round(high, 3)) == (0.300, 0.903)
  low, high = intervals.wilson(0, 16)
  assert low == 0 and high == pytest.approx(0.1936, abs=1e-4)
  rows = [row("fast", seed, failed=float(seed < 4)) for seed in range(16)]
  lines = plot.stability(rows + [row("t5", failed=0.0)])
  assert lines == [
    "- Stable runs of fast: 12 of 16 (95 % Wilson interval of the share: 0.51 to"
    " 0.90)."
  ]


def test_medians_are_of_pairs():
  values = {"t5": (-3.0, -2.0, -2.5), "switch_2.0": (-2.9, -1.8, -9.0)}
  rows = [
    row(arm, seed, neg_log_perplexity=value)
    for arm, own in values.items()
    for seed, value in enumerate(own)
  ]
  (line,) = plot.medians(rows[:-1] + [row("fast", neg_log_perplexity=-1.0)])
  assert "switch_2.0 minus t5: median +0.150, higher in 2 of 2 pairs" in line
  (line,) = plot.medians(rows)
  assert "switch_2.0 minus t5: median +0.100, higher in 2 of 3 pairs" in line


def slots(config, train):
  """Slots of an expert in a group of each side."""
  model = models.build(config.model, vocab_size=300)
  lengths = (config.data.seq_len, sweep.TARGETS)
  found = []
  for stack, length in zip(model.arch.stacks, lengths):
    layer = stack.layer("moe")
    _, recipe = layer.grouping.resolve(layer.recipe, length, train)
    found.append(recipe.bound.slots)
  return found


def test_papers_capacities():
  """Two choices share the slots of one; arms differ in one thing."""
  arms = sweep.cpu().configs()
  for factor in sweep.CAPACITIES:
    for train in (True, False):
      of_one, of_two = (
        slots(arms[f"{name}_{factor}"], train) for name in ("switch", "top2")
      )
      assert of_one == of_two
      wanted = factor if train else max(2.0, factor)
      assert of_one[0] == int(wanted * 16 * 128 / 16)
  two = arms["top2_1.25"].model
  assert two.moe.router.second_expert == "random"
  assert two.moe.dispatcher.order == "choice"
  assert two.moe.balancers.load.count == "first"
  for name in sweep.ONE_CHANGE:
    assert arms[name].model.moe.capacity_factor == 1.25
  assert arms["t5"].model.pattern == ("dense",)
  widths = arms["t5"].model.d_ff, arms["t5_wide"].model.d_ff
  assert widths[1] == 4 * widths[0] == 4 * two.moe.d_expert


@pytest.mark.parametrize("scale, devices", [("gpu", 8), ("pod", 128)])
def test_published_scales_have_groups_for_their_devices(scale, devices):
  """In training and evaluation, with all devices along `expert`."""
  config = sweep.SCALES[scale]().configs()["top2_1.25"]
  model = models.build(config.model, vocab_size=300)
  _, targets = spans.lengths(config.data.seq_len)
  for stack, length in zip(model.arch.stacks, (config.data.seq_len, targets)):
    tokens = stack.layer("moe").grouping.tokens(length)
    for rows in (config.data.batch_size, config.eval.batch_size):
      assert rows * length % (devices * tokens) == 0
