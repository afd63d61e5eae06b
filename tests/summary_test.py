"""The five lines that a run begins with, and the table that it ends with."""

import math
import re

import jax
import pytest

from configs import tiny
from moe_jax import main as train_command
from moe_jax.run import run_directory, summary, wording
from moe_jax.training import loop


@pytest.fixture
def config(tmp_path):
  config = tiny.get_config()
  config.train.num_steps = 3
  config.optim.warmup_steps = 1
  config.train.log_every = 1
  config.eval.batches_per_domain = 1
  return config


def test_what_a_run_says(config, tmp_path, capsys):
  config.model.moe.balancers = {"loss": {"name": "switch", "coefficient": 0.01}}
  values = loop.train_and_evaluate(config, tmp_path / "run")
  said = capsys.readouterr().err
  lines = [
    line for line in said.splitlines() if line[:8].strip() in summary.LINES
  ]
  assert [line.split()[0] for line in lines] == list(summary.LINES)
  model, data, devices, recipe, writes = lines
  assert "decoder, parameters: 39,360, of which 27,072 active" in model
  about = r"python_sources: [\d,]+ documents to train on, [\d,]+ held out, of"
  assert re.search(f"{about} code, docstrings, 8 rows in a step", data), data
  assert (
    f"{len(jax.devices())} × cpu; mesh data {len(jax.devices())}" in devices
  )
  assert (
    "top_k 2 of 4 experts, capacity factor 2.0, balanced by switch" in recipe
  )
  assert "adamw at 0.003, cosine, 3 steps" in recipe
  assert str(tmp_path / "run") in writes
  assert re.search(
    r"compiled in \d+ s, and the mesh computes what one device does\n", said
  )
  table = summary.end(values, tmp_path / "run", config)
  assert table.startswith(
    "On the validation split, 1 batches of 8 rows for each domain, after 3 steps:"
  )
  assert "nats per token, without the losses" in table
  shown = {row.split()[0]: row for row in table.splitlines() if row[:2] == "  "}
  assert f"{values['bits_per_byte']:.4f}" in shown["bits_per_byte"]
  assert "lower is better" in shown["bits_per_byte"]
  assert shown.keys() <= values.keys() and len(shown) < 10
  # One step of warm-up to the peak, and down to a tenth of it.
  lines = run_directory.read_metrics(tmp_path / "run", "train")
  rates = [line["learning_rate"] for line in lines]
  assert rates == pytest.approx([3e-3, 3e-3, 3e-4])
  # The same command again trains nothing, and says nothing of the kind.
  assert loop.train_and_evaluate(config, tmp_path / "run") == values
  assert "parameters" not in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  flags = ["--config=tiny", "--dry_run", "--config.train.num_steps=7"]
  assert train_command.main(flags) == 0
  said = capsys.readouterr().out
  assert "of which 27,072 active" in said and "7 steps" in said
  assert "nothing (--dry_run)" in said
  own = dict(
    x.split(" = ") for x in said.split("base.py:")[1].split("\n  ")[1:]
  )
  assert own["model.d_model"] == "32" and own["train.num_steps"].strip() == "7"
  assert "model.norm" not in own and len(own) < 25
  assert [*tmp_path.iterdir()] == []


def test_a_model_without_experts_and_several_recipes(config):
  facts = {
    "parameters": {"total": 1234, "active": 2.5e12},
    "tokens_per_step": 10**7,
    "data": "0123456789abcdef",
    "devices": ["TPU v5p"] * 8,
    "mesh": {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1},
    "recipe": {},
  }
  text = summary.begin(config, facts, None)
  assert "parameters: 1,234, of which 2.5 trillion active" in text
  assert "8 × TPU v5p; mesh fsdp 2, expert 4\n" in text
  assert "no experts" in text and "(10 million tokens)" in text
  recipe = {
    "num_experts": 8,
    "router": {"name": "soft"},
    "balancers": {},
    "capacity_factor": None,
  }
  facts["recipe"] = {str(i): recipe for i in range(5)}
  text = summary.begin(config, facts, None)
  assert text.count("soft 8 experts, no token is dropped, no balancer") == 3
  assert "2 more recipes" in text


def test_counts_of_any_size():
  counts = (0, 999_999, 1_000_000, 671e9, 12_345 * 10**9)
  assert [wording.count(x) for x in counts] == [
    "0",
    "999,999",
    "1 million",
    "671 billion",
    "12.35 trillion",
  ]
  for no_count in (None, True, "7", -1, math.nan, 10**400):
    assert wording.count(no_count) == ""


def test_facts_of_another_version_or_a_damaged_file():
  for facts in ({}, {"devices": 3, "mesh": [1], "recipe": "top_k"}):
    assert wording.parameters(facts) == ""
    assert wording.devices(facts) == wording.experts(facts) == ""
  facts = {"devices": [1, "a", 1], "mesh": {"data": "2"}, "recipe": {"0": 5}}
  assert wording.devices(facts) == "2 × 1, 1 × a; 1 used"
  assert wording.experts(facts) == (
    "None None experts, no token is dropped, no balancer"
  )
