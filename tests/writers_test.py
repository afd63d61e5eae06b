"""Metrics in other places: the same numbers, and only once."""

import json
import pathlib
import sys
import types

import jax
import pytest

from moe_jax.core.errors import ConfigError, Interrupted
from moe_jax.data.text import mixed
from moe_jax.run import config as config_lib
from moe_jax.run import run_directory, writers
from moe_jax.run.pages import describe, read
from moe_jax.training import loop, program
from tests.loop_test import Told
from tests.small import SmallCorpus, config


def settings():
  c = config()
  c.train.update(num_steps=6, log_every=1)
  return c


@pytest.fixture(scope="module")
def made():
  """A program of `settings`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mixed, "prepare", lambda *a, **k: SmallCorpus())
    patch.setattr(program.parallel, "mesh_or_none", lambda *_: None)
    return program.Program(settings())


@pytest.fixture
def run(made, tmp_path):
  """Trains a small model; `run(stop_at)` may be asked to stop."""

  def run(stop_at=None, **changes):
    texts = [f"{key}={value!r}" for key, value in changes.items()]
    made.config = config_lib.overridden(settings(), texts)
    with run_directory.RunDirectory(tmp_path / "run", made.config) as directory:
      loop.run(made, 0, directory, Told(stop_at))
    return tmp_path / "run"

  return run


def test_tensorboard_has_every_number_once(run):
  from tensorboardX import proto

  with pytest.raises(Interrupted):
    run(stop_at=2, writers=("tensorboard",))
  folder = run(writers=("tensorboard",))
  found = {}
  for path in sorted((folder / "tensorboard").glob("events.*")):
    for event in events(path, proto.event_pb2.Event):
      for value in event.summary.value:
        found.setdefault(value.tag, []).append((event.step, value.simple_value))
  lines = run_directory.read_metrics(folder, "train")
  want = [(x["step"], pytest.approx(x["loss"])) for x in lines]
  assert sorted(set(found["train/loss"])) == want
  (line,) = run_directory.read_metrics(folder, "validation")
  assert found["validation/max_vio_global"] == [
    (6, pytest.approx(line["max_vio_global"]))
  ]


def events(path, kind):
  """The records of an event file: length, checksum, content, checksum."""
  content = pathlib.Path(path).read_bytes()
  while content:
    size = int.from_bytes(content[:8], "little")
    yield kind.FromString(content[12 : 12 + size])
    content = content[16 + size :]


def test_wandb_goes_on_under_the_same_id(run, monkeypatch, capsys):
  """A stand-in takes the two calls that are made."""
  made, link = [], "https://a.page/of/the/run"

  class Run:
    url = link

    def __init__(self, **options):
      self.options, self.logged, self.finished = options, [], False
      made.append(self)

    def log(self, values, step):
      self.logged.append((step, values))

    def finish(self):
      self.finished = True

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
  with pytest.raises(Interrupted):
    run(stop_at=2, writers=("wandb",))
  folder = run(writers=("wandb",))
  first, second = made
  assert first.options["id"] == second.options["id"]
  assert first.options["resume"] == "allow"
  assert first.options["config"]["model"]["d_model"] == 16
  assert first.finished and second.finished
  said = f"its metrics are shown at {link}\n"
  assert capsys.readouterr().err.count(said) == 2
  facts = json.loads((folder / "run.json").read_text())
  assert facts["links"] == [link]
  assert all("links" not in later for later in facts["continued"])
  shown = describe.facts(read.run(folder, "a"))
  assert shown["Shown at"] == link
  lines = run_directory.read_metrics(folder, "train")
  logged = [x for x in first.logged + second.logged if "train/loss" in x[1]]
  assert [s for s, _ in logged] == [x["step"] for x in lines]
  assert [v["train/loss"] for _, v in logged] == [x["loss"] for x in lines]


def test_a_missing_library_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ConfigError, match=r"pip install 'moe_jax\[wandb\]'"):
    writers.check(("wandb",))
  with pytest.raises(ConfigError, match="writers.0. = 'wand' is not one of"):
    writers.check(("wand",))


def test_a_profile_of_some_steps(run, monkeypatch):
  calls = []
  trace = jax.profiler.trace
  monkeypatch.setattr(
    jax.profiler, "trace", lambda path: (calls.append(path), trace(path))[1]
  )
  folder = run(**{"train.profile_steps": (2, 4)})
  assert calls == [folder / "profile"]
  assert list((folder / "profile").rglob("*.xplane.pb"))
