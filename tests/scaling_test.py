"""The experiment `scaling`: its law, its speed-ups, its report."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from experiments import plan, questions, report, tuning
from experiments.scaling import law, plot, speedup, sweep

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
  assert speedup.reached(points, 1.0) is None


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
  curves = curve("8-dense", 0, [5, 4, 3, 2]) + curve("9-4", 0, [5, 4, 3, 2])
  curves += curve("8-4", 0, [4, 2, 1.5, 1]) + curve("8-4", 1, [4, 2, 1, 1])
  curves += curve("8-2", 0, [5, 4, 3, 2.5])
  found = speedup.derive(rows, curves)
  assert (found[0][speedup.STEPS], found[0][speedup.TIME]) == (1.0, 1.0)
  assert (found[1][speedup.STEPS], found[1][speedup.TIME]) == (2.0, 1.0)
  for other in found[2:]:  # No dense run, or never as good.
    assert speedup.STEPS not in other and speedup.TIME not in other


def rows_of(planted, seeds=3, wrong=0.0):
  """Rows of all arms at scale cpu whose losses are of a law."""
  rng = np.random.default_rng(0)
  rows = []
  for size in (32, 48, 64, 96):
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
  fit, largest = plot.law_lines(rows_of(S_BASE._replace(c=0.05), wrong=1e-5))[
    1:
  ]
  assert "c = +0.05" in fit and "decided" in fit and "not decided" not in fit
  seen, unseen = largest.split("which it has not seen: ")[1].split(
    "; without interaction (c = 0) "
  )
  assert float(seen) < 1e-4 < float(unseen[:-1])
  fit = plot.law_lines(rows_of(S_BASE._replace(c=0.0), wrong=3e-3))[1]
  assert "not decided" in fit


def test_the_report_without_enough_sizes_has_no_law(tmp_path):
  rows = [r for r in rows_of(S_BASE) if r["arm"].startswith(("32", "64-"))]
  assert plot.law_lines(rows) == []
  curves = [
    {"scale": "cpu", "config_digest": ""} | point
    for point in curve("32-dense", 0, [5, 4]) + curve("32-64", 0, [4, 2])
  ]
  text = report.write(tmp_path, "It?", plot.PLAN, rows, curves)
  assert "law" not in text
  assert "| 2.00  | –    |" in text
  assert (tmp_path / "experts.png").exists()


def test_an_arm_that_tries_nothing_takes_the_choice_of_another(tmp_path):
  question = questions.load("scaling")
  made = plan.make(question, scale="cpu", workdir=str(tmp_path), fresh=True)
  (stage,) = made.sweep.stages
  tried = {run.arm for run in made.tuning(0).runs}
  assert tried == set(stage.key)
  for arm in made.sweep.arms:
    assert stage.source(arm) in tried
  assert stage.like["96-16"] == "64-8"
  # Choices of the source: 6e-3 is best.
  for run in made.tuning(0).runs:
    (rate,) = run.tried.values()
    row = run.key | {"bits_per_byte": abs(rate - 6e-3)}
    run.folder.mkdir(parents=True)
    (run.folder / "row.json").write_text(json.dumps(row))
  only = dataclasses.replace(made, arms=("96-16",))
  assert only.chosen() == {"96-16": {"optim.learning_rate": 6e-3}}
  words = tuning.describe(made.sweep.stages, "96-16", only.chosen()["96-16"])
  assert words.endswith("(of 0.003, 0.006, 0.012, for 64-8)")


def test_arms_of_a_size_have_equal_active_parameters_but_the_router():
  from moe_jax import models, params

  configs = questions.load("scaling").sweep("cpu").configs()

  def active(arm):
    c = configs[arm]
    model = models.build(
      c.model,
      vocab_size=257,
      seq_len=c.data.seq_len,
      batch_sizes=(c.data.batch_size,),
    )
    return params.count(model, c.data.seq_len)["active"]

  for size in (32, 96):
    dense = active(sweep.name(size, sweep.DENSE))
    assert active(sweep.name(size, 64)) == dense + 64 * size


def test_some_arms_have_more_seeds(tmp_path):
  """Those that the paper's claim is about."""
  sweep_of = questions.load("scaling").sweep("cpu")
  few = dataclasses.replace(sweep_of, stages=())
  made = plan.make(
    questions.load("scaling"), scale="cpu", workdir=str(tmp_path)
  )
  made = dataclasses.replace(made, sweep=few)
  count = collections.Counter(run.arm for run in made.launch().runs)
  assert (count["96-dense"], count["96-64"], count["96-16"]) == (5, 5, 3)
  count = collections.Counter(run.arm for run in made.launch(1).runs)
  assert set(count.values()) == {1}
