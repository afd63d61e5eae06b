"""Commands: what they refuse, and how they say so."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from moe_jax import main, params
from moe_jax.core.errors import ConfigError
from moe_jax.core.files import writing
from moe_jax.run import command, run_directory
from moe_jax.run import config as config_lib
from moe_jax.training import trained

# The tests see eight devices.
ON_THE_MESH = ["--config=configs/tiny.py", "--config.mesh=(8,1,1,1)"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["model.moe.num_expert=4"], ["num_expert", "num_experts"]),
    (["modle.d_model=4"], ["modle", "model"]),
    (["seed=-1"], ["seed = -1", "0 to 2147483647"]),
    (["optim.learning_rate=nan"], ["optim.learning_rate", "nan"]),
    (["model.prefix=None"], ["model.prefix = None", "tuple"]),
    (["optim.optimizer.b2=1.5"], ["optim.optimizer.b2 = 1.5", "below 1"]),
    (["model.moe=3"], ["model.moe", "section"]),
    (["model.moe.top_k=9"], ["top_k = 9", "num_experts = 4"]),
    (
      ["model.moe.top_k=9", "model.moe.router={'name': 'expert_choice'}"],
      ["top_k = 9", "num_experts = 4"],
    ),
    (["model.moe.capacity_factor=0.001"], ["capacity_factor = 0.001", "zero"]),
    (["mesh=(1,1,8,1)"], ["num_experts = 4", "expert = 8"]),
    (
      ["mesh=(2,1,4,1)", "model.moe.dispatcher={'name': 'sorted'}"]
      + ["model.moe.expert_buckets=2"],
      ["expert_buckets = 2", "expert = 4", "divides"],
    ),
    (["mesh=(2,1,1,1)"], ["(2, 1, 1, 1)", "8 devices"]),
    (["mesh=(1,1,1,8)"], ["num_heads = 2", "tensor = 8"]),
    (["mesh=(-1,3,1,1)"], ["3, 1, 1)", "8"]),
    (["mesh=(-1,-1,1,1)"], ["(-1, -1, 1, 1)", "one length may be -1"]),
    (["train={'num_stepz': 3}"], ["num_stepz", "num_steps"]),
    (["eval.batch_size=3"], ["eval.batch_size", "batch of 3"]),
    (["plugins=('no_such_folder',)"], ["no_such_folder"]),
    (["model.moe.router.top_k=1"], ["top_k"]),
    (["model.moe.top_k=1", "model.moe.router.renormalize=True"], ["renorm"]),
    (["model.name=attention"], ["attention"]),
    (["data.dir=/no/such/corpus"], ["/no/such/corpus"]),
    (["data.name=python_source"], ["python_source", "python_sources"]),
    (["model.moe.router={'name': 'topk'}"], ["topk", "top_k"]),
    (
      ["model.moe.router={'name': 'top_k', 'sore': 'sigmoid'}"],
      ["model.moe.router", "sore", "score"],
    ),
    (
      ["model.moe.router={'name': 'top_k', 'score': 'sigmod'}"],
      ["model.moe.router.score", "sigmod", "sigmoid"],
    ),
    (
      ["model.moe.balancers={'a': {'name': 'switch', 'coefficient': -1.0}}"],
      ["model.moe.balancers.a.coefficient = -1.0", "0 or more"],
    ),
    (["model.moe.balancers.a.name=switch"], ["balancers.a", "coefficient"]),
    (["model.moe.capacity_factor=None"], ["sorted", "capacity_factor"]),
    (
      ["model.moe.dispatcher.order=choice"],
      ["later tokens", "allow_noncausal"],
    ),
    (["model.moe.tokens_per_group=100"], ["100", "64"]),
    (["model.moe.expert_buckets=3"], ["expert_buckets = 3"]),
    (["model.pattern=('sparse',)"], ["sparse"]),
    (["model.num_layers=5", "model.pattern=('dense','moe')"], ["5"]),
    (["model.num_kv_heads=3"], ["num_kv_heads = 3"]),
    (["optim.optimizer.name=adam"], ["adam", "adamw"]),
    (["train.ema=1.0"], ["train.ema = 1.0", "None"]),
    (["optim.warmup_steps=99"], ["warmup_steps = 99"]),
    (
      ["train.accumulation=2"],
      ["data.batch_size over train.accumulation", "batch of 4", "8"],
    ),
    (["model.name=mlp"], ["mlp", "decoder"]),
    (
      ["model.moe.router={'name': 'hash', 'vocab_size': 99}"],
      ["knows 99 values", '"token_id"', "this model has 257"],
    ),
    (
      ["model.moe.router={'name': 'by_feature', 'feature': 'domain'}"]
      + ["model.moe.router.num_values=2"],
      ['"domain"', "position, token_id"],
    ),
    (
      ["model.moe.router={'name': 'by_feature', 'feature': 'position'}"]
      + ["model.moe.router.num_values=2"],
      ['"position"', "has any number of them", "boundaries"],
    ),
    (
      ["model.moe.router={'name': 'by_feature', 'feature': 'token_id'}"]
      + ["model.moe.router.num_values=2"]
      + ["model.moe.router.boundaries=(300.0,)"],
      ["the boundary 300.0", '"token_id"', "go from 0 to 256"],
    ),
    (
      ["model.moe.router={'name': 'top_p', 'threshold': 0.5, 'average': 3.0}"],
      ["has 3 experts", "at most 2"],
    ),
  ],
)
def test_impossible_values_are_one_clear_sentence(
  flags, words, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(_cache()))
  flags = [f"--config.{flag}" for flag in flags]
  with pytest.raises(ConfigError) as e:
    main.main([*ON_THE_MESH, *flags, f"--workdir={tmp_path / 'run'}"])
  assert all(word in str(e.value) for word in words), str(e.value)
  assert "\n" not in str(e.value)
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_exit_code_2_and_no_traceback(tmp_path):
  blocked = tmp_path / "file"
  blocked.write_text("")
  for flags in (
    [f"--workdir={blocked / 'run'}"],
    [f"--workdir={tmp_path / 'run'}", "--config.seeed=1"],
    [f"--workdir={tmp_path / 'run'}", "--wrokdir=1"],
  ):
    done = subprocess.run(
      [sys.executable, "-m", "moe_jax.main", *ON_THE_MESH, *flags],
      capture_output=True,
      text=True,
      env={**os.environ, "XDG_CACHE_HOME": str(_cache())},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


SIGNALLED = """
import gc, os, signal, sys, threading, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from moe_jax.core import files
from moe_jax.run import command

def send(*_):
  os.kill(os.getpid(), signal.NUMBER)
  for _ in range(1000):
    pass

class Part:
  pass

def main():
  with files.scratch_folder(sys.argv[1], "half-"):
    print("said before")
    WAY
  return 0

command.run(main)
"""
# Places in which Python swallows an exception that a handler raises; and XLA's
# threads, which an ordinary exit does not stop.
WAYS = {
  "gc": "gc.callbacks.append(send); gc.collect()",
  "del": "Part.__del__ = send; Part()",
  "weakref": "part = Part(); ref = weakref.ref(part, send); del part",
  "except": """
    try:
      send()
    except BaseException:
      pass
""",
  "compiling": """
    import jax
    threading.Timer(1.0, send).start()
    while True:
      jax.clear_caches()
      jax.jit(lambda x: sum(x**i for i in range(2000)))(1.0)
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_ends_a_command_wherever_it_arrives(way, tmp_path):
  number = "SIGINT" if way == "compiling" else "SIGTERM"
  text = SIGNALLED.replace("NUMBER", number).replace("WAY", WAYS[way])
  done = subprocess.run(
    [sys.executable, "-c", text, tmp_path], capture_output=True, text=True
  )
  assert done.returncode == 75, done.stderr
  assert done.stderr == "stopped by a signal; give the same command again\n"
  assert done.stdout == "said before\n"
  assert not list(tmp_path.iterdir())


def test_a_command_imports_nothing_slow_before_it_handles_signals():
  """A signal may interrupt slow imports, so they come after the handlers."""
  text = "import sys, moe_jax.main; print(*sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", text], capture_output=True, text=True, check=True
  )
  roots = {name.partition(".")[0] for name in done.stdout.split()}
  assert not roots & {"jax", "numpy", "ml_collections", "flax"}


def test_a_full_disk_is_one_sentence_wherever_it_is_met(capsys):
  with pytest.raises(SystemExit) as e:
    command.run(lambda: pathlib.Path("/dev/full").write_text("x"))
  assert e.value.code == 2
  error = capsys.readouterr().err
  assert "No space left on device" in error and "free space" in error
  assert "a file" in error
  assert len(error.splitlines()) == 1

  def named():
    with writing("the/row.json"):
      pathlib.Path("/dev/full").write_text("x")

  def wrapped():  # Another library wraps the error.
    try:
      pathlib.Path("/dev/full").write_text("x")
    except OSError as e:
      raise RuntimeError("cannot prepare") from e

  for function, name in ((named, "the/row.json"), (wrapped, "a file")):
    with pytest.raises(SystemExit):
      command.run(function)
    assert f"error: {name} cannot be written" in capsys.readouterr().err
  with pytest.raises(FileNotFoundError):  # Any other error is a fault of ours.
    command.run(pathlib.Path("/not/there").read_text)


def test_a_run_writes_its_files_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(_cache()))
  command = [
    *ON_THE_MESH,
    "--config.train.num_steps=6",
    "--config.eval.every=3",
    "--config.eval.batches_per_domain=1",
    f"--workdir={tmp_path / 'run'}",
  ]
  assert main.main(command) == 0
  run = json.loads((tmp_path / "run" / "run.json").read_text())
  assert run["mesh"] == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
  recipe = run["recipe"]["0, 1"]
  assert recipe["router"]["top_k"] == 2 and recipe["num_experts"] == 4
  assert run["data"]
  assert run["parameters"]["total"] > run["parameters"]["active"]
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["train"]["num_steps"] == 6
  train = run_directory.read_metrics(tmp_path / "run", "train")
  assert [line["step"] for line in train] == [5, 6]
  validation = run_directory.read_metrics(tmp_path / "run", "validation")
  assert [line["step"] for line in validation] == [3, 6]
  documented = _documented_metrics()
  for name in {k for line in train + validation for k in line}:
    assert name.split("/")[0] in documented | {"step", "split"}, name
  before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
  table = capsys.readouterr().out
  assert main.main(command) == 0
  assert capsys.readouterr().out == table
  with pytest.raises(
    ConfigError, match="6 steps, and .*num_steps is now 7, but"
  ):
    main.main([*command, "--config.train.num_steps=7"])
  assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_code_that_the_config_of_a_run_names(tmp_path):
  """It is run only if the command says so."""
  mark, folder = tmp_path / "mark", tmp_path / "plugins"
  (folder / "routers").mkdir(parents=True)
  (folder / "routers" / "top_k.py").write_text(
    f"open({str(mark)!r}, 'w').close()\n"
    "from moe_jax.moe.routers.top_k import build\n"
  )
  values = config_lib.load("configs/tiny.py").to_dict()
  values["plugins"] = [str(folder)]
  path = tmp_path / "config.json"
  path.write_text(json.dumps(values))
  refused = "plugins = .*routers/top_k.py.*give --trust_plugins"
  for command_line in (
    lambda: main.main([f"--config={path}", f"--workdir={folder}"]),
    lambda: params.main([f"--config={path}"]),
    lambda: trained.of_run(str(tmp_path)),
  ):
    with pytest.raises(ConfigError, match=refused):
      command_line()
  for odd in ("text", 3, ["/nothing"]):
    path.write_text(json.dumps(values | {"plugins": odd}))
    with pytest.raises(ConfigError, match="no file is there.*--trust_plugins"):
      config_lib.load(str(path))
  path.write_text(json.dumps(values))
  # Plugins that the user names are trusted.
  own = config_lib.load(str(path), [f"plugins=({str(folder)!r},)"])
  assert own.plugins == (str(folder),)
  assert not mark.exists()
  params.main([f"--config={path}", "--trust_plugins"])
  assert mark.exists()
  with pytest.raises(ConfigError, match="no checkpoint in"):
    trained.of_run(str(tmp_path), trust_plugins=True)


def test_params_counts_by_hand(tmp_path, capsys):
  path = tmp_path / "params.json"
  params.main(["--config=configs/tiny.py", f"--json={path}", "--bytes=f32"])
  found = json.loads(path.read_text())
  d, layers, experts, hidden, vocab, heads = 32, 2, 4, 32, 257, 2
  expert = 3 * d * hidden
  attention = 2 * d * heads * 16 + 2 * d * 1 * 16
  embedding = vocab * d
  rest = layers * (attention + d * experts + 2 * d) + embedding + d
  assert found["total"] == rest + layers * experts * expert
  assert found["active"] == rest + layers * 2 * expert
  assert found["active_without_embedding"] == found["active"] - embedding
  assert found["weights_bytes_f32"] == 4 * found["total"]
  assert found["kv_cache_bytes_per_token_f32"] == 4 * 2 * layers * 16
  assert f"{found['total']:,}" in capsys.readouterr().out


def test_a_variant_and_a_missing_file_are_refused():
  with pytest.raises(ConfigError, match="no variants"):
    config_lib.load("configs/tiny.py:big")
  with pytest.raises(ConfigError, match="configs/tiny.py"):
    config_lib.load("configs/tny.py")


def test_overrides_keep_types_and_replace_whole_sections():
  config = config_lib.load(
    "configs/tiny.py",
    (
      "optim.learning_rate=1",
      "model.moe.router={'name': 'top_k'}",
      "model.moe.router.score=sigmoid",
      "model.moe.tokens_per_group=128",
      "model.moe.capacity_factor=None",
      "model.moe.balancers={'z': {'name': 'z_loss', 'coefficient': 1e-3}}",
    ),
  )
  assert isinstance(config.optim.learning_rate, float)
  assert config.model.moe.tokens_per_group == 128
  assert config.model.moe.capacity_factor is None
  assert config.model.moe.balancers.z.coefficient == 1e-3
  assert config.model.moe.router.score == "sigmoid"


def _cache():
  """The folder of a prepared corpus for all tests of a machine's user."""
  return pathlib.Path(tempfile.gettempdir(), f"moe_jax_tests_{os.getuid()}")


def _documented_metrics():
  """The first column of docs/metrics.md."""
  with open("docs/metrics.md") as f:
    rows = [line.split("|")[1].strip() for line in f if line.startswith("| `")]
  return {row.strip("`").split("/")[0] for row in rows}
