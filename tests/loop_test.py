"""The loop: stopped, killed or left alone, a run is the same run."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util

from moe_jax.core.errors import ConfigError, Interrupted, RunError
from moe_jax.data.text import mixed
from moe_jax.run import run_directory, signals
from moe_jax.training import checkpoint, loop, program
from tests import kill
from tests.small import SmallCorpus, config

STEPS = 56


def program_of(sizes=None):
  """The Program of a small model, on one device without a mesh or on a mesh."""
  c = config()
  c.mesh = sizes or (1, 1, 1, 1)
  c.model.moe.num_experts = 8
  c.optim.learning_rate = 1e-2
  c.train.update(num_steps=STEPS, log_every=1, ema=0.75)
  c.checkpoint.every = 10
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mixed, "prepare", lambda *a, **k: SmallCorpus())
    if sizes is None:
      patch.setattr(program.parallel, "mesh_or_none", lambda *_: None)
    return program.Program(c)


@pytest.fixture(scope="module")
def make():
  """(mesh) -> Program; equal ones are compiled once."""
  return functools.cache(program_of)


@pytest.fixture(scope="module")
def undisturbed(make, tmp_path_factory):
  """(mesh) -> the folder of a run that nobody disturbed."""

  @functools.cache
  def run(sizes=None):
    folder = tmp_path_factory.mktemp("alone")
    go(make(sizes), folder)
    return folder

  return run


@pytest.fixture
def alone(undisturbed):
  """The folder of a run on one device that nobody disturbed."""
  return undisturbed()


class Told:
  """A progress line that sends a signal after a step, as a user would."""

  def __init__(self, stop_at=None, number=signal.SIGTERM):
    self.done, self.stop_at, self.number = 0, stop_at, number

  def skip(self, n):
    self.done += n

  def update(self, n, note=""):
    del note
    self.done += n
    if self.stop_at is not None and self.done >= self.stop_at:
      self.stop_at = None
      os.kill(os.getpid(), self.number)


def go(made, path, stop_at=None, number=signal.SIGTERM):
  with run_directory.RunDirectory(path, made.config) as directory:
    return loop.run(made, 3, directory, Told(stop_at, number))


def losses(path):
  return [x["loss"] for x in run_directory.read_metrics(path, "train")]


def test_it_goes_on_with_other_meshes(make, undisturbed, tmp_path):
  """Eight devices, then one, and back."""
  first = make((2, 1, 4, 1))
  for made, stop_at in ((first, 6), (make(), 40)):
    with pytest.raises(Interrupted, match="the same command goes on"):
      go(made, tmp_path / "moved", stop_at)
    # The signal came while the next step was computed already.
    step = max(int(p.name) for p in checkpoints(tmp_path / "moved"))
    assert stop_at <= step <= stop_at + 2
  go(first, tmp_path / "moved")
  alone = losses(undisturbed((2, 1, 4, 1)))
  moved = losses(tmp_path / "moved")
  assert len(alone) == len(moved) == STEPS
  np.testing.assert_allclose(moved, alone, atol=1e-4)
  facts = json.loads((tmp_path / "moved" / "run.json").read_text())
  assert facts["mesh"]["data"] == 2
  meshes = [x.get("mesh") for x in facts["continued"]]
  ones = dict(data=1, fsdp=1, expert=1, tensor=1)
  assert meshes == [ones, None]  # None: as at the start.


ALONE = """
import sys
import jax
import numpy as np
from flax import traverse_util
from moe_jax.training import checkpoint
variables = checkpoint.load_variables(sys.argv[1])
np.savez(sys.argv[2], **traverse_util.flatten_dict(variables, sep="/"))
assert jax.device_count() == 1
"""


def test_what_eight_devices_wrote_is_opened_by_one(make, undisturbed, tmp_path):
  """Variables to the bit, and what the model makes of them."""
  eight, alone = make((2, 1, 4, 1)), make()
  run = undisturbed((2, 1, 4, 1))
  subprocess.run(
    [sys.executable, "-c", ALONE, run, tmp_path / "found.npz"],
    env=os.environ | {"XLA_FLAGS": ""},
    check=True,
  )
  with np.load(tmp_path / "found.npz") as file:
    flat = dict(file)
  opened = checkpoint.Checkpoints(run / "checkpoints")
  with contextlib.closing(opened):
    state = opened.restore(eight.abstract_state).state
  variables = {"params": state.params, "balance": state.balance}
  wanted = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
  assert flat.keys() == wanted.keys()
  for name in wanted:
    np.testing.assert_array_equal(flat[name], wanted[name], err_msg=name)
  average = checkpoint.load_variables(run, ema=True)
  jax.tree.map(np.testing.assert_array_equal, average["params"], state.ema)
  found = traverse_util.unflatten_dict(flat, sep="/")
  measured = alone.evaluate(alone.init(jax.random.key(0)).replace(**found))
  [line] = run_directory.read_metrics(run, "validation")
  for name in ("loss", "max_vio", "dropped"):
    np.testing.assert_allclose(measured[name], line[name], atol=1e-5)
  found["params"] = average["params"]
  measured = alone.evaluate(alone.init(jax.random.key(0)).replace(**found))
  for name in ("loss", "bits_per_byte", "max_vio"):
    np.testing.assert_allclose(measured[name], line[f"ema/{name}"], atol=1e-5)
  assert abs(line["ema/loss"] - line["loss"]) > 1e-4


def checkpoints(path):
  return list((path / "checkpoints").iterdir())


def test_stopped_anywhere_it_is_the_same_run(make, tmp_path, monkeypatch):
  """Bit for bit; also at odd moments of lines and evaluations."""
  made = make()
  monkeypatch.setitem(made.config.train, "log_every", 4)
  go(made, tmp_path / "alone")
  for stop_at in (1, 9, 10, 31):
    with pytest.raises(Interrupted):
      go(made, tmp_path / "stopped", stop_at)
  go(made, tmp_path / "stopped")
  assert not kill.difference(tmp_path / "alone", tmp_path / "stopped")


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(make, tmp_path):
  """Its lines would be cut; only a run killed early begins again."""
  made = make()
  with pytest.raises(Interrupted):
    go(made, tmp_path, 31)
  lines = (tmp_path / "metrics.jsonl").read_text()
  shutil.rmtree(tmp_path / "checkpoints")
  with pytest.raises(ConfigError, match="metrics up to step 3. and no checkp"):
    go(made, tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == lines
  known = losses(tmp_path)
  # Had it been begun with fewer of them, there might have been none yet.
  begun = tmp_path / "config.json"
  text = begun.read_text()
  begun.write_text(text.replace('"every": 10,', '"every": 20,'))
  assert begun.read_text() != text
  with pytest.raises(Interrupted):
    go(made, tmp_path, 1)
  begun.write_text(text)
  shutil.rmtree(tmp_path / "checkpoints")
  early = lines.splitlines(keepends=True)[:19]
  (tmp_path / "metrics.jsonl").write_text("".join(early))
  with pytest.raises(Interrupted):
    go(made, tmp_path, 1)
  again = losses(tmp_path)
  assert again == known[: len(again)]


def test_a_signal_in_the_last_step_is_not_lost(make, tmp_path):
  """It interrupts the run, so that a launch does not begin its next one."""
  made = make()
  with pytest.raises(Interrupted, match=f"after step {STEPS} and saved"):
    go(made, tmp_path, STEPS)
  assert max(int(p.name) for p in checkpoints(tmp_path)) == STEPS
  assert not run_directory.read_metrics(tmp_path, "validation")
  found = go(made, tmp_path)
  (end,) = run_directory.read_metrics(tmp_path, "validation")
  assert end == {"step": STEPS, "split": "validation"} | found


def test_a_signal_in_an_evaluation_ends_it(make, alone, tmp_path, monkeypatch):
  """It may be long; the state is saved, and it is made when the run goes on."""
  made = make()
  seen = []

  def validation(rows=None):
    for pair in task.validation(rows):
      seen.append(pair)
      if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
      yield pair

  task = made.task
  stopping = dataclasses.replace(task, validation=validation)
  monkeypatch.setattr(made, "task", stopping)
  with pytest.raises(Interrupted, match=f"after step {STEPS} and saved"):
    go(made, tmp_path / "stopped")
  assert len(seen) == 2
  monkeypatch.undo()
  go(made, tmp_path / "stopped")
  assert not kill.difference(alone, tmp_path / "stopped")


@pytest.mark.parametrize("damage", ["a line", "all of it"])
def test_lost_metrics_are_noticed(make, tmp_path, damage):
  made, path = make(), tmp_path / "metrics.jsonl"
  with pytest.raises(Interrupted):
    go(made, tmp_path, 12)
  text = path.read_text()
  rest = "" if damage == "all of it" else text.replace("step", "stop", 1)
  path.write_text(rest)
  with pytest.raises(
    ConfigError, match=r"\d+ whole lines up to step 1., where 1"
  ):
    go(made, tmp_path)
  assert path.read_text() == rest
  path.write_text(text)
  go(made, tmp_path)


def test_a_profile_that_is_cut_off_does_not_stop_the_run(make, tmp_path):
  """Going on inside its window, no trace is under way that could be ended."""
  made = make()
  with made.config.unlocked():
    made.config.train.profile_steps = (5, 40)
  try:
    with pytest.raises(Interrupted):
      go(made, tmp_path, 8)
    go(made, tmp_path)
  finally:
    made.config.train.profile_steps = ()
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


KILLED = """
import pathlib, signal, sys
from tests import loop_test
folder = pathlib.Path(sys.argv[1])
loop_test.go(loop_test.program_of(), folder, 31, signal.SIGKILL)
"""


def test_killed_it_is_the_same_run(make, alone, tmp_path):
  """A process of its own gets SIGKILL; `python -m tests.kill` does more."""
  killed = tmp_path / "killed"
  command = [sys.executable, "-c", KILLED, killed]
  assert subprocess.run(command, cwd=kill.ROOT).returncode == -signal.SIGKILL
  assert all(p.name.split(".")[0] < str(STEPS) for p in checkpoints(killed))
  go(make(), killed)
  assert not kill.difference(alone, killed)


def test_the_comparison_sees_a_difference(alone, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(alone, other)
  assert not kill.difference(alone, other)
  path = other / "metrics.jsonl"
  text = path.read_text()
  path.write_text(text.replace('"step": 7', '"step": 8', 1))
  assert kill.difference(alone, other)
  path.write_text(text[: text.rindex("{")])
  assert "lines" in kill.difference(alone, other)
  path.write_text(text)
  (other / "checkpoints" / str(STEPS)).rename(tmp_path / "gone")
  assert "differs" in kill.difference(alone, other)


def test_a_finished_run_is_read(make, tmp_path, monkeypatch):
  made = make()
  want = go(made, tmp_path)
  monkeypatch.setattr(loop, "Program", None)  # It would have to be compiled.
  assert loop.train_and_evaluate(made.config, tmp_path) == want


def test_an_evaluation_that_was_cut_off_is_made_again(make, tmp_path):
  made = make()
  want = go(made, tmp_path)
  path = tmp_path / "metrics.jsonl"
  text = path.read_text()
  path.write_text(text[: text.rindex("{") + 30])  # Killed while it wrote.
  assert go(made, tmp_path) == want
  assert path.read_text() == text


# Refusals.


def test_other_data(make, tmp_path, monkeypatch):
  made = make()
  go(made, tmp_path)
  other = dataclasses.replace(made.task, fingerprint="1")
  monkeypatch.setattr(made, "task", other)
  with pytest.raises(ConfigError, match="fingerprint 0…, but small now has 1…"):
    go(made, tmp_path)


# Steps that are not finite.


class Spoilt:
  """Batches whose masks are all False at some steps: the loss is 0/0."""

  def __init__(self, stream, steps):
    self.stream, self.steps = stream, steps

  def __getitem__(self, step):
    batch = dict(self.stream[step])
    if step in self.steps:
      batch["mask"] = np.zeros_like(batch["mask"])
    return batch


def spoil(monkeypatch, steps):
  batches = program.Program.batches
  monkeypatch.setattr(
    program.Program, "batches", lambda p, seed: Spoilt(batches(p, seed), steps)
  )


def test_a_step_that_is_not_finite_changes_nothing(make, monkeypatch):
  made = make()
  state = made.init(jax.random.key(0))
  stream = Spoilt(made.batches(0), {1})
  state, sums = made.train_step(state, made.put(stream[0]))
  before = jax.device_get(state)
  state, sums = made.train_step(state, made.put(stream[1]))
  assert not np.isfinite(sums["loss"].total / sums["loss"].weight)
  after = jax.device_get(state)
  assert (int(after.step), int(after.skipped)) == (2, 1)
  for part in ("params", "opt_state", "balance", "ema"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(before, part), getattr(after, part)
    )
  state, sums = made.train_step(state, made.put(stream[2]))
  assert (int(state.skipped), int(state.skipped_in_a_row)) == (1, 0)
  changed = jax.tree.map(
    lambda a, b: bool((a != np.asarray(b)).any()), before.params, state.params
  )
  assert all(jax.tree.leaves(changed))


def test_skipped_steps_are_counted_and_left_out(make, tmp_path, monkeypatch):
  spoil(monkeypatch, {4, 5, 20})
  go(make(), tmp_path)
  lines = run_directory.read_metrics(tmp_path, "train")
  assert [x["skipped_steps"] for x in lines] == (
    [0] * 4 + [1] + [2] * 15 + [3] * (STEPS - 20)
  )
  assert "loss" not in lines[4] and "loss" in lines[6]
  text = (tmp_path / "metrics.jsonl").read_text()
  assert "NaN" not in text and "Infinity" not in text


def test_too_many_in_a_row_stop_the_run(make, tmp_path, monkeypatch):
  made = make()
  spoil(monkeypatch, range(13, 99))
  with pytest.raises(RunError) as e:
    go(made, tmp_path)
  most = made.config.train.max_skipped_in_a_row
  for words in (
    f"{most} steps in a row",
    str(tmp_path / "checkpoints" / "10"),
    "learning_rate",
  ):
    assert words in str(e.value)
  # The checkpoint that the error names is there and finite.
  for value in jax.tree.leaves(
    checkpoint.load_params(tmp_path / "checkpoints" / "10")
  ):
    assert np.isfinite(value).all()


def test_a_second_signal_acts_as_usual():
  # A process that a shell started in the background ignores SIGINT.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with signals.Stop() as stop:
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.asked()
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)
