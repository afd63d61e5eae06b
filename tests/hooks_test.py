"""Hooks: called with the right values at the right steps, and only looking on."""

import json

import jax
import numpy as np
import pytest

from experiments import sweeps
from moe_jax.core.errors import ConfigError, Interrupted
from moe_jax.data.text import mixed
from moe_jax.run import config as config_lib
from moe_jax.run import run_directory
from moe_jax.training import hooks, loop, program
from moe_jax.training.hooks import loads as load_hook
from tests import kill, small
from tests.loop_test import Told

STEPS = 11
# It notes what it is called with.
NOTES = """
import json

def build(run, word: str = "seen"):
  def note(state, step, metrics):
    loads = {k: x.tolist() for k, x in metrics["tokens_per_expert"].items()}
    norm = float((state.params["embedding"] ** 2).sum())
    metrics = {**metrics, "tokens_per_expert": loads}
    line = [word, int(state.step), norm, step, metrics]
    with open(run.folder / "notes.jsonl", "a") as file:
      file.write(json.dumps(line) + "\\n")

  return note
"""
BROKEN = "def build(run):\n  pass\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A plugin folder with the hooks `notes` and `broken`."""
  folder = tmp_path_factory.mktemp("plugins")
  (folder / "hooks").mkdir()
  (folder / "hooks" / "notes.py").write_text(NOTES)
  (folder / "hooks" / "broken.py").write_text(BROKEN)
  return folder


def settings(folder, **hooks):
  c = small.config()
  c.plugins = (str(folder),)
  c.train.update(num_steps=STEPS, log_every=1, loads_every=4)
  c.train.hooks = hooks
  return config_lib.locked(c.to_dict())


@pytest.fixture(scope="module")
def go(folder):
  """(path, stop_at, **hooks) -> None; all runs share one program."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mixed, "prepare", lambda *a, **k: small.SmallCorpus())
    patch.setattr(program.parallel, "mesh_or_none", lambda *_: None)
    made = program.Program(settings(folder))

  def go(path, stop_at=None, **hooks):
    made.config = settings(folder, **hooks)
    with run_directory.RunDirectory(path, made.config) as directory:
      loop.run(made, 3, directory, Told(stop_at))

  return go


def test_a_hook_sees_its_steps_and_changes_nothing(go, tmp_path):
  """Also after a resume, with no program compiled for it."""
  go(tmp_path / "alone")
  compiled = []

  def listen(name, *_, **__):
    compiled.extend([name] if "backend_compile" in name else [])

  jax.monitoring.register_event_duration_secs_listener(listen)
  hooks = {
    "mine": {"name": "notes", "every": 3, "word": "mine"},
  }
  with pytest.raises(Interrupted):
    go(tmp_path / "hooked", 4, **hooks)
  assert compiled  # The first call of `notes` compiles the norm that it takes.
  compiled.clear()
  go(tmp_path / "hooked", **hooks)
  jax.monitoring.unregister_event_duration_listener(listen)
  assert not compiled
  assert not kill.difference(tmp_path / "alone", tmp_path / "hooked")

  notes = (tmp_path / "hooked" / "notes.jsonl").read_text().splitlines()
  notes = [json.loads(line) for line in notes]
  assert [(word, step) for word, _, _, step, _ in notes] == [
    ("mine", 3),
    ("mine", 6),
    ("mine", 9),
  ]
  lines = run_directory.read_metrics(tmp_path / "hooked", "train")
  untold = {"step", "split", "skipped_steps", "tokens_per_second"}
  untold |= {"learning_rate"}
  for _, of_state, _, step, metrics in notes:
    assert of_state == step
    loads = metrics.pop("tokens_per_expert")
    (line,) = [x for x in lines if x["step"] == step]
    assert metrics == {k: x for k, x in line.items() if k not in untold}
    assert list(loads) == ["00", "01"] and len(loads["00"]) == 4
    for number, load_E in loads.items():
      worst = max(load_E) / np.mean(load_E) - 1
      assert metrics[f"max_vio/{number}"] == pytest.approx(worst)
  assert len({norm for _, _, norm, _, _ in notes}) == 3

  # The same loads are in metrics.jsonl, also after a resume.
  lines = run_directory.read_metrics(tmp_path / "hooked", "loads")
  assert [line["step"] for line in lines] == [4, 8]
  for line in lines:
    tokens = {sum(line[layer]) for layer in ("00", "01")}
    assert len(tokens) == 1 and len(line) == 4


def test_hooks_are_part_of_no_digest(folder):
  plain = settings(folder)
  hooked = settings(folder, mine={"name": "notes", "every": 3})
  assert sweeps.digest(hooked) == sweeps.digest(plain)


@pytest.mark.parametrize(
  ("section", "words"),
  [
    ({"name": "nots", "every": 3}, 'no "nots" in hooks.*mean "notes"'),
    ({"name": "notes"}, "train.hooks.mine.every = None is not a whole number"),
    ({"name": "notes", "every": 0}, "train.hooks.mine.every = 0 is not"),
    ({"name": "notes", "every": 3, "word": 1}, "hooks.mine.word = 1 is not"),
    ({"name": "notes", "every": 3, "wrd": ""}, 'mine has no "wrd".*"word"'),
    ({"name": "notes", "every": 3, "run": ""}, "run is set outside of"),
    ({"every": 3}, "train.hooks.mine = .* with the name of a part"),
  ],
)
def test_a_wrong_hook_is_refused_before_anything_compiles(
  folder, section, words
):
  with pytest.raises(ConfigError, match=words):
    program.check(settings(folder, mine=section))


def test_a_hook_that_is_no_function_is_named(go, tmp_path):
  with pytest.raises(ConfigError, match="hooks/broken.*returned None, not a f"):
    go(tmp_path, mine={"name": "broken", "every": 1})


def test_the_map_of_loads():
  """Rows are layers; white is the mean, red is more, blue less, black no expert."""
  loads = [np.array([5, 5, 0, 10]), np.array([3, 3])]
  image = load_hook.load_map(loads)
  side = load_hook._SIDE
  assert image.shape == (2 * side, 4 * side, 3) and image.dtype == np.uint8
  tiles = image.reshape(2, side, 4, side, 3).swapaxes(1, 2)
  assert (tiles == tiles[:, :, :1, :1]).all()
  (white, same, less, more), (first, second, *none) = tiles[:, :, 0, 0]
  assert (np.stack([same, first, second]) == white).all() and np.ptp(white) < 5
  assert less[2] > 2 * less[0] and more[0] > 2 * more[2]
  assert not np.any(none)


def test_loads_are_shown_where_there_are_some(go, tmp_path):
  go(tmp_path, loads={"name": "loads", "every": 5})
  names = [path.name for path in sorted(tmp_path.glob("pictures/loads/*"))]
  assert names == ["00000005.png", "00000010.png"]
  seen = []
  run = hooks.Run(tmp_path, None, lambda *picture: seen.append(picture))
  load_hook.build(run)(None, 5, {"tokens_per_expert": {}})
  assert not seen  # Of a model without experts.
