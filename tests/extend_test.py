"""More steps for a run: as if it had had them from the start, or one sentence."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from moe_jax.core.errors import ConfigError
from moe_jax.data.text import mixed
from moe_jax.run import run_directory
from moe_jax.training import checkpoint, loop, program
from moe_jax.training.optimizers import schedules
from moe_jax.training.starts import extension
from tests import kill, small

SHORT, LONG = 20, 40
DECAY = 4


@pytest.fixture(scope="module")
def compiled():
  """The functions that all these runs share."""
  return {}


@pytest.fixture(autouse=True)
def one_device(monkeypatch, compiled):
  monkeypatch.setattr(mixed, "prepare", lambda *a, **k: small.SmallCorpus())
  monkeypatch.setattr(program.parallel, "mesh_or_none", lambda *_: None)
  made = functools.partial(program.Program, compiled=compiled)
  monkeypatch.setattr(loop, "Program", made)


def config(num_steps, schedule="constant", **optim):
  c = small.config()
  c.mesh = (1, 1, 1, 1)
  c.train.update(num_steps=num_steps, log_every=5, ema=0.75)
  c.checkpoint.every = 8
  more = {"wsd": {"decay_steps": DECAY}, "rsqrt": {"decay_steps": 6}}
  more = {"warmup_steps": 4} | more.get(schedule, {}) | optim
  c.optim.update(schedule=schedule, **more)
  return c


def train(c, folder):
  return loop.train_and_evaluate(c, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(schedule) -> the folder of a run that had all its steps from the start."""

  @functools.cache
  def run(schedule):
    folder = tmp_path_factory.mktemp(schedule)
    train(config(LONG, schedule), folder)
    return folder

  return run


def content(folder):
  """{name: bytes} of the files of a run that has not changed."""
  paths = [
    folder / name for name in ("config.json", "metrics.jsonl", "run.json")
  ]
  there = {path.name: path.read_bytes() for path in paths}
  return there | {
    "steps": sorted(checkpoint.newest_first(folder / "checkpoints"))
  }


def without_end(lines):
  """Lines without the validation at the end of the short run."""
  return [x for x in lines if (x["step"], x["split"]) != (SHORT, "validation")]


@pytest.mark.parametrize("schedule", schedules.OPTIONS["schedule"].choices)
def test_the_rates_that_all_longer_runs_begin_with(schedule):
  """Up to the bit, and not one step more."""
  section = config(SHORT, schedule).optim
  same = schedules.steps_of_longer(section, SHORT)
  rates = [
    [float(schedules.rate(schedules.numbers(section, n))(s)) for s in range(n)]
    for n in (SHORT, SHORT + 1, LONG)
  ]
  for longer in rates[1:]:
    assert rates[0][:same] == longer[:same] or same is None
  if schedule == "cosine":
    assert same is None and rates[0][6:] != rates[1][6:SHORT]
  elif schedule == "wsd":
    assert same == SHORT - DECAY and rates[0][same] < rates[1][same]
  else:
    assert same == SHORT


def test_a_longer_run_is_the_same_run(whole, tmp_path, capsys):
  """Bit for bit; only the evaluation at the old end is there beside."""
  schedule = "constant"
  first = train(config(SHORT, schedule), tmp_path)
  end = train(config(LONG, schedule), tmp_path)
  lines = kill.lines(tmp_path)
  assert without_end(lines) == kill.lines(whole(schedule))
  (old,) = [x for x in lines if x not in without_end(lines)]
  assert old == {"step": SHORT, "split": "validation"} | first
  last = {"step": LONG, "split": "validation"} | end
  assert run_directory.read_metrics(tmp_path, "validation")[-1] == last
  params = [checkpoint.load_params(x) for x in (tmp_path, whole(schedule))]
  jax.tree.map(np.testing.assert_array_equal, *params)
  # Its files say so, and it is a run like any other.
  there = json.loads((tmp_path / "config.json").read_text())
  assert there["train"]["num_steps"] == LONG
  facts = json.loads((tmp_path / "run.json").read_text())
  assert facts["num_steps"] == SHORT
  assert [(x["step"], x["num_steps"]) for x in facts["continued"]] == [
    (SHORT, LONG)
  ]
  assert f"goes on after step {SHORT}" in capsys.readouterr().err
  assert train(config(LONG, schedule), tmp_path) == end


def test_from_before_the_decay(whole, tmp_path, capsys):
  """All that was written since then becomes a run of its own."""
  short = tmp_path / "short"
  first = train(config(SHORT, "wsd"), short)
  lines, params = kill.lines(short), checkpoint.load_params(short)
  train(config(LONG, "wsd"), short)
  assert not kill.difference(whole("wsd"), short)
  aside = short / f"run_of_{SHORT}_steps"
  assert str(aside) in capsys.readouterr().err
  assert kill.lines(aside) == lines
  jax.tree.map(
    np.testing.assert_array_equal, checkpoint.load_params(aside), params
  )
  assert train(config(SHORT, "wsd"), aside) == first
  # Nothing of the decay is left outside.
  assert {int(x.name) for x in (short / "checkpoints").iterdir()} <= {
    *(16, 24, 32, LONG)
  }


def test_a_run_that_was_stopped_before_its_decay(whole, tmp_path):
  stopped_at(15, config(SHORT, "wsd"), tmp_path)
  train(config(LONG, "wsd"), tmp_path)
  assert not kill.difference(whole("wsd"), tmp_path)
  assert not [*tmp_path.glob("run_of_*")]


def test_more_than_once(whole, tmp_path):
  """The second time from a step that the first run had, too."""
  for steps in (SHORT, SHORT + 3):
    train(config(steps, "wsd"), tmp_path)
  train(config(LONG, "wsd"), tmp_path)
  assert not kill.difference(whole("wsd"), tmp_path)
  aside = [tmp_path / f"run_of_{n}_steps" for n in (SHORT, SHORT + 3)]
  ends = [kill.lines(folder)[-1]["step"] for folder in aside]
  assert ends == [SHORT, SHORT + 3]


def stopped_at(step, c, folder):
  """Runs a config up to a step, and no further."""
  take = loop.take_step

  def until(program, state, stream, number, *args, **options):
    if number == step:
      raise KeyboardInterrupt
    return take(program, state, stream, number, *args, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "take_step", until)
    with pytest.raises(KeyboardInterrupt):
      train(c, folder)


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_killed_in_its_new_steps(whole, tmp_path, schedule):
  """Before the first new checkpoint, and after it."""
  train(config(SHORT, schedule), tmp_path)
  for step in (19, 23, 30):
    stopped_at(max(step, SHORT), config(LONG, schedule), tmp_path)
  train(config(LONG, schedule), tmp_path)
  assert without_end(kill.lines(tmp_path)) == kill.lines(whole(schedule))
  params = [checkpoint.load_params(x) for x in (tmp_path, whole(schedule))]
  jax.tree.map(np.testing.assert_array_equal, *params)


@pytest.mark.parametrize(
  "place",
  [
    (extension.shutil, "copytree"),
    (extension.pathlib.Path, "rename"),
    (run_directory.files, "write_text"),
  ],
  ids=lambda place: place[1],
)
def test_killed_while_its_folder_is_changed(
  whole, tmp_path, place, monkeypatch
):
  train(config(SHORT, "wsd"), tmp_path)
  lines, calls = kill.lines(tmp_path), []
  original = getattr(*place)

  def killed(*args, **options):
    calls.append(args)
    if len(calls) == 2 or place[1] == "copytree":
      raise KeyboardInterrupt
    return original(*args, **options)

  monkeypatch.setattr(*place, killed)
  with pytest.raises(KeyboardInterrupt):
    train(config(LONG, "wsd"), tmp_path)
  monkeypatch.setattr(*place, original)
  train(config(LONG, "wsd"), tmp_path)
  assert not kill.difference(whole("wsd"), tmp_path)
  aside = tmp_path / f"run_of_{SHORT}_steps"
  assert kill.lines(aside) == lines
  assert (aside / "checkpoints" / str(SHORT)).is_dir()


# Refusals, which change nothing.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(schedule, options) -> a copy of the folder of a run of `SHORT` steps."""

  @functools.cache
  def made(schedule):
    folder = tmp_path_factory.mktemp("finished") / schedule
    train(config(SHORT, schedule), folder)
    return folder

  def copied(schedule, to):
    shutil.copytree(made(schedule), to, dirs_exist_ok=True)
    return to

  return copied


@pytest.mark.parametrize(
  "schedule, steps, change, words",
  [
    (
      "cosine",
      LONG,
      {},
      "run of 20 steps, and config.train.num_steps is now 40, but with"
      " optim.schedule = cosine .* every step depends on that .*--config.init_from=",
    ),
    (
      "constant",
      12,
      {},
      "is now 12, but 20 steps are done; give 20",
    ),
    ("wsd", 19, {}, "is now 19, but 20 steps are done"),
    (
      "constant",
      LONG,
      {"optim.learning_rate": 1.0},
      "with config.optim.learning_r",
    ),
  ],
)
def test_what_no_longer_run_begins_with(
  finished, tmp_path, schedule, steps, change, words
):
  folder = finished("wsd" if schedule == "wsd" else "constant", tmp_path)
  path = folder / "config.json"
  path.write_text(path.read_text().replace('"constant"', f'"{schedule}"'))
  before, c = content(folder), config(steps, schedule)
  c.update_from_flattened_dict(change)
  with pytest.raises(ConfigError, match=words):
    train(c, folder)
  assert content(folder) == before and not [*folder.glob("run_of_*")]


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_no_checkpoint_that_it_could_go_on_from(finished, tmp_path, schedule):
  folder = finished(schedule, tmp_path)
  gone = (8, 16, SHORT) if schedule == "constant" else (8, 16)
  for step in gone:
    shutil.rmtree(folder / "checkpoints" / str(step))
  before = content(folder)
  words = "no checkpoint of step 20 or before is there; bring"
  if schedule == "wsd":
    words = "decays after step 16, and no checkpoint of step 16 or before"
  with pytest.raises(ConfigError, match=words):
    train(config(LONG, schedule), folder)
  assert content(folder) == before


def test_a_run_that_was_killed_before_its_first_checkpoint(whole, tmp_path):
  """It starts again, as it would with as many steps."""
  stopped_at(5, config(SHORT), tmp_path)
  assert not checkpoint.newest_first(tmp_path / "checkpoints")
  train(config(LONG), tmp_path)
  assert not kill.difference(whole("constant"), tmp_path)


def test_a_mistyped_number_of_steps_is_taken_back(finished, tmp_path):
  """It is possible until a step is made that the shorter run does not have."""
  folder = finished("constant", tmp_path)
  lines = run_directory.read_metrics(folder, "validation")
  for steps in (4000, 400, 20):
    path = folder / "config.json"
    config_ = config(steps, "constant")
    with run_directory.RunDirectory(folder, config_, extension.extend):
      assert json.loads(path.read_text())["train"]["num_steps"] == steps
  assert loop.train_and_evaluate(config(20, "constant"), folder) == {
    k: v for k, v in lines[-1].items() if k not in ("step", "split")
  }


def test_links_and_copies_that_were_never_whole(tmp_path):
  """A link to data stays a link, and what a killed process left goes."""
  run, data = tmp_path / "run", tmp_path / "data"
  train(config(SHORT, "wsd"), run)
  data.mkdir()
  (data / "large").write_bytes(b"0" * 99)
  (run / "texts").symlink_to(data)
  (run / "gone").symlink_to(tmp_path / "nothing")
  (run / ".run_of_20_steps-x").mkdir()
  train(config(LONG, "wsd"), run)
  aside = run / f"run_of_{SHORT}_steps"
  assert (aside / "texts").is_symlink() and (aside / "gone").is_symlink()
  assert not [*run.glob(".run_of_*")]
