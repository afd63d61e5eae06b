"""A run's files: what is refused, what is told, and nothing lost in silence."""

import fcntl
import functools
import json
import os
import threading

import pytest

from configs import tiny
from moe_jax.core.errors import ConfigError, InUse, RunError
from moe_jax.run import provenance, run_directory
from moe_jax.run.run_directory import RunDirectory


@pytest.fixture
def config():
  return tiny.get_config()


@pytest.fixture
def begun(tmp_path, config, monkeypatch):
  """The folder of a run with three lines of metrics."""
  monkeypatch.setattr(provenance, "facts", lambda config: {"python": "3"})
  with RunDirectory(tmp_path / "run", config) as directory:
    directory.start_over(data="abc")
    for step in (5, 10, 15):
      directory.log(step, "train", {"loss": 1 / step})
  return tmp_path / "run"


def test_two_processes_in_one_folder(tmp_path, config):
  with (
    RunDirectory(tmp_path, config),
    pytest.raises(ConfigError, match=f"process {os.getpid()} on"),
  ):
    RunDirectory(tmp_path, config)
  RunDirectory(tmp_path, config).close()


def test_a_folder_of_another_config(begun, config):
  config.mesh, config.data.cache_dir = (8, 1, 1, 1), "elsewhere"
  RunDirectory(begun, config).close()  # The same numbers.
  config.optim.learning_rate = 0.5
  with pytest.raises(ConfigError) as e:
    RunDirectory(begun, config)
  for words in ("config.optim.learning_rate = ", "0.5", "--workdir"):
    assert words in str(e.value)


def test_a_run_that_saved_checkpoints_every_word(begun, config):
  """The value is free to change, so that nothing else has looked at it."""
  there = json.loads((begun / "config.json").read_text())
  there["checkpoint"]["every"] = "often"
  (begun / "config.json").write_text(json.dumps(there))
  with RunDirectory(begun, config) as directory:
    directory.start_over(data="abc")


def test_a_folder_in_which_nothing_began(tmp_path, config):
  """Nothing is left of a run that was refused, and its folder takes another one."""
  for seed in (1, 2):
    config.seed = seed
    with RunDirectory(tmp_path, config):
      there = json.loads((tmp_path / "config.json").read_text())
      assert there["seed"] == seed
      (tmp_path / "checkpoints").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
  with RunDirectory(tmp_path, config):
    (tmp_path / "run.json").write_text("{}")
  config.seed = 3
  with pytest.raises(ConfigError, match="config.seed = 2, and now it is 3"):
    RunDirectory(tmp_path, config)


def test_a_page_may_look_at_the_lock_as_a_run_begins(tmp_path, config):
  """Not longer than a moment: whoever keeps the lock is another run."""
  with (tmp_path / ".lock").open("a") as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    with pytest.raises(InUse, match="another run is going on"):
      RunDirectory(tmp_path, config)
    release = functools.partial(fcntl.flock, file, fcntl.LOCK_UN)
    threading.Timer(run_directory._MOMENT / 4, release).start()
    RunDirectory(tmp_path, config).close()


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_file_of_a_run_that_is_gone_or_damaged(begun, config, name):
  path = begun / name
  whole = path.read_bytes()
  damages = [b"", whole[:-9], whole.replace(b'"', b"\xff", 1), b"[" * 10**5]
  damages += [b"[]", b'{"data": 3}', b'{"continued": "yes"}']
  for damage in damages:
    path.write_bytes(damage)
    with pytest.raises(ConfigError) as e:
      RunDirectory(begun, config)
    assert "--workdir" in str(e.value) and "\n" not in str(e.value)
    assert path.read_bytes() == damage
  path.unlink()
  with pytest.raises(ConfigError, match=f"a run without its {name}"):
    RunDirectory(begun, config)
  path.write_bytes(whole)
  RunDirectory(begun, config).close()


DAMAGED_LINES = {
  "not UTF-8": b'{"step": 10, "split": "tr\xe1in"}',
  "no JSON": b'{"step": 10, "split',
  "no object": b"3",
  "no split": b'{"step": 10}',
  "no number": b'{"step": "10", "split": "train"}',
  "infinite": b'{"step": 1e999, "split": "train"}',
  "true": b'{"step": true, "split": "train"}',
  "a text": b'{"step": 10, "split": "train", "loss": "1"}',
  "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_a_damaged_line_of_metrics(begun, config, line, capsys):
  path = begun / "metrics.jsonl"
  first, _, last = path.read_bytes().splitlines()
  path.write_bytes(b"\n".join([first, line, last, b""]))
  with pytest.raises(ConfigError, match="^line 2 of .* is not a line of metr"):
    run_directory.read_metrics(begun, "train")
  with RunDirectory(begun, config) as directory:
    words = "1 of 3 lines of metrics.jsonl cannot be read: 2"
    short = "has 1 whole lines up to step 10, where 2 were written"
    with pytest.raises(ConfigError, match=rf"{short} \({words}\); bring it"):
      directory.go_on(10, 2)
    with pytest.raises(ConfigError, match=f"{begun}: {words}; bring it back"):
      directory.start_over()
    for step in (5, 15):
      assert directory.logged(step, "train") == {"loss": 1 / step}
    # After the checkpoint they are written again.
    directory.go_on(5, 1, data="abc")
    assert (
      directory.lines == 1 and "goes on after step 5" in capsys.readouterr().err
    )
    directory.log(10, "train", {"loss": 0.5})
  assert [x["step"] for x in run_directory.read_metrics(begun, "train")] == [
    5,
    10,
  ]


def test_a_line_that_is_being_written_is_not_read(begun):
  with (begun / "metrics.jsonl").open("a") as f:
    f.write('{"step": 20, "spl')
  assert len(run_directory.read_metrics(begun, "train")) == 3
  with pytest.raises(FileNotFoundError):
    run_directory.read_metrics(begun / "nothing", "train")


def deleted(path):
  path.unlink()


def cut_short(path):
  path.write_bytes(path.read_bytes()[:-5])


def longer(path):
  path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("change", [deleted, cut_short, longer])
@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "config.json"])
def test_a_file_changed_under_a_run_stops_it(begun, config, name, change):
  for write in (
    lambda directory: directory.log(20, "train", {"loss": 1.0}),
    lambda directory: directory.sync(),
  ):
    whole = (begun / name).read_bytes()
    with RunDirectory(begun, config) as directory:
      directory.go_on(15, 3, data="abc")
      directory.sync()
      path = begun / name
      before = path.read_bytes()
      change(path)
      with pytest.raises(
        RunError, match=f"{name} has .* deleted meanwhile; bri"
      ):
        write(directory)
      assert not path.exists() or path.read_bytes() != before
    (begun / name).write_bytes(whole)


def test_a_folder_that_can_no_longer_be_written_to(begun, config, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  with RunDirectory(begun, config) as directory:
    monkeypatch.setattr(run_directory.files.os, "fsync", refuse)
    for write in (
      lambda: directory.go_on(15, 3),
      lambda: directory.describe(15, data="abc"),
    ):
      with pytest.raises(RunError, match=r"\(Permission denied\); mend this"):
        write()


def test_what_a_run_is_made_with(tmp_path, config, caplog):
  """Plugins are code of the run: their change is told."""
  plugin = tmp_path / "plugins" / "routers" / "mine.py"
  plugin.parent.mkdir(parents=True)
  plugin.write_text("def build(top_k: int): ...\n")
  config.plugins = (str(tmp_path / "plugins"),)
  with RunDirectory(tmp_path / "run", config) as directory:
    directory.describe(data="abc", pair=(1, 2))
  facts = json.loads((tmp_path / "run" / "run.json").read_text())
  name = f"{tmp_path / 'plugins'}/routers/mine.py"
  assert list(facts["plugins"]) == [name] and facts["pair"] == [1, 2]
  assert facts["versions"]["jax"] and facts["code"] and facts["python"]
  assert name in provenance.of_process(tmp_path, config)

  with RunDirectory(tmp_path / "run", config) as directory:
    directory.describe(5, data="abc", pair=(1, 2))
    assert set(directory.facts["continued"][-1]) <= {"step", "started"}
  assert not caplog.records
  plugin.write_text("def build(top_k: int, more: int): ...\n")
  with RunDirectory(tmp_path / "run", config) as directory:
    directory.describe(8, data="abc", pair=(1, 2))
  told = json.loads((tmp_path / "run" / "run.json").read_text())["continued"]
  assert [x["step"] for x in told] == [5, 8]
  assert told[1]["plugins"] != facts["plugins"]
  assert f"The plugins of {tmp_path / 'run'} changed" in caplog.text
