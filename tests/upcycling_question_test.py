"""The question about upcycling: what its report makes of rows and curves."""

import jax
import pytest

from experiments import plan, questions
from experiments.upcycling import plot, sweep
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.models import counts
from moe_jax.training import program
from moe_jax.training.starts import fit, upcycling


def line(start, slope):
  """A curve of 15 evaluations, 100 steps apart."""
  return [(100 * i, start - slope * 100 * i) for i in range(1, 16)]


def test_where_curves_cross():
  scratch = line(3.0, 0.001)
  assert plot.passing(scratch, line(2.5, 0.0002)) == pytest.approx(625)
  assert plot.passing(scratch, line(1.0, 0.0)) is None
  # Ahead from the first evaluation.
  assert plot.passing(scratch, line(4.0, 0.001)) == 100
  # The last time counts, as an evaluation is noisy.
  noisy = [(s, y - (0.6 if s == 300 else 0)) for s, y in scratch]
  assert plot.passing(noisy, line(2.5, 0.0002)) == pytest.approx(625)


def test_equal_compute_counts_what_an_arm_started_from():
  """600 steps of a dense model cost 300 of the others here."""
  rows, points = [], []
  flops = {"dense": (600, 1), "scratch": (1500, 2), "copy": (1500, 2)}
  curves = {"scratch": line(3.0, 0.001), "copy": line(2.5, 0.0002)}
  for seed in (0, 1):
    for arm, (steps, each) in flops.items():
      whole = {"steps": steps, "train_flops": steps * each}
      rows.append({"arm": arm, "seed": seed, **whole})
    for arm, curve in curves.items():
      place = {"arm": arm, "seed": seed}
      points += [{**place, "step": s, plot.LOSS: y + seed} for s, y in curve]
  found = {(r["arm"], r["seed"]): r for r in plot.derive(rows, points)}
  for seed in (0, 1):
    # The mean of three evaluations ends at step 1400.
    scratch, copy = found["scratch", seed], found["copy", seed]
    assert scratch["all_bits"] == pytest.approx(3.0 - 1.4 + seed)
    # So far scratch has used 2800 FLOPs, of which 600 were the dense model's.
    assert copy["all_bits"] == pytest.approx(2.5 - 0.0002 * 1100 + seed)
    assert copy["passed"] == pytest.approx(625 / 600)
    assert "passed" not in found["dense", seed]
  text = plot.crossings([*found.values()])
  assert text == [
    "- scratch passed copy in 2 of 2 seeds, after 104 [104, 104] % of the tokens of"
    " dense; it was behind by 0.100 bits per byte after a third of the"
    " steps, and by -0.620 [-0.620, -0.620] at the end."
  ]


@pytest.mark.parametrize("scale", ["cpu", "gpu", "pod"])
def test_arms_fit_what_they_start_from(scale):
  """The sizes too: a dense model that goes on has the FLOPs of those with experts."""
  configs = sweep.SCALES[scale]().configs()
  made, flops = {}, {}
  for arm, c in configs.items():
    with c.unlocked():
      c.data.update(name="python_sources", dir=None)
      c.model.vocab_size = 50_304 if scale != "cpu" else None
    devices = jax.devices()[:1]
    _, task, model = program.build(c, devices, prepare=False)
    sizes = counts.count(model, models.variables(model))
    each = counts.train_flops_per_token(model, sizes, task.lengths)
    made[arm], flops[arm] = model, each * c.train.num_steps
  for arm, source in sweep.STARTS.items():
    how = configs[arm].upcycle
    if how:
      fit.check(made[source], made[arm], upcycling.Upcycling(**how))
  kept = {
    arm
    for arm, source in sweep.STARTS.items()
    if (how := configs[arm].upcycle)
    and not fit.changes(made[source], made[arm], upcycling.Upcycling(**how))
  }
  assert kept == {"copy", "copy_long", "granular"}
  assert flops["dense_on"] == pytest.approx(flops["copy"], rel=0.002)
  assert flops["granular"] == pytest.approx(flops["copy"], rel=0.03)


def test_arms_wait_for_the_choices_of_what_they_start_from(tmp_path):
  made = plan.make(questions.load("upcycling"), scale="cpu", workdir=tmp_path)
  made = made.knowing([[], [], []])
  tried = {run.arm for run in made.launch(stage=0).runs}
  assert tried == {"dense", "scratch"}
  assert not made.launch(stage=1).runs
  with pytest.raises(ConfigError, match="is not tuned yet"):
    made.launch()
