"""A router is one file: written to a folder, named in the config, used."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import experiments
from experiments import launch
from moe_jax.run import run_directory

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
SWEEP = """
from configs import tiny
from experiments import sweeps

def demo():
  c = tiny.get_config()
  c.mesh = (1, 2, 4, 1)
  c.plugins = ({folder!r},)
  c.data.seq_len = 32
  c.model.num_layers = 1
  c.optim.optimizer = {{"name": "lion", "b2": 0.95}}
  c.optim.learning_rate = 1e-3
  c.train.num_steps = 8
  c.train.log_every = 4
  c.train.hooks = {{"loads": {{"name": "load_arrays", "every": 4}}}}
  c.eval.batches_per_domain = 1
  arms = sweeps.over("model.moe.router", {{
    "cosine": {{"name": "cosine", "temperature": 0.2}},
  }})
  return sweeps.Sweep(c, arms, seeds=1)

SCALES = {{"demo": demo}}
"""
PLOT = """
from experiments.report import Column, Report

REPORT = Report(columns=(Column("bits_per_byte"), Column("max_vio_global")))
"""


@pytest.fixture
def folder(tmp_path):
  """A plugin folder with the parts that docs/extending.md shows."""
  parts = re.findall(
    r"<!-- file: (\S+) -->\n```python\n(.*?)```",
    DOCUMENT.read_text(),
    re.DOTALL,
  )
  for name, text in parts:
    path = tmp_path / "plugins" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  assert len(parts) == 5
  return tmp_path / "plugins"


def test_it_trains_on_a_mesh_and_appears_in_a_report(
  folder, tmp_path, monkeypatch, capsys
):
  question = tmp_path / "questions" / "which_router"
  question.mkdir(parents=True)
  (question / "__init__.py").write_text('"""Which router?"""\n')
  (question / "sweep.py").write_text(SWEEP.format(folder=str(folder)))
  (question / "plot.py").write_text(PLOT)
  monkeypatch.setattr(experiments, "__path__", list(experiments.__path__))
  work, flag = tmp_path / "work", f"--questions={question.parent}"
  try:
    assert launch.main(["which_router", flag, f"--workdir={work}"]) == 0
  finally:
    for name in [m for m in sys.modules if "which_router" in m]:
      del sys.modules[name]
  table = (work / "report" / "table.md").read_text()
  assert "| cosine" in table
  (folder,) = work.glob("cosine/*/0")
  run = json.loads((folder / "run.json").read_text())
  assert run["mesh"] == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
  (recipe,) = run["recipe"].values()
  assert recipe["router"] == {"name": "cosine", "top_k": 2, "temperature": 0.2}
  kept = sorted((folder / "load_arrays").iterdir())
  assert [path.name for path in kept] == ["00000004.npz", "00000008.npz"]
  (loads_E,) = np.load(kept[0]).values()
  assert loads_E.sum() > 0 and loads_E.dtype == np.int64
  first, last = run_directory.read_metrics(folder, "train")
  assert last["loss"] < first["loss"]
  assert last["router_entropy"] > 0 and last["max_vio"] > 0


@pytest.mark.long  # `parts_test` has three such parts.
def test_they_keep_the_contracts(folder):
  done = _contracts(folder, "cosine or importance or heaviest_first or lion")
  assert done.returncode == 0, done.stdout


def test_the_contract_tests_see_a_faulty_part(folder):
  path = folder / "routers" / "cosine.py"
  right = path.read_text()
  faulty = right.replace("side.mask_T[:, None]", "jnp.array([[True]])")
  assert faulty != right
  path.write_text(faulty)
  done = _contracts(folder, "cosine and padding and not heaviest_first")
  assert done.returncode == 1 and "padding" in done.stdout, done.stdout


def _contracts(folder, which):
  command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", which]
  return subprocess.run(
    [*command, "-p", "no:cacheprovider"]
    + ["tests/contracts_test.py", "tests/optim_test.py"],
    capture_output=True,
    text=True,
    env={**os.environ, "MOE_JAX_PLUGINS": str(folder)},
  )
