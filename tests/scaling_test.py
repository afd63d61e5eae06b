"""The experiment `scaling`: its law, its speed-ups, its report."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from experiments import plan, questions, report, tuning
from experiments.scaling import law, plot, speedup, sweep
from moe_jax.core.errors import ConfigError

# Clark et al. (2202.01169), their table of S-BASE.
S_BASE = law.Law(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478)


def test_the_law_gives_what_is_published():
  # Computed by hand from their formula, with decimal logarithms.
  assert S_BASE.loss(55e6, 8) == pytest.approx(2.71, abs=0.005)
  assert S_BASE.saturated(1) == pytest.approx(1.847)
  assert S_BASE.saturated(1e9) == pytest.approx(314.478, rel=1e-3)


@pytest.mark.parametrize("interaction", [True, False])
def test_a_fit_finds_the_law_that_points_are_of(interaction):
  planted = S_BASE if interaction else S_BASE._replace(c=0.0)
  points = [
    law.Point(n, e, planted.loss(n, e))
    for n in (1e6, 3e6, 1e7)
    for e in (1, 2, 4, 8, 16, 32, 64, 128, 512)
  ]
  found = law.fit(points, interaction)
  np.testing.assert_allclose(found, planted, rtol=0.02)
  far = [law.Point(1e8, e, planted.loss(1e8, e)) for e in (1, 16, 512)]
  assert law.error(found, points) < 1e-5
  assert law.error(found, far) < 1e-4
  if interaction:
    without = law.fit(points, interaction=False)
    assert without.c == 0 and law.error(without, far) > 1e-3


def test_where_a_loss_is_reached():
  points = [(10, 5.0), (20, 3.0), (30, 4.0), (40, 2.0)]
  assert speedup.reached(points, 6.0) == 10
  assert speedup.reached(points, 3.5) == 17.5
  assert speedup.reached(points, 2.0) == 40
  with pytest.raises(ValueError, match="not reached"):
    speedup.reached(points, 1.0)


def test_a_curve_is_read_three_points_at_a_time():
  points = [(10, 5.0), (20, 3.0), (30, 4.0), (40, 2.0)]
  assert speedup.smooth(points) == [(20, 4.0), (30, 3.0)]
  assert speedup.smooth(points[:2]) == points[:2]


def test_of_two_alike_none_is_faster():
  """Though curves are noisy, and some never come down to the other's end."""
  rng = np.random.default_rng(0)

  def noisy(lower=0.0):
    steps = np.arange(100, 2001, 100)
    losses = 2 * steps**-0.1 - lower + 0.01 * rng.normal(size=len(steps))
    return list(zip(steps.tolist(), losses.tolist()))

  pairs = [(noisy(), noisy()) for _ in range(400)]
  found = [speedup.speedup(*pair) for pair in pairs]
  assert abs(np.log(found).mean()) < 3 * np.log(found).std() / 20
  for (one, other), value in zip(pairs, found):
    assert speedup.speedup(other, one) == pytest.approx(1 / value)
  worse = [speedup.speedup(noisy(), noisy(lower=-0.02)) for _ in range(400)]
  # Steps at which the exact better curve has the worse one's final loss.
  steps = (0.5 * (2 * 1900**-0.1 + 0.02)) ** -10
  assert np.mean(worse) == pytest.approx(steps / 1900, rel=0.05)


def curve(arm, seed, losses):
  """Evaluations every 100 steps."""
  return [
    {"arm": arm, "seed": seed, "step": 100 * (i + 1), speedup.LOSS: loss}
    for i, loss in enumerate(losses)
  ]


def test_speedups_are_over_the_dense_run_of_that_size_and_seed():
  row = {"scale": "cpu", "config_digest": "", "steps": 400}
  rows = [
    row | {"arm": arm, "seed": 0, "train_seconds": seconds}
    for arm, seconds in (("8-dense", 40.0), ("8-4", 80.0), ("9-4", 1.0))
  ]
  rows.append(row | {"arm": "8-4", "seed": 1, "train_seconds": 80.0})
  rows.append(row | {"arm": "8-2", "seed": 0})
  curves = curve("8-dense", 0, [6, 5, 4, 3, 2, 1])
  curves += curve("9-4", 0, [6, 5, 4, 3, 2, 1])
  curves += curve("8-4", 0, [4, 2, 0, -2, -4, -6])
  curves += curve("8-4", 1, [4, 2, 0, -2, -4, -6])
  curves += curve("8-2", 0, [6, 5.5, 5, 4.5, 4, 3.5])
  found = speedup.derive(rows, curves)
  assert (found[0][speedup.STEPS], found[0][speedup.TIME]) == (1.0, 1.0)
  # The target 2 is the mean of the dense model's last three: 500 against 200.
  assert (found[1][speedup.STEPS], found[1][speedup.TIME]) == (2.5, 1.25)
  for other in found[2:4]:  # No dense run of that size and seed.
    assert speedup.STEPS not in other and speedup.TIME not in other
  # The target 4 is its own end: 300 steps of the dense model against 500.
  assert found[4][speedup.STEPS] == 0.6 and speedup.TIME not in found[4]


def rows_of(planted, seeds=3, wrong=0.0):
  """Rows of all arms at scale cpu whose losses are of a law."""
  rng = np.random.default_rng(0)
  rows = []
  for size in (16, 32, 48, 64):
    for experts in (sweep.DENSE, 2, 4, 8, 16, 32, 64):
      count = 1 if experts == sweep.DENSE else experts
      parameters = 24 * size**2
      for seed in range(seeds):
        loss = planted.loss(parameters, count) * 10 ** (wrong * rng.normal())
        rows.append(
          {
            "scale": "cpu",
            "arm": sweep.name(size, experts),
            "seed": seed,
            "config_digest": "0" * 12,
            "total_parameters": parameters * count,
            "loss": float(loss),
            "bits_per_byte": float(loss),
          }
        )
  return rows


def test_the_report_says_whether_there_is_an_interaction():
  planted = S_BASE._replace(c=0.05)
  _, fit, change, *errors = plot.law_lines(rows_of(planted, wrong=1e-5))
  assert "c = +0.05" in fit and len(errors) == 2
  # E^ of 64 experts, by equation 7.
  start, most = S_BASE.start, S_BASE.most
  many = 1 / (1 / (63 + 1 / (1 / start - 1 / most)) + 1 / most)
  wanted = 0.05 * np.log10(many / start)
  assert f"of every seed alone: {wanted:+.3f}" in change
  assert (
    ", significant (95 % interval excludes 0). In the paper +0.01" in change
  )
  for error in errors:
    assert error.endswith(", significant (95 % interval excludes 0).")
    with_it, without = re.findall(r"0\.\d+[;.] ", error)
    assert float(with_it[:-2]) < 1e-4 < float(without[:-2])
  _, fit, *lines = plot.law_lines(rows_of(S_BASE, wrong=3e-3))
  assert all("not significant" in line for line in lines[:3])


def test_what_experts_change_is_told_though_the_model_is_wrong_for_all():
  points = [law.Point(1e7, e, 3 * S_BASE.loss(1e7, e)) for e in (1, 8, 64)]
  assert law.error(S_BASE, points) == pytest.approx(np.log10(3))
  assert law.error(S_BASE, points, over_dense=True) < 1e-12
  points[1] = points[1]._replace(loss=2 * points[1].loss)
  wanted = np.log10(2) / 2**0.5
  assert law.error(S_BASE, points, over_dense=True) == pytest.approx(wanted)


def test_the_law_is_of_seeds_that_all_arms_have():
  """A seed that is worse for all must not look like an effect of experts."""
  rows = rows_of(S_BASE)
  more = [r | {"seed": 3, "loss": 2 * r["loss"]} for r in rows[:3]]
  assert plot.law_lines(rows + more) == plot.law_lines(rows)
  few = [row for row in rows if not row["arm"].startswith(("32", "48"))]
  assert plot.law_lines(few) == []  # Six constants of six arms.


def test_the_report_without_enough_sizes_has_no_law(tmp_path):
  rows = [r for r in rows_of(S_BASE) if r["arm"].startswith(("32", "64-"))]
  assert plot.law_lines(rows) == []
  curves = [
    {"scale": "cpu", "config_digest": ""} | point
    for point in curve("32-dense", 0, [5, 4]) + curve("32-64", 0, [4, 2])
  ]
  text = report.write(tmp_path, "It?", plot.REPORT, rows, curves)
  assert "law" not in text and "7.5 times" in text
  (line,) = (x for x in text.splitlines() if x.startswith("| 32-64 "))
  assert line.endswith("| 2.00            |")
  assert "speed-up, time" not in text  # Nothing was timed.
  assert "speed-up, steps, 32-64 minus 32-dense: +1.00" in text
  assert (tmp_path / "experts.png").exists()
  assert (tmp_path / "validation_bits_per_byte.png").exists()


def test_all_scales_have_claims():
  found = {(claim.arm, claim.baseline) for claim in plot.REPORT.claims}
  assert {("64-16", "64-dense"), ("16-64", "16-8")} <= found
  assert {("768-64", "768-dense"), ("768-128", "768-dense")} <= found


def test_an_arm_that_tries_nothing_takes_the_choice_of_another(tmp_path):
  question = questions.load("scaling")
  made = plan.make(question, scale="cpu", workdir=tmp_path)
  made = made.knowing([[], [], []])  # Nothing is committed.
  (stage,) = made.sweep.stages
  runs_of_stage = made.launch(stage=0).runs
  tried = {run.arm for run in runs_of_stage}
  assert tried == set(stage.key)
  for arm in made.sweep.arms:
    assert stage.source(arm) in tried
  assert stage.like["16-16"] == "16-8"
  only = dataclasses.replace(made, arms=("16-16",))
  assert {run.arm for run in only.launch(stage=0).runs} == {"16-8"}
  # Choices of the source: 1.2e-2 is best.
  rows = [
    run.key | {"bits_per_byte": abs(rate - 1.2e-2)}
    for run in runs_of_stage
    for rate in run.tried.values()
  ]
  chosen = only.knowing([[], rows, []]).chosen("16-16")
  assert chosen == {"optim.learning_rate": 1.2e-2}
  words = tuning.describe(made.sweep.stages, "16-16", chosen)
  assert words.endswith("(of 0.006, 0.012, 0.024, for 16-8)")
  with pytest.raises(ConfigError, match="no effect on the arm 16-16"):
    plan.make(
      question,
      scale="cpu",
      arms=["16-16"],
      overrides=["optim.learning_rate=1e-3"],
    )


def test_arms_of_a_size_have_equal_active_parameters_but_the_router():
  from moe_jax import models
  from moe_jax.models import counts

  configs = questions.load("scaling").scales["cpu"]().configs()

  def active(arm):
    model = models.build(configs[arm].model, vocab_size=257)
    return counts.count(model, models.variables(model))["active"]

  for size in (16, 64):
    dense = active(sweep.name(size, sweep.DENSE))
    assert active(sweep.name(size, 64)) == dense + 64 * size


def test_some_arms_have_more_seeds(tmp_path):
  """Those that the paper's claim is about."""
  sweep_of = questions.load("scaling").scales["cpu"]()
  few = dataclasses.replace(sweep_of, stages=())
  made = plan.make(
    questions.load("scaling"), scale="cpu", workdir=str(tmp_path)
  )
  made = dataclasses.replace(made, sweep=few)
  count = collections.Counter(run.arm for run in made.launch().runs)
  assert (count["16-dense"], count["16-64"], count["16-16"]) == (5, 5, 3)
  count = collections.Counter(run.arm for run in made.launch(1).runs)
  assert set(count.values()) == {1}
