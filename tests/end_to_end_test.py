"""Tests the way from a user's own question to its report.

A task without tokens and its model, both of plugins; and a decoder with another
recipe in every second layer. Their runs are cut off on the way.
"""

import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from sklearn import datasets as digits

import experiments
from experiments import launch, runs
from moe_jax import evaluate, generate, params
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError, Interrupted
from moe_jax.data.text import mixed
from moe_jax.run import run_directory
from moe_jax.training import checkpoint, loop, program
from tests import house, kill, small

IMAGES = """
from configs import tiny
from experiments import sweeps

def demo():
  c = tiny.get_config()
  c.plugins = ({plugins!r},)
  c.task.name = "digits"
  c.data.batch_size = 32
  c.model.update(name="patches", d_model=16, num_layers=2)
  c.model.pattern = ("moe@choice", "moe@quantile")
  c.model.moe.update(num_experts=8, d_expert=16)
  quantile = {{"name": "quantile", "bins": 64}}
  c.model.variants = {{
    "choice": {{"moe": {{"router": {{"name": "expert_choice"}}}}}},
    "quantile": {{"moe": {{"balancers": {{"q": quantile}}}}}},
  }}
  c.train.update(num_steps=40, log_every=3)
  c.checkpoint.every = 8
  c.eval.update(batch_size=60, every=20)
  rates = {{"slow": 1e-3, "fast": 3e-2}}
  return sweeps.Sweep(c, sweeps.over("optim.learning_rate", rates), seeds=1)

SCALES = {{"demo": demo}}
"""
RECIPES = """
from configs import tiny
from experiments import sweeps

def demo():
  c = tiny.get_config()
  c.data.update(name="small", seq_len=16, batch_size=16)
  c.model.update(d_model=16, head_dim=8, num_layers=4)
  c.model.pattern = ("moe", "moe@many")
  c.model.moe.update(num_experts=4, top_k=1, d_expert=16)
  c.model.moe.router = {"name": "top_k", "score": "softmax"}
  c.model.moe.balancers = {"load": {"name": "switch", "coefficient": 0.01}}
  c.model.variants = {"many": {"moe": {
    "num_experts": 16,
    "top_k": 2,
    "d_expert": 8,
    "router": {"name": "top_k", "score": "sigmoid", "renormalize": True},
    "balancers": {"bias": {"name": "bias", "rate": 0.01}},
  }}}
  c.train.update(num_steps=12, log_every=3)
  c.checkpoint.every = 4
  return sweeps.Sweep(c, {"both": {}}, seeds=1)

SCALES = {"demo": demo}
"""
REPORT = """
from experiments.report import Column, Report

REPORT = Report(columns=({}))
"""


@pytest.fixture
def ask(tmp_path, monkeypatch):
  """(name, sweep, columns) -> a launch of the question, (workdir) -> folder.

  Equal programs compile once, and use one of the devices.
  """
  monkeypatch.setattr(experiments, "__path__", list(experiments.__path__))
  monkeypatch.setattr(parallel, "mesh_or_none", lambda *_: None)
  compiled, make, named = {}, program.Program, []
  monkeypatch.setattr(
    program,
    "Program",
    lambda config, data=None, _=None: make(config, data, compiled),
  )

  def question(name, sweep, columns):
    folder = tmp_path / "questions" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(f'"""What is {name}?"""\n')
    (folder / "sweep.py").write_text(sweep)
    columns = "".join(f"Column({c!r}), " for c in columns)
    (folder / "plot.py").write_text(REPORT.format(columns))
    named.append(name)

    def command(work):
      flag = f"--questions={folder.parent}"
      return [name, flag, f"--workdir={tmp_path / work}"]

    return command

  yield question
  for module in [m for m in sys.modules if m.split(".")[-1] in named]:
    del sys.modules[module]
  for module in [m for m in sys.modules if m.startswith("experiments.")]:
    if any(f".{name}." in f"{module}." for name in named):
      del sys.modules[module]


def of(work, arm):
  """The folder of the only run of an arm."""
  (folder,) = work.glob(f"{arm}/*/0")
  return folder


def test_images_through_the_same_loop(ask, tmp_path, monkeypatch, capsys):
  """Trained, killed, gone on with bit for bit, evaluated and reported."""
  sweep = IMAGES.format(plugins=str(house.ROOT / "tests" / "plugins"))
  command = ask("images", sweep, ["error", "max_vio_global"])
  work, alone = tmp_path / "work", tmp_path / "alone"
  add, killed_at = loop.Lines.add, 21

  def add_and_copy(lines, step, sums):
    """Keeps what a process leaves that is killed at this moment."""
    add(lines, step, sums)
    path = lines._directory.path
    if step == killed_at and "slow" in path.parts:
      written, since = path / "checkpoints" / "16", time.monotonic()
      while not written.exists():  # It is written meanwhile.
        assert time.monotonic() < since + 60
        time.sleep(0.01)
      shutil.copytree(alone, work)

  monkeypatch.setattr(loop.Lines, "add", add_and_copy)
  assert launch.main(command("alone")) == 0
  monkeypatch.setattr(loop.Lines, "add", add)
  killed = of(work, "slow")
  lines = run_directory.read_metrics(killed, "train")
  assert lines and lines[-1]["step"] < killed_at
  assert not list(work.rglob("row.json"))
  capsys.readouterr()
  assert launch.main(command("work")) == 0
  said = capsys.readouterr().out
  facts = json.loads((killed / "run.json").read_text())
  assert [x["step"] for x in facts["continued"]] == [16]
  for arm in ("slow", "fast"):
    assert kill.difference(of(alone, arm), of(work, arm)) is None

  train = run_directory.read_metrics(of(work, "fast"), "train")
  assert train[0]["error"] > 0.6 and train[-1]["error"] < 0.4
  found = run_directory.read_metrics(of(work, "fast"), "validation")
  assert [line["step"] for line in found] == [20, 40]
  last = found[-1]
  assert last["error"] < found[0]["error"] and "bits_per_byte" not in last
  # Each of 360 images counts once, so the two errors have these shares.
  even, odd = (last[f"error/{domain}"] for domain in ("even", "odd"))
  images = digits.load_digits().target[-360:]
  share = (images % 2 == 0).mean()
  assert last["error"] == pytest.approx(share * even + (1 - share) * odd)
  assert last["max_vio/00"] == 0 < last["max_vio/01"], "experts that choose"

  for arm in ("slow", "fast"):
    assert f"| {arm} " in said
  assert "| error " in said
  rows = {r["arm"]: r for r in runs.read_csv(work / "report" / "results.csv")}
  assert rows["fast"]["error"] == last["error"] < rows["slow"]["error"]
  tokens = 40 * 32 * 16
  flops = rows["slow"]["train_flops"]
  assert flops == tokens * facts["train_flops_per_token"]

  check_commands(of(work, "fast"), capsys)


def check_commands(run, capsys):
  """Commands for text say that it has none; those for any run take it."""
  trust = ["--trust_plugins"]
  with pytest.raises(ConfigError, match="task digits, which has no text"):
    generate.main([f"--checkpoint={run}", *trust, "--prompt=x"])
  with pytest.raises(ConfigError, match="task digits has no classes for --few"):
    evaluate.main([f"--checkpoint={run}", *trust, "--few_shot=1"])
  assert evaluate.main([f"--checkpoint={run}", *trust]) == 0
  assert "360 examples, 60 at a time" in capsys.readouterr().out
  assert params.main([f"--config={run}/config.json", *trust]) == 0
  counted = capsys.readouterr().out
  assert "weights_bytes" in counted and "kv_cache" not in counted


@pytest.mark.long
def test_two_recipes_in_one_decoder(ask, tmp_path, monkeypatch, capsys):
  """Metrics by layer, counts, checkpoints and the report know which is which."""
  monkeypatch.setattr(mixed, "prepare", lambda *a, **k: small.SmallCorpus())
  layers = [f"max_vio/{number:02d}" for number in range(4)]
  command = ask("recipes", RECIPES, ["bits_per_byte", *layers])
  work, alone = tmp_path / "work", tmp_path / "alone"
  add = loop.Lines.add

  def add_and_stop(lines, step, sums):
    add(lines, step, sums)
    if step == 6:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Lines, "add", add_and_stop)
    with pytest.raises(Interrupted, match="1 of 1 runs are left"):
      launch.main(command("work"))
  assert launch.main(command("work")) == 0
  table = capsys.readouterr().out
  assert launch.main(command("alone")) == 0
  run = of(work, "both")
  assert kill.difference(of(alone, "both"), run) is None

  (row,) = runs.read_csv(work / "report" / "results.csv")
  (header,) = (x for x in table.splitlines() if x.startswith("| arm"))
  for name in layers:
    assert name in header and row[name] >= 0
  for line in run_directory.read_metrics(run, "train"):
    assert set(layers) <= set(line)
    assert line["max_vio"] == pytest.approx(np.mean([line[x] for x in layers]))
    assert line["experts_per_token"] == pytest.approx((1 + 2) / 2)
    assert line["aux_loss"] > 0

  facts = json.loads((run / "run.json").read_text())
  few, many = facts["recipe"]["0, 2"], facts["recipe"]["1, 3"]
  assert (few["num_experts"], few["router"]["top_k"]) == (4, 1)
  assert (many["num_experts"], many["router"]["top_k"]) == (16, 2)
  assert few["router"]["score"] == "softmax" and "load" in few["balancers"]
  assert many["router"]["score"] == "sigmoid" and "bias" in many["balancers"]
  sizes = facts["parameters"]
  one, other = 3 * 16 * 16, 3 * 16 * 8
  assert sizes["experts"] == 2 * (4 * one + 16 * other)
  assert sizes["total"] - sizes["active"] == 2 * (3 * one + 14 * other)
  assert sizes["router"] == 2 * 16 * (4 + 16) and sizes["selection_bias"] == 32

  variables = checkpoint.load_variables(run)
  (bias_RE,) = variables["balance"]["decoder"]["1"]["moe"]["bias"].values()
  assert bias_RE.shape == (2, 16) and set(variables["balance"]) == {"decoder"}
  assert set(variables["balance"]["decoder"]) == {"1"}
  ranges = np.ptp(bias_RE, axis=1)
  assert ranges.min() > 0
  last = run_directory.read_metrics(run, "train")[-1]
  assert last["bias_range"] > 0
