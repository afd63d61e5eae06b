"""Notebooks run from top to bottom, and keep the pictures of their last run."""

import os
import pathlib
import subprocess
import sys

import jupytext
import nbformat
import pytest

from tests import tiers

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def test_there_are_notebooks():
  assert [p.stem for p in SCRIPTS] == [
    "01_routing_by_hand",
    "02_collapse_and_balancing",
  ]


RUNS = [(script, fast) for script in SCRIPTS for fast in ("1", "")]


@pytest.mark.parametrize(
  "script,fast", tiers.only(RUNS[:1], RUNS, several=True)
)
def test_it_runs(script, fast, tmp_path):
  """Runs a notebook as a script, from another folder."""
  env = os.environ | {"MOE_JAX_FAST": fast, "MPLBACKEND": "Agg"}
  done = subprocess.run(
    [sys.executable, script],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_notebook_is_the_script_with_its_outputs(script):
  cells = jupytext.read(script).cells
  kept = nbformat.read(script.with_suffix(".ipynb"), nbformat.NO_CONVERT)
  assert [(c.cell_type, c.source) for c in kept.cells] == [
    (c.cell_type, c.source) for c in cells
  ]
  code = [c for c in kept.cells if c.cell_type == "code"]
  assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
  outputs = [o for c in code for o in c.outputs]
  kinds = {o.output_type for o in outputs}
  assert kinds <= {"stream", "display_data", "execute_result"}
  streams = {o.name for o in outputs if o.output_type == "stream"}
  assert streams == {"stdout"}, "a warning was left in it"
  assert any("image/png" in o.get("data", {}) for o in outputs)
