"""Launching a small question, from nothing to its report."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import tqdm.std

import experiments
from benchmarks import train_step
from experiments import launch, plan, questions, runs, sweeps, tuning
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError, Interrupted
from moe_jax.core.progress import Progress
from moe_jax.launch import local
from moe_jax.run import command, run_directory
from moe_jax.training import loop, program
from tests import pod

SWEEP = """
from configs import tiny
from experiments import sweeps

def demo():
  c = tiny.get_config()
  c.data.seq_len = 16
  c.model.d_model = 8
  c.model.num_layers = 1
  c.train.num_steps = 6
  c.train.log_every = 2
  c.optim.warmup_steps = 1
  c.eval.batches_per_domain = 1
  arms = sweeps.over("model.moe.balancers", {
    "none": {}, "bias": {"b": {"name": "bias", "rate": 0.1}},
  })
  return sweeps.Sweep(c, arms, seeds=2)

SCALES = {"demo": demo}
"""
PLOT = """
from experiments.figures import Curve
from experiments.report import Claim, Column, Report

REPORT = Report(
  columns=(Column("bits_per_byte"), Column("train/max_vio", "max_vio")),
  claims=(Claim("bits_per_byte", "bias", "none"),),
  plots=(Curve("max_vio", "MaxVio", floor="max_vio_floor"),),
)
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
  """A question `balance` of 2 arms x 2 seeds; returns (its folder, workdir)."""
  folder = tmp_path / "questions" / "balance"
  folder.mkdir(parents=True)
  (folder / "__init__.py").write_text('"""Is it small?"""\n')
  (folder / "sweep.py").write_text(SWEEP)
  (folder / "plot.py").write_text(PLOT)
  # The copy is undone after the test, and the added folder with it.
  monkeypatch.setattr(experiments, "__path__", list(experiments.__path__))
  questions.add_folder(folder.parent)
  yield folder, tmp_path / "work"
  for name in [m for m in sys.modules if m.startswith("experiments.balance")]:
    del sys.modules[name]


COMPILED = {}  # Programs by the digest of their config without seed.


@pytest.fixture
def programs(monkeypatch):
  """The configs that programs were made for. Equal ones compile once here."""
  made, compile_one = [], program.Program

  def counted(config, *more):
    del more
    made.append(config)
    digest = sweeps.digest(config)
    if digest not in COMPILED:
      COMPILED[digest] = compile_one(config)
    return COMPILED[digest]

  monkeypatch.setattr(program, "Program", counted)
  # A program for a single device compiles faster.
  monkeypatch.setattr(parallel, "mesh_or_none", lambda *_: None)
  return made


def run(capsys, workdir, *flags):
  """Launches `balance` and returns the table it printed."""
  capsys.readouterr()
  assert launch.main(["balance", f"--workdir={workdir}", *flags]) == 0
  out = capsys.readouterr().out
  page = workdir / "report" / "report.html"
  assert page.exists() and f"Report: {page.parent}, page: {page}\n" in out
  return out[out.index("# Is it small?") : out.index("Report:")]


def test_a_launch(small, programs, capsys):
  """Everything that happens to a question, in the order in which it does."""
  folder, work = small
  first = run(capsys, work)
  assert len(programs) == 2, "one program for all seeds of an arm"
  assert "none" in first and " [" in first and "bias minus none" in first
  names = {p.name for p in (work / "report").iterdir()}
  csvs = {"results.csv", "curves.csv"}
  figures = {"max_vio.png", "max_vio.pdf"}
  assert names == {"table.md", "table.tex", "report.html"} | csvs | figures
  assert (work / "report" / "table.md").read_text() in first
  for seed in "01":
    config = json.loads((of(work, "bias", seed) / "config.json").read_text())
    assert config["seed"] == int(seed)
  found = sorted(work.glob("*/*/*/row.json"))
  rows = [json.loads(p.read_text()) for p in found]
  assert len({row["bits_per_byte"] for row in rows}) == 4

  # Finished runs are not run again.
  assert run(capsys, work) == first
  assert len(programs) == 2
  # Fewer seeds: another table, of what is there.
  one = run(capsys, work, "--seeds=1")
  assert one != first and "a single pair of seeds gives no interval" in one
  assert len(programs) == 2

  # Committed rows serve another work directory, which needs no runs.
  run(capsys, work)
  for name in csvs:
    (folder / name).write_bytes((work / "report" / name).read_bytes())
  assert run(capsys, work.with_name("other")) == first
  assert len(programs) == 2
  for name in csvs:
    report = work.with_name("other") / "report" / name
    assert report.read_bytes() == (folder / name).read_bytes()
    (folder / name).unlink()

  # A run that was cut short before its first checkpoint is run again.
  cut = of(work, "none", 1)
  (cut / "row.json").unlink()
  shutil.rmtree(cut / "checkpoints")
  half = (cut / "metrics.jsonl").read_text()[:100]
  (cut / "metrics.jsonl").write_text(half)
  assert "0 of 2" not in listed(capsys, work)
  assert numbers(run(capsys, work)) == numbers(first)
  assert len(programs) == 3

  # Another config has other runs, and these stay.
  key = "--config.train.num_steps=4"
  with pytest.raises(ConfigError, match="no run of these is finished"):
    launch.main(["balance", f"--workdir={work}", "--report", key])
  assert run(capsys, work, "--arm=none", "--seeds=1", key) != one
  assert len(programs) == 4
  assert numbers(run(capsys, work)) == numbers(first)
  assert len(programs) == 4


def of(work, arm, seed):
  """The folder of a run, of the only config that there is."""
  (found,) = work.glob(f"{arm}/*/{seed}")
  return found


def test_launches_that_share_a_work_directory(small, programs, capsys):
  """A launch skips runs that another launch holds or has finished."""
  _, work = small
  first = run(capsys, work)
  for seed in (0, 1):
    (of(work, "none", seed) / "row.json").unlink()
  held = of(work, "none", 0)
  config = sweeps.apply(programs[0], {"seed": 0})
  with run_directory.RunDirectory(held, config):
    report = run(capsys, work)
    assert "Not finished, so not in it:\n- none seed 0\n" in report
    assert "- none seed 1" not in report
  assert numbers(run(capsys, work)) == numbers(first)


IN_A_POD = """
import sys, time
from experiments import launch
from moe_jax.run import command, processes
from moe_jax.training import loop

add, clock = loop.Lines.add, time.monotonic

def stopped(lines, step, sums):
  add(lines, step, sums)
  if step >= 5 and str(lines._directory.path)[-1] == "1" and {stops}:
    if processes.is_first():  # Its clock alone counts.
      time.monotonic = lambda: clock() + 7200
    time.sleep(0.2)  # jax looks once a second for what to tell the others.

loop.Lines.add = stopped
command.run(lambda: launch.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_processes_that_run_it_together(small, programs, capsys):
  """Two processes give the numbers of one; both stop when the time is up."""
  folder, work = small
  flags = ["--arm=bias", "--config.train.num_steps=30"]
  flags += ["--config.train.check_mesh=False"]  # To be quick.
  alone = run(capsys, work.with_name("alone"), *flags)

  def together(stops):
    text = IN_A_POD.format(stops=stops)
    command = [sys.executable, "-c", text, "balance", f"--workdir={work}"]
    command += [f"--questions={folder.parent}", "--minutes=60", *flags]
    started = local.start(command, 2, 1, cwd=pod.ROOT)
    said = [process.communicate()[0].decode() for process in started]
    return [process.returncode for process in started], said

  codes, said = together(stops=True)
  assert codes == [75, 75], said
  assert "Is it small?" in said[0] and "Is it small?" not in said[1]
  assert "1 of 2 runs are left, bias seed 1 first" in said[0]
  first, second = (of(work, "bias", seed) for seed in (0, 1))
  assert (first / "row.json").exists() and not (second / "row.json").exists()
  (saved,) = (f.name for f in (second / "checkpoints").glob("[0-9]*"))
  assert 5 <= int(saved) < 30
  codes, said = together(stops=False)
  assert codes == [0, 0], said
  facts = json.loads((second / "run.json").read_text())
  assert facts["processes"] == 2 and facts["continued"][0]["step"] == int(saved)

  def rows(workdir):
    return runs.read_csv(workdir / "report" / "results.csv")

  for one, other in zip(rows(work), rows(work.with_name("alone")), strict=True):
    assert one.keys() == other.keys()
    for key in one.keys() - {
      "train/tokens_per_second",
      *runs.KEYS,
      *runs.ORIGIN,
    }:
      assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), key
  assert "Report:" in said[0] and "Report:" not in said[1]
  assert len(numbers(alone)) == len(numbers(said[0]))


def look(experiment):
  """The experiment, knowing what is finished by now."""
  place = experiment.question.folder, experiment.scale, experiment.workdir
  return experiment.knowing(runs.finished(*place))


def listed(capsys, work):
  launch.main(["balance", f"--workdir={work}", "--list"])
  return capsys.readouterr().out


def numbers(table):
  """The table's lines, which hold no times."""
  return [line for line in table.splitlines() if line.startswith("|")]


def test_tuning(small, programs, capsys):
  """Choices come from a seed of their own, and survive as committed rows."""
  folder, work = small
  stage = """, seeds=1, stages=(
    tuning.Stage("optim.learning_rate", (0.0, 1e-2)),
    tuning.Stage({"bias": "model.moe.balancers.b.rate"}, (0.1, 0.2), seeds=2),
  ))"""
  text = SWEEP.replace(", seeds=2)", stage)
  assert text != SWEEP
  text = text.replace("import sweeps", "import sweeps, tuning")
  (folder / "sweep.py").write_text(text)

  with pytest.raises(ConfigError, match="not tuned yet .* with --tune first"):
    launch.main(["balance", f"--workdir={work}"])
  assert "bias                    not tuned yet" in listed(capsys, work)
  assert launch.main(["balance", f"--workdir={work}", "--tune"]) == 0
  out = capsys.readouterr().out
  assert "none: optim.learning_rate = 0.01 (of 0, 0.01; at an end)" in out
  # The second stage tries 0.1, which the first one ran, again with 0.2; and
  # each with another seed.
  assert len(programs) == 2 * 2 + 2
  assert {c.seed for c in programs} == {0}, "a program is of no seed"
  rows = runs.read_csv(work / "report" / "tuning.csv")
  seeds = [row["seed"] - tuning.SEED for row in rows]
  assert (seeds.count(0), seeds.count(1)) == (5, 2) and len(rows) == 7
  assert {row["optim.learning_rate"] for row in rows} == {0.0, 1e-2}

  first = run(capsys, work)
  assert "seeds 0" in first
  assert "none: optim.learning_rate = 0.01 (of 0, 0.01; at an end)" in first
  config = json.loads((of(work, "bias", 0) / "config.json").read_text())
  assert config["optim"]["learning_rate"] == 1e-2
  rate, mean = "model.moe.balancers.b.rate", {}
  for value in (0.1, 0.2):
    tried = [r for r in rows if r["arm"] == "bias" and r.get(rate) == value]
    assert len(tried) == 2
    mean[value] = sum(r["bits_per_byte"] for r in tried) / 2
  chosen = config["model"]["moe"]["balancers"]["b"]["rate"]
  assert mean[chosen] == min(mean.values())

  # The rows of the tuning can be committed, and then it is not run again.
  name = "tuning.csv"
  (folder / name).write_bytes((work / "report" / name).read_bytes())
  made = len(programs)
  # So is what was tried before, and is not any more.
  old = rows[0] | {"config_digest": "of-before"}
  runs.write_csv(folder / name, [old, *rows])
  kept = look(plan.make(questions.load("balance"), workdir=work)).tuning_rows()
  assert old in kept and len(kept) == len(rows) + 1
  assert numbers(run(capsys, work.with_name("other"))) == numbers(first)
  assert len(programs) == made + 2
  # Tuned rows are of no use under another setting of all arms.
  with pytest.raises(ConfigError, match="not tuned yet"):
    launch.main(
      ["balance", f"--workdir={work}/x", "--config.model.moe.top_k=1"]
      + ["--config.model.moe.router={'name': 'top_k'}"]
    )


def test_what_arms_take_from_others(small, capsys):
  """A launch of one arm also tunes the arms whose choices it takes."""
  folder, work = small
  stage = """, seeds=1, stages=(
    tuning.Stage("optim.learning_rate", (0.0, 1e-2)),
    tuning.Stage("optim.optimizer.b1", (0.8, 0.9), like={"none": "bias"}),
  ))"""
  text = SWEEP.replace(", seeds=2)", stage)
  text = text.replace("import sweeps", "import sweeps, tuning")
  (folder / "sweep.py").write_text(text)
  made = plan.make(questions.load("balance"), arms=["none"], workdir=work)

  def finish(launch, best):
    for run in launch.runs:
      (*_, value) = run.tried.values()
      wrong = abs(value - best[run.arm])
      run.folder.mkdir(parents=True, exist_ok=True)
      row = run.key | {"bits_per_byte": wrong}
      (run.folder / "row.json").write_text(json.dumps(row))

  assert look(made).chosen("none") is None
  first = look(made).launch(stage=0)
  assert [run.arm for run in first.runs] == ["none", "none", "bias", "bias"]
  finish(first, {"none": 0.0, "bias": 1e-2})
  second = look(made).launch(stage=1)
  # The arm `bias` has the rate that it chose itself.
  assert [run.tried for run in second.runs] == [
    {"optim.learning_rate": 1e-2, "optim.optimizer.b1": b1} for b1 in (0.8, 0.9)
  ]
  finish(second, {"bias": 0.9})
  assert look(made).chosen("none") == {
    "optim.learning_rate": 0.0,
    "optim.optimizer.b1": 0.9,
  }


STARTS = """
from configs import tiny
from experiments import sweeps, tuning

def demo():
  c = tiny.get_config()
  c.data.seq_len = 16
  c.model.update(d_model=8, num_layers=1, d_ff=32)
  c.model.moe.d_expert = 32
  c.train.num_steps = 4
  c.optim.warmup_steps = 1
  c.eval.batches_per_domain = 1
  dense = {"model.pattern": ("dense",)}
  arms = {
    "dense": dense,
    "on": dense | {"optim.learning_rate": 0.0},
    "copy": {"upcycle": {"method": "copy"}},
  }
  key = {"dense": "optim.learning_rate", "copy": "model.moe.top_k"}
  values = {"dense": (0.0, 1e-2), "copy": (1, 2)}
  stages = (tuning.Stage(key, values),)
  starts = {"copy": "dense", "on": "dense"}
  return sweeps.Sweep(c, arms, seeds=2, stages=stages, starts=starts)

SCALES = {"demo": demo}
"""


def run_of(arm, work):
  """The run of an arm with seed 0."""
  made = plan.make(questions.load("balance"), arms=[arm], workdir=work)
  (run,) = look(made).launch(seeds=1).runs
  return run


def test_arms_that_start_from_the_runs_of_another(small, programs, capsys):
  folder, work = small
  (folder / "sweep.py").write_text(STARTS)
  command = ["balance", f"--workdir={work}"]
  assert launch.main([*command, "--arm=copy", "--tune"]) == 0
  tuned = {path.parts[-3] for path in work.glob("tuning/*/*/1000")}
  assert tuned == {"dense", "copy"}, "and what it starts from"
  run(capsys, work)
  bits = {}
  for path in work.glob("*/*/?/row.json"):
    row = json.loads(path.read_text())
    bits[row["arm"], row["seed"]] = row["bits_per_byte"]
    config = json.loads((path.parent / "config.json").read_text())
    if row["arm"] != "dense":
      (dense,) = work.glob("dense/*")
      assert config["init_from"] == f"dense/{dense.name}"
  # With a learning rate of 0 it ends as it starts: as the run of its seed.
  assert bits["on", 0] == bits["dense", 0] != bits["dense", 1]
  assert bits["on", 1] == bits["dense", 1]
  assert len(set(bits.values())) == 4

  # Where only the rows of what it starts from are, its runs are made again.
  for name in ("results.csv", "tuning.csv"):
    shutil.copy(work / "report" / name, folder / name)
  other = work.with_name("other")
  run(capsys, other)
  assert not list(other.glob("*/*/?/row.json"))
  assert (
    launch.main(["balance", f"--workdir={other}", "--arm=on", "--fresh"]) == 0
  )
  rows = {p.parts[-4]: 0 for p in other.glob("*/*/?/row.json")}
  assert rows.keys() == {"on", "dense"}

  # One that another launch is running is no start yet, and one that diverged never.
  start = run_of("dense", work / "y")
  command = [
    "balance",
    f"--workdir={work}/y",
    "--arm=on",
    "--seeds=1",
    "--fresh",
  ]
  config = sweeps.apply(start.config, {"seed": 0})
  for why in ("is not finished", "diverged"):
    held = run_directory.RunDirectory(start.folder, config)
    with held, pytest.raises(ConfigError, match="no run of these is finished"):
      launch.main(command)
    assert f"on seed 0 is left out: dense seed 0, its start, {why}" in (
      capsys.readouterr().err
    )
    row = start.key | {"diverged": 1.0}
    (start.folder / "row.json").write_text(json.dumps(row))

  text = STARTS.replace("d_expert = 32", "d_expert = 24")
  (folder / "sweep.py").write_text(text.replace("stages=stages", "stages=()"))
  del sys.modules["experiments.balance.sweep"]
  with pytest.raises(
    ConfigError, match="arm copy cannot start from dense: .*24"
  ):
    launch.main(["balance", f"--workdir={work}/x"])
  assert not list(work.glob("x/*/*/*"))


def test_a_fresh_run_is_compared_with_the_committed_one(
  small, programs, capsys
):
  folder, work = small
  flags = ["--arm=bias", "--seeds=1"]
  run(capsys, work, *flags)
  rows = runs.read_csv(work / "report" / "results.csv")
  runs.write_csv(folder / "results.csv", rows)

  def fresh(name):
    code = launch.main(
      ["balance", f"--workdir={work.with_name(name)}", "--fresh", *flags]
    )
    return code, capsys.readouterr().out

  code, out = fresh("again")
  assert code == 0
  count = len([k for k in rows[0] if k not in runs.KEYS + runs.ORIGIN]) - 1
  same = f"bias seed 0: {count} of {count} committed numbers are the same"
  assert same in out and len(programs) == 2
  rows[0]["bits_per_byte"] += 1e-15
  runs.write_csv(folder / "results.csv", rows)
  code, out = fresh("third")
  assert code == 1 and "to the last bit; not bits_per_byte" in out
  with pytest.raises(ConfigError, match="holds a finished run already"):
    fresh("third")


def test_publishing_keeps_what_is_of_other_scales(small, programs, capsys):
  folder, work = small
  other = {"scale": "pod", "arm": "none", "seed": 0, "config_digest": "x"}
  for name in ("results.csv", "curves.csv"):
    runs.write_csv(folder / name, [other])
  table = run(capsys, work, "--publish")
  rows = runs.read_csv(folder / "results.csv")
  assert [r["scale"] for r in rows] == ["pod"] + ["demo"] * 4
  assert rows[1:] == runs.read_csv(work / "report" / "results.csv")
  assert (folder / "figures" / "demo.md").read_text() in table
  assert (folder / "figures" / "demo_max_vio.png").exists()
  shutil.rmtree(work)
  assert numbers(run(capsys, work, "--report")) == numbers(table)
  run(capsys, work, "--report", "--publish")
  assert runs.read_csv(folder / "results.csv") == rows
  assert len(programs) == 2
  # A report that would leave rows out does not replace them.
  for flag in ("--arm=none", "--seeds=1", "--config.eval.every=0"):
    with pytest.raises(ConfigError, match="--publish replaces all rows"):
      launch.main(["balance", "--report", "--publish", flag])
  (folder / "sweep.py").write_text(
    SWEEP.replace("num_steps = 6", "num_steps = 4")
  )
  del sys.modules["experiments.balance.sweep"]
  run(capsys, work, "--arm=none", "--seeds=1")
  with pytest.raises(ConfigError, match="3 runs are not finished, none seed 1"):
    launch.main(["balance", f"--workdir={work}", "--report", "--publish"])
  assert runs.read_csv(folder / "results.csv") == rows


def test_tuning_takes_no_flags_of_a_report(small):
  for flag in ("--publish", "--report", "--fresh"):
    with pytest.raises(ConfigError, match="--tune only tries and chooses"):
      launch.main(["balance", f"--workdir={small[1]}", "--tune", flag])


def test_columns_that_no_run_has_are_left_out(small, programs, capsys):
  """The report names them, but for those that a scale may not have."""
  folder, work = small
  optional = 'Column("train_seconds", optional=True), Column("train/maxvio")'
  (folder / "plot.py").write_text(
    PLOT.replace('Column("train/max_vio", "max_vio")', optional)
  )
  table = run(capsys, work, "--arm=none", "--seeds=1")
  assert "| arm  | bits_per_byte |\n" in table
  assert "Left out, as no run here has it: `train/maxvio`.\n" in table
  assert "train_seconds" not in table


def test_tuning_by_a_metric_that_no_run_has(small):
  folder, work = small
  stage = ", stages=(tuning.Stage('optim.learning_rate', (0.1, 0.2), 'x'),))"
  text = SWEEP.replace(", seeds=2)", stage)
  text = text.replace("import sweeps", "import sweeps, tuning")
  (folder / "sweep.py").write_text(text)
  made = plan.make(questions.load("balance"), workdir=work)
  rows = [run.key | {"loss": 1.0} for run in made.launch(stage=0).runs]
  with pytest.raises(ConfigError, match="tunes by x, which runs of the arm no"):
    made.knowing([[], rows, []]).chosen("none")


def test_a_run_that_diverges_stops_no_other(small, programs, capsys):
  """Its row says so, and it is no candidate of a tuning."""
  folder, work = small
  stage = ", stages=(tuning.Stage('optim.learning_rate', (1e-2, 1e30)),))"
  text = SWEEP.replace(", seeds=2)", stage)
  text = text.replace("import sweeps", "import sweeps, tuning").replace(
    "log_every = 2", "max_skipped_in_a_row = 2"
  )
  (folder / "sweep.py").write_text(text)
  assert launch.main(["balance", f"--workdir={work}", "--tune"]) == 0
  out, err = capsys.readouterr()
  assert "not finite in 2 steps in a row" in err
  assert "none, bias: optim.learning_rate = 0.01" in out
  lost = [
    r
    for r in runs.read_csv(work / "report" / "tuning.csv")
    if runs.DIVERGED in r
  ]
  assert [r["optim.learning_rate"] for r in lost] == [1e30, 1e30]
  # Finished runs are not run again.
  made = len(programs)
  assert launch.main(["balance", f"--workdir={work}", "--tune"]) == 0
  assert len(programs) == made


def test_runs_go_on_with_the_data_of_their_own_config(small):
  """Not with that of an arm that has other data."""
  folder, work = small
  text = (
    SWEEP[: SWEEP.index("  arms =")]
    + """
  arms = sweeps.over("data.text_feature", {"one": "text", "two": "other"})
  return sweeps.Sweep(c, arms, seeds=2)

SCALES = {"demo": demo}
"""
  )
  (folder / "sweep.py").write_text(text)
  asked = plan.make(questions.load("balance"), workdir=work).launch()
  first = asked.runs[0]
  first.folder.mkdir(parents=True)
  (first.folder / "run.json").write_text('{"data": "abc"}')
  assert [run.arm for run in asked.runs[::2]] == ["one", "two"]
  found = [run.begun(asked.runs)[1] for run in asked.runs[::2]]
  assert found == ["abc", None]
  for text in ("[1]", "null", '{"data": 1}', "[" * 100_000):
    (first.folder / "run.json").write_text(text)
    (first.folder / "row.json").write_text(text)
    assert first.begun(asked.runs) == (False, None)


def test_arms_are_told_by_what_they_differ_in(small):
  """A single one by what tells it from the others of its question."""
  bias = "bias: model.moe.balancers.b.name='bias', model.moe.balancers.b.rate="
  asked = plan.make(questions.load("balance"), workdir="work")
  assert asked.launch().summary.splitlines() == [
    "Is it small?",
    "2 arms, 0 of 4 runs finished; in work",
    "  none: model.moe.balancers={}",
    f"  {bias}0.1",
  ]
  asked = plan.make(questions.load("balance"), arms=["bias"])
  assert asked.launch().summary.endswith(f"\n  {bias}0.1")


def test_minutes(small, programs, capsys, monkeypatch):
  """They end inside a run, then between two; the same command goes on."""
  _, work = small
  whole = numbers(run(capsys, work.with_name("whole")))
  add, finish, clock = loop.Lines.add, runs.Run.finish, time.monotonic
  flags = ["balance", f"--workdir={work}", "--minutes=30"]

  def time_is_up():
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)

  def add_and_stop(lines, step, sums):
    add(lines, step, sums)
    if step == 3:
      time_is_up()

  def finish_and_stop(*arguments):
    finish(*arguments)
    time_is_up()

  monkeypatch.setattr(loop.Lines, "add", add_and_stop)
  with pytest.raises(SystemExit) as stopped:
    command.run(lambda: launch.main(flags))
  assert stopped.value.code == 75
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("stopped after step 3 and saved in ")
  assert "goes on; 4 of 4 runs are left, none seed 0 first, and" in error

  monkeypatch.setattr(loop.Lines, "add", add)
  monkeypatch.setattr(time, "monotonic", clock)
  monkeypatch.setattr(runs.Run, "finish", finish_and_stop)
  with pytest.raises(Interrupted, match="between two runs; .* 3 of 4 runs are"):
    launch.main(flags)
  monkeypatch.setattr(runs.Run, "finish", finish)
  monkeypatch.setattr(time, "monotonic", clock)
  assert numbers(run(capsys, work)) == whole


@pytest.mark.parametrize(
  "key",
  ["model.moe.balancers.b.rate=0.3", "model.moe.balancers={}", "seed=3"],
)
def test_a_setting_that_an_arm_would_undo(small, key):
  with pytest.raises(ConfigError, match=f"--config.{key.split('=')[0]}"):
    launch.main(["balance", f"--workdir={small[1]}", f"--config.{key}"])


def test_nothing_to_tune(small):
  with pytest.raises(ConfigError, match="tunes nothing at scale demo"):
    launch.main(["balance", f"--workdir={small[1]}", "--tune"])


def test_listing_writes_nothing(small, capsys):
  _, work = small
  assert "none                    0 of 2 seeds finished" in listed(capsys, work)
  assert not work.exists()


@pytest.mark.parametrize(
  "flags, words",
  [
    (["balanc"], 'did you mean "balance"?'),
    (["second"], "vision. For one of your own, give --questions=FOLDER, the"),
    (["balance", "--dry_rum"], 'did you mean "--dry_run"?'),
    (["balance", "--dry_run", "--list"], "leave out --list"),
    (["balance", "--dry_run", "--arm=bios"], 'did you mean "bias"?'),
    (["balance", "--scale=pod"], 'no scale "pod"; it has: demo'),
    (["balance", "--arm=bios"], 'did you mean "bias"?'),
    (["balance", "--seeds=0"], "give 1 or more"),
    (["balance", "--workdir=FILE/work"], "cannot be written to"),
    (["balance", "--report"], "leave out --report"),
  ],
)
def test_what_cannot_be_done(
  small, programs, capsys, flags, words, monkeypatch
):
  folder, _ = small
  monkeypatch.chdir(folder)
  (folder / "FILE").touch()
  with pytest.raises(SystemExit) as stopped:
    command.run(lambda: launch.main(flags))
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and words in error
  assert error.count("\n") == 1
  assert not programs


@pytest.mark.parametrize(
  "overrides, words",
  [
    ('{"b": {"name": "bios"}}', 'there is no "bios" in balancers'),
    ('{"b": {"name": "bias"}}', 'needs "rate"'),
  ],
)
def test_a_wrong_arm_stops_before_training(small, programs, overrides, words):
  """Though it is the last one."""
  folder, work = small
  right = '{"b": {"name": "bias", "rate": 0.1}}'
  assert right in SWEEP
  (folder / "sweep.py").write_text(SWEEP.replace(right, overrides))
  match = f"arm bias: .*{words}.*To run the others, give --arm=none$"
  for flags in ([], ["--dry_run"]):
    with pytest.raises(ConfigError, match=match):
      launch.main(["balance", f"--workdir={work}", *flags])
  assert not programs


@pytest.mark.parametrize(
  "none, bias, hint",
  [
    ("gone", "gone", " This holds for all arms"),
    ("gone", "lost", " No other arm can run"),
  ],
)
def test_where_no_arm_can_run_none_is_recommended(
  small, programs, none, bias, hint
):
  folder, work = small
  arms = f"""sweeps.over("plugins", {{
    "none": ("{none}",), "bias": ("{bias}",)}})"""
  start, end = SWEEP.index("sweeps.over"), SWEEP.index("  return sweeps")
  text = f"{SWEEP[:start]}{arms}\n{SWEEP[end:]}"
  (folder / "sweep.py").write_text(text)
  for flags in ([], ["--dry_run"]):
    with pytest.raises(ConfigError, match=f"arm none: .*/gone.*there.{hint}$"):
      launch.main(["balance", f"--workdir={work}", *flags])
  with pytest.raises(ConfigError, match="/gone is not there$"):
    launch.main(["balance", f"--workdir={work}", "--arm=none"])
  assert not programs


def test_a_mesh_is_told(small, capsys):
  _, work = small
  flags = ["balance", f"--workdir={work}", "--dry_run", "--arm=none"]
  assert launch.main([*flags, "--config.mesh=(2,1,4,1)"]) == 0
  out = capsys.readouterr().out.splitlines()
  assert "  devices: 8 × cpu; mesh data 2, expert 4" in out


def test_an_unexpected_error_names_its_arm(small, programs, monkeypatch):
  """Before anything is trained; it stays a traceback."""
  _, work = small
  build = program.build

  def refuse(config, **options):
    if config.model.moe.balancers:
      raise ValueError("k must not be larger")
    return build(config, **options)

  monkeypatch.setattr(program, "build", refuse)
  for flags in ([], ["--dry_run"]):
    with pytest.raises(ValueError, match="larger") as caught:
      launch.main(["balance", f"--workdir={work}", *flags])
    note = "This happened in the arm bias. To run the others, give --arm=none"
    assert caught.value.__notes__ == [note]
  assert not programs


def test_a_dry_run_counts_and_writes_nothing(small, programs, capsys):
  _, work = small
  assert launch.main(["balance", f"--workdir={work}", "--dry_run"]) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[-1] == "All arms can run; nothing was trained (--dry_run)."
  found = [
    re.fullmatch(r"(\w+): ([\d,]+) parameters, .*", x) for x in out[-3:-1]
  ]
  assert [match[1] for match in found] == ["none", "bias"]
  assert not programs and not work.exists()
  # The counts are those of the runs, whose sizes have a row.
  run(capsys, work, "--arm=none", "--seeds=1")
  row = json.loads((of(work, "none", 0) / "row.json").read_text())
  total, active = row["total_parameters"], row["active_parameters"]
  words = f"none: {total:,} parameters, {active:,} active for a token; 6 steps"
  assert found[0][0].startswith(words)


def test_finished_runs_have_no_progress_line(small, programs, capsys):
  _, work = small
  flags = ["balance", f"--workdir={work}", "--arm=none", "--seeds=1"]
  assert launch.main(flags) == 0
  assert "steps" in capsys.readouterr().err
  assert launch.main(flags) == 0
  out, err = capsys.readouterr()
  assert "1 of 1 runs finished" in out and not err


def test_the_time_left_has_the_compilations_to_come(
  small, programs, monkeypatch
):
  """An hour each; none of them makes the steps seem slow."""
  _, work = small
  make, seen, late = program.Program, [], 0.0

  def slow(*arguments):
    nonlocal late
    late += 3600.0
    return make(*arguments)

  def update(progress, *arguments):
    counted(progress, *arguments)
    facts = progress.format_dict
    left = facts["total"] - facts["n"]
    seen.append((facts["elapsed"], left and left / facts["rate"]))

  counted = Progress.update
  monkeypatch.setattr(program, "Program", slow)
  monkeypatch.setattr(Progress, "update", update)
  of_tqdm, of_loop = tqdm.std.time, time.monotonic
  monkeypatch.setattr(tqdm.std, "time", lambda: of_tqdm() + late)
  monkeypatch.setattr(time, "monotonic", lambda: of_loop() + late)
  assert launch.main(["balance", f"--workdir={work}", "--seeds=1"]) == 0
  hours = [tuple(round(seconds / 3600, 1) for seconds in one) for one in seen]
  assert list(dict.fromkeys(hours)) == [(1, 1), (2, 0)], "spent and left"


def test_the_time_left_is_known_after_the_first_units(monkeypatch, capsys):
  now = 100.0
  monkeypatch.setattr(tqdm.std, "time", lambda: now)
  with Progress(10, "steps") as progress:
    now += 60.0
    progress.pause(60.0, to_come=1)
    now += 20.0
    progress.update(2)
    assert progress.format_dict["elapsed"] == 80
    assert 8 / progress.format_dict["rate"] == pytest.approx(8 * 10 + 60)
    progress.skip(3)  # They say nothing about the speed.
    assert 5 / progress.format_dict["rate"] == pytest.approx(5 * 10 + 60)
    now += 100.0
    progress.pause(100.0, to_come=0)
    assert 5 / progress.format_dict["rate"] == pytest.approx(5 * 10)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == "0/10 steps, 00:00 spent, ? left"
  assert lines[1] == "2/10 steps, 01:20 spent, 02:20 left"


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_output_that_nobody_reads(flags):
  """It ends in silence, with the exit code of other tools in a pipe."""
  read, write = os.pipe()
  os.close(read)
  words = [sys.executable, *flags, "-m", "moe_jax", "--help"]
  done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE)
  os.close(write)
  assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
  "words, called",
  [
    (["experiments.launch"], "python -m experiments.launch"),
    (["moe_jax", "experiment"], "moe-jax experiment"),
  ],
)
def test_help_has_the_words_that_called_it(words, called):
  done = subprocess.run(
    [sys.executable, "-m", *words, "--help"], capture_output=True, text=True
  )
  assert done.stdout.startswith(f"usage: {called} ")
  assert f"\n  {called} load_balancing --scale=demo\n" in done.stdout


def test_without_a_question():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.launch"], capture_output=True, text=True
  )
  assert done.returncode == 2
  assert "QUESTION" in done.stderr


def test_a_step_of_every_arm_is_timed(small, programs, capsys):
  flags = ["balance", "--child", "--rounds=2", "--steps=1"]
  assert train_step.main(flags) == 0
  found = json.loads(capsys.readouterr().out)
  assert list(found) == ["none", "bias"]
  assert all(len(seconds) == 2 for seconds in found.values())
