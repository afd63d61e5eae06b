"""The questions about images, denoising and modalities: arms, reports, slots."""

import json

import jax
import numpy as np
import pytest

from experiments import questions, report, sweeps
from experiments.modalities import sweep as modalities
from experiments.timesteps import plot as timesteps
from experiments.timesteps import sweep as denoising
from experiments.vision import slots
from moe_jax import main, models
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.data.datasets import captioned_glyphs
from moe_jax.models import counts
from moe_jax.training import evaluation, program, trained


def counted(config):
  """(sizes, FLOPs of training) of an arm."""
  _, task, model = program.build(config, jax.devices()[:1], prepare=False)
  sizes = counts.count(model, models.variables(model))
  lengths = models.lengths(model, task.lengths)
  each = counts.train_flops_per_token(model, sizes, lengths)
  return sizes, each * config.train.num_steps


def configs(name, scale):
  found = questions.load(name).scales[scale]().configs()
  for c in found.values():
    with c.unlocked():
      c.data.name = "glyphs" if "image" in c.task.name else c.data.name
      if c.data.name == "images_and_text_of_your_own":
        c.data.name = "captioned_glyphs"
        c.model.vocab_size = 40_961
        c.task.token_ranges = {}
  return found


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_arms_of_vision_have_equal_flops(scale):
  arms = {name: counted(c) for name, c in configs("vision", scale).items()}
  _, dense = arms.pop("dense")
  _, wide = arms.pop("dense_wide")
  assert 1.2 * dense < wide < 2 * dense
  for name, (_, flops) in arms.items():
    # Routers, and the slots of soft experts, whose number is whole.
    assert flops == pytest.approx(dense, rel=0.07), name
  kinds = sweeps.apply(questions.load("vision").scales[scale]().config, {})
  assert kinds.model.pattern == ("dense", "moe")


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_arms_of_timesteps_have_equal_flops(scale):
  """Two networks together train for the steps of one, and each is as large."""
  arms = configs("timesteps", scale)
  sizes, flops = counted(arms["one"])
  for name, pair in denoising.PAIRS.items():
    found = [counted(arms[arm]) for arm in pair]
    whole = (2 if name.startswith("full") else 1) * flops
    assert sum(own for _, own in found) == pytest.approx(whole, rel=1e-3)
    assert all(own == sizes for own, _ in found)
    high, low = (arms[arm].task for arm in pair)
    assert (high.expert, low.expert) == ("high", "low")
    assert high.boundary == low.boundary == float(name.split("_")[1])
  assert counted(arms["one_long"])[1] == 2 * flops
  for name in ("moe", "by_time_2", "by_time_8"):
    assert counted(arms[name])[1] == pytest.approx(flops, rel=0.05), name


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_arms_of_modalities_have_equal_flops(scale):
  arms = {name: counted(c) for name, c in configs("modalities", scale).items()}
  _, dense = arms["dense"]
  for name, (_, flops) in arms.items():
    assert flops == pytest.approx(dense, rel=0.05), name
  assert arms["shared"][0]["total"] == arms["split"][0]["total"]
  assert modalities.FIRST == captioned_glyphs.FIRST


# The rows of two networks.


def row(arm, losses, seed=0, **more):
  ranges = {f"loss/{at:.3f}-{at + 0.125:.3f}": x for at, x in losses.items()}
  place = {"scale": "cpu", "arm": arm, "seed": seed}
  return {**place, "loss": 9.0, "steps": 10, "train_flops": 5, **ranges, **more}


def test_two_networks_are_one_row():
  """Each range has the loss of its own network, and all count alike."""
  high = {0.875: 1.0}
  low = {n / 8: 2.0 + n for n in range(7)}
  rows = [
    row("one", {n / 8: 8.0 for n in range(8)}),
    row("high_0.875", high, steps=1, total_parameters=7),
    row("low_0.875", low, steps=9, total_parameters=7),
    row("low_0.5", {0.0: 1.0}),  # Its other network is not finished.
    row("high_0.25", {0.875: 1.0}, diverged=1.0),
    row("low_0.25", {0.0: 1.0}),
  ]
  one, diverged, two = timesteps.derive(rows, [])
  assert diverged["arm"] == "two_0.25" and diverged["diverged"]
  assert "loss" not in diverged  # One of its two networks has some.
  assert (one["arm"], two["arm"]) == ("one", "two_0.875")
  assert one["loss"] == one["loss_high"] == one["loss_low"] == 8.0
  assert two["loss"] == pytest.approx((1 + sum(range(2, 9))) / 8)
  assert two["loss_low"] == np.mean([2, 3, 4, 5])
  assert two["loss_high"] == np.mean([6, 7, 8, 1])
  assert (two["steps"], two["train_flops"]) == (10, 10)
  assert two["total_parameters"] == 14 and two["runs"] == 2


def test_a_report_counts_the_runs_of_its_rows(tmp_path):
  rows = [row("one", {0.0: 1.0, 0.5: 2.0})]
  rows += [row("high_0.5", {0.5: 2.0}), row("low_0.5", {0.0: 1.0})]
  more = {"config_digest": "0" * 12}
  text = report.write(
    tmp_path, "title", timesteps.REPORT, [r | more for r in rows], []
  )
  assert "Scale cpu, 3 runs, seeds 0." in text
  assert "| two_0.5 |" in text and "high_0.5" not in text
  assert (tmp_path / "ranges.png").stat().st_size > 10_000


# Fewer slots.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A work directory of an arm, as `launch` names it."""
  folder = tmp_path_factory.mktemp("runs") / "sparse" / "0123456789ab"
  flags = ["--config=configs/vmoe.py:tiny", "--config.data.batch_size=32"]
  flags += ["--config.train.num_steps=30", "--config.model.remat=none"]
  flags += ["--config.optim.learning_rate=0.01"]
  flags += ["--config.eval.batches_per_domain=4"]
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parallel, "mesh_or_none", lambda *_: None)
    main.main([*flags, f"--workdir={folder / '0'}"])
  return folder / "0"


@pytest.mark.long
def test_fewer_slots(run, monkeypatch):
  """Rows of both orders, which agree where all have slots, and with `evaluate`."""
  monkeypatch.setattr(slots, "CAPACITIES", (0.25, 8.0))
  made = []
  scorer = evaluation.scorer

  def counted(*args):
    made.append(args)
    return scorer(*args)

  monkeypatch.setattr(evaluation, "scorer", counted)
  rows = slots.measure([run, run])
  assert len(rows) == 8 and len(made) == 4  # Runs share their programs.
  assert rows[::2] == rows[1::2]
  found = {(r["order"], r["capacity"]): r for r in rows}
  assert {(r["arm"], r["seed"]) for r in rows} == {("sparse", 0)}
  tight, ample = ([found[o, c] for o in slots.ORDERS] for c in (0.25, 8.0))
  assert ample[0]["dropped"] == ample[1]["dropped"] == 0
  assert ample[0]["accuracy"] == ample[1]["accuracy"]
  assert all(r["dropped"] > 0.5 for r in tight)
  config = trained.config_of(str(run), ["model.moe.eval_capacity_factor=8.0"])
  task = program.build_task(config)
  model = program.build_model(config, task)
  _, variables = trained.weights(str(run), model)
  sums = evaluation.of_task(model, variables, task)
  wanted = evaluation.table(sums, task, model)
  assert ample[0]["accuracy"] == wanted["accuracy"]
  text = slots.table(rows)
  assert text.splitlines()[0] == "| trained as | order | 0.25 | 8 |"
  *_, last = text.splitlines()
  assert last.startswith("| sparse | priority − plain | ")
  assert last.endswith(" | 0.0 |")


def test_slots_of_experts_without_any(run, tmp_path):
  """Experts that take all of their tokens have no slots to be short of."""
  with pytest.raises(ConfigError, match="has no config.json of a run"):
    slots.measure([tmp_path / "sparse" / "0" / "0"])
  folder = tmp_path / "soft" / "0" / "0"
  folder.mkdir(parents=True)
  values = json.loads((run / "config.json").read_text())
  values["model"]["moe"]["dispatcher"] = {"name": "sorted"}
  (folder / "config.json").write_text(json.dumps(values))
  with pytest.raises(ConfigError, match="experts take all their tokens"):
    slots.measure([folder])


def test_the_committed_slots():
  rows = slots.read()
  capacities = {r["capacity"] for r in rows}
  assert capacities == {*slots.CAPACITIES}
  assert {r["order"] for r in rows} == slots.ORDERS.keys()
  text = (slots.FOLDER.parent / "README.md").read_text()
  assert slots.table(rows) in text
