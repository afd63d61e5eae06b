"""Notebooks run from top to bottom, and keep the pictures of their last run."""

import base64
import io
import os
import pathlib
import subprocess
import sys

import jupytext
import matplotlib
import nbformat
import numpy as np
import PIL.Image
import pytest
from matplotlib import pyplot as plt

from notebooks import draw, execute

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
NAMES = [
  "01_routing_by_hand",
  "02_collapse_and_balancing",
  "03_train_a_moe",
  "04_expert_parallelism",
  "05_what_experts_learn",
  "06_plan_a_pod",
  "07_reproduce_a_table",
  "08_write_a_router",
]
COMPILES_FOR_TPU = "06_plan_a_pod"
MOST_BYTES = 400_000


def test_there_are_notebooks():
  assert [p.stem for p in SCRIPTS] == NAMES


def runs():
  """(script, MOE_JAX_FAST), of which the quick tier has the first."""
  for number, script in enumerate(SCRIPTS):
    for fast in ("1", ""):
      marks = [] if (number, fast) == (0, "1") else [pytest.mark.long]
      if script.stem == COMPILES_FOR_TPU:
        marks.append(pytest.mark.aot)
      name = f"{script.stem}-{'fast' if fast else 'whole'}"
      yield pytest.param(script, fast, marks=marks, id=name)


@pytest.mark.parametrize("script,fast", list(runs()))
def test_it_runs(script, fast, tmp_path):
  """Runs a notebook as a script, from another folder, on one device."""
  env = os.environ | {"MOE_JAX_FAST": fast, "MPLBACKEND": "Agg"}
  env.pop("XLA_FLAGS", None)  # The devices of the tests.
  done = subprocess.run(
    [sys.executable, script],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout


def read(script):
  """The cells of a script, and the notebook that is kept of it."""
  kept = nbformat.read(script.with_suffix(".ipynb"), nbformat.NO_CONVERT)
  return jupytext.read(script).cells, kept


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_notebook_is_the_script_with_its_outputs(script):
  cells, kept = read(script)
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_notebook_is_small_and_of_no_machine(script):
  _, kept = read(script)
  assert script.with_suffix(".ipynb").stat().st_size < MOST_BYTES
  text = "".join(
    o.text
    for c in kept.cells
    for o in c.get("outputs", ())
    if o.output_type == "stream"
  )
  for path in ("/tmp", "/home", "/root", str(FOLDER.parent)):
    assert path not in text, f"an output names {path}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_it_begins_with_what_it_is_and_how_it_is_installed(script):
  first, *_ = jupytext.read(script).cells
  assert first.cell_type == "markdown" and first.source.startswith("# ")
  for line in ("On Colab, run this in a cell of its own first", "%pip install"):
    assert line in first.source


# What notebooks share.


def test_white_is_zero_in_the_picture_of_a_matrix():
  figure, axes = plt.subplots()
  value = [[0.0, -2.0, np.nan], [1.0, 0.5, -0.001]]
  draw.matrix(value, ["a", "b"], ["c", "d", "e"], "title", axes=axes)
  (image,) = axes.images
  middle = matplotlib.colormaps["RdBu_r"](0.5)
  np.testing.assert_allclose(image.to_rgba(0.0), middle, atol=0.01)
  red, _, blue, _ = image.to_rgba(1.0)
  assert red > blue
  assert [t.get_text() for t in axes.texts] == [
    *("0.00", "-2.00", "1.00", "0.50", "0.00"),
  ]
  plt.close(figure)


def test_white_may_be_another_number():
  figure, axes = plt.subplots()
  draw.matrix([[25.0, 100.0]], ["a"], ["b", "c"], "", white=25, axes=axes)
  assert axes.images[0].norm(25.0) == 0.5
  plt.close(figure)


def test_the_picture_of_loads_has_shares_over_steps(monkeypatch):
  monkeypatch.setattr(plt, "show", lambda: None)
  draw.loads([10, 20, 30], {"layer": [[1, 3], [2, 2], [4, 0]]})
  figure = plt.gcf()
  (image,) = figure.axes[0].images
  np.testing.assert_array_equal(image.get_array(), [[0.5, 1, 2], [1.5, 1, 0]])
  assert image.get_extent() == [5, 35, -0.5, 1.5]
  plt.close(figure)


def test_the_picture_of_a_text_has_a_colour_for_each_expert(monkeypatch):
  monkeypatch.setattr(plt, "show", lambda: None)
  draw.text([*"a$\n", "\0"], [0, 3, 1, 2], 4, "title", width=3)
  figure = plt.gcf()
  axes = figure.axes[0]
  page = axes.images[0].get_array()
  np.testing.assert_array_equal(page[0], [0, 3, 1])
  np.testing.assert_array_equal(np.ma.getmaskarray(page)[1], [0, 1, 1])
  assert [t.get_text() for t in axes.texts] == ["a", "$", "↵", "·"]
  plt.close(figure)


def test_a_picture_gets_smaller_and_stays_alike():
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 8, (40, 60, 1)) * np.array([30, 20, 10])
  file = io.BytesIO()
  PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
  small = base64.b64decode(
    execute.smaller(base64.b64encode(file.getvalue()).decode())
  )
  assert len(small) < len(file.getvalue())
  after = np.array(PIL.Image.open(io.BytesIO(small)).convert("RGB"))
  np.testing.assert_allclose(after, pixels, atol=2)
