"""A router is one file: written to a folder, named in the config, used."""

import json
import os
import subprocess
import sys

import pytest

import experiments
from experiments import launch
from moe_jax import run_directory

ROUTER = '''
"""Scores by the cosine between a token and a direction per expert."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.types import Router, Routing


def build(top_k: int, temperature: float = 0.1) -> Router:
  def init(rng, d_model, num_experts):
    return {"directions": jax.random.normal(rng, (d_model, num_experts))}

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, rng
    x_TD = x_TD.astype(jnp.promote_types(x_TD.dtype, jnp.float32))
    w_DE = params["directions"].astype(x_TD.dtype)
    norm_T1 = jnp.sqrt((x_TD**2).sum(1, keepdims=True) + 1e-6)
    norm_1E = jnp.sqrt((w_DE**2).sum(0, keepdims=True) + 1e-6)
    logits_TE = x_TD @ w_DE / norm_T1 / norm_1E / temperature
    prob_TE = jax.nn.softmax(logits_TE)
    _, expert_TK = jax.lax.top_k(
      jax.lax.stop_gradient(select(prob_TE)), top_k
    )
    expert_TK = checkpoint_name(expert_TK, "expert")
    return Routing(
      expert_TK=expert_TK,
      weight_TK=jnp.take_along_axis(prob_TE, expert_TK, axis=-1),
      valid_TK=jnp.broadcast_to(side.mask_T[:, None], expert_TK.shape),
      prob_TE=prob_TE,
      logits_TE=logits_TE,
    )

  return Router(
    init, {"directions": ("embed", None)}, route, causal=True, top_k=top_k
  )
'''
SWEEP = """
from configs import tiny
from experiments import sweeps

def demo():
  c = tiny.get_config()
  c.mesh = (1, 2, 4, 1)
  c.plugins = ({folder!r},)
  c.data.seq_len = 32
  c.model.num_layers = 1
  c.train.num_steps = 8
  c.train.log_every = 4
  c.eval.batches_per_domain = 1
  arms = sweeps.over("model.moe.router", {{
    "top_k": {{"name": "top_k"}},
    "cosine": {{"name": "cosine", "temperature": 0.2}},
  }})
  return sweeps.Sweep(c, arms, seeds=2)

SCALES = {{"demo": demo}}
"""
PLOT = """
from experiments.report import Column, Plan

PLAN = Plan(columns=(Column("bits_per_byte"), Column("max_vio_global")))
"""


@pytest.fixture
def folder(tmp_path):
  """A plugin folder with one router in one file."""
  (tmp_path / "plugins" / "routers").mkdir(parents=True)
  (tmp_path / "plugins" / "routers" / "cosine.py").write_text(ROUTER)
  return tmp_path / "plugins"


def test_it_trains_on_a_mesh_and_appears_in_a_report(
  folder, tmp_path, monkeypatch, capsys
):
  question = tmp_path / "questions" / "which_router"
  question.mkdir(parents=True)
  (question / "__init__.py").write_text('"""Which router?"""\n')
  (question / "sweep.py").write_text(SWEEP.format(folder=str(folder)))
  (question / "plot.py").write_text(PLOT)
  paths = [*experiments.__path__, str(question.parent)]
  monkeypatch.setattr(experiments, "__path__", paths)
  work = tmp_path / "work"
  try:
    assert launch.main(["which_router", f"--workdir={work}"]) == 0
  finally:
    for name in [m for m in sys.modules if "which_router" in m]:
      del sys.modules[name]
  table = (work / "report" / "table.md").read_text()
  assert "| cosine" in table and "| top_k" in table
  run = json.loads((work / "cosine" / "0" / "run.json").read_text())
  assert run["mesh"] == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
  assert run["recipe"]["router"] == {"name": "cosine", "temperature": 0.2}
  first, last = run_directory.read_metrics(work / "cosine" / "0", "train")
  assert last["loss"] < first["loss"]
  assert last["router_entropy"] > 0 and last["max_vio"] > 0


def test_it_keeps_the_contracts(folder):
  """And the contract tests would say so if it did not."""
  assert _contracts(folder).returncode == 0
  path = folder / "routers" / "cosine.py"
  faulty = ROUTER.replace("side.mask_T[:, None]", "jnp.array([[True]])")
  assert faulty != ROUTER
  path.write_text(faulty)
  done = _contracts(folder)
  assert done.returncode == 1 and "padding" in done.stdout, done.stdout


def _contracts(folder):
  command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cosine"]
  return subprocess.run(
    [*command, "-p", "no:cacheprovider", "tests/contracts_test.py"],
    capture_output=True,
    text=True,
    env={**os.environ, "MOE_JAX_PLUGINS": str(folder)},
  )
