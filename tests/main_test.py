"""Commands: what they refuse, and how they say so."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import pytest

from moe_jax import main, params
from moe_jax.core.errors import ConfigError, naming
from moe_jax.run import config as config_lib
from moe_jax.run import run_directory

# The tests see eight devices.
ON_THE_MESH = ["--config=configs/tiny.py", "--config.mesh=(8,1,1,1)"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["model.moe.num_expert=4"], ["num_expert", "num_experts"]),
    (["modle.d_model=4"], ["modle", "model"]),
    (["seed=-1"], ["seed = -1", "0 to 2147483647"]),
    (["seed=4294967296"], ["seed = 4294967296", "0 to 2147483647"]),
    (["optim.learning_rate=-1.0"], ["optim.learning_rate = -1.0", "0 or more"]),
    (["optim.b2=1.5"], ["optim.b2 = 1.5", "below 1"]),
    (["optim.eps=0.0"], ["optim.eps = 0.0", "above 0"]),
    (["optim.final_fraction=-3.0"], ["optim.final_fraction", "0 and 1"]),
    (["optim.weight_decay=-5.0"], ["optim.weight_decay = -5.0"]),
    (["train.num_steps=ten"], ["train.num_steps", "ten", "int"]),
    (["model.moe=3"], ["model.moe", "section"]),
    (["model.moe.top_k=9"], ["top_k = 9", "num_experts = 4"]),
    (["model.moe.capacity_factor=0.001"], ["capacity_factor = 0.001", "zero"]),
    (["mesh=(1,1,8,1)"], ["num_experts = 4", "expert = 8"]),
    (
      ["mesh=(2,1,4,1)", "model.moe.dispatcher={'name': 'sorted'}"]
      + ["model.moe.expert_buckets=2"],
      ["expert_buckets = 2", "expert = 4", "multiple"],
    ),
    (["mesh=(2,1,1,1)"], ["(2, 1, 1, 1)", "2 devices", "8"]),
    (["mesh=(0,1,1,1)"], ["(0, 1, 1, 1)", ">= 1"]),
    (["mesh=(2.0,2,2,1)"], ["(2.0, 2, 2, 1)", "whole number"]),
    (["mesh=('a',1,1,1)"], ["('a', 1, 1, 1)", "whole number"]),
    (["mesh=(True,1,8,1)"], ["(True, 1, 8, 1)", "whole number"]),
    (["mesh=(1,1,1,8)"], ["num_heads = 2", "tensor = 8"]),
    (["mesh=(-1,3,1,1)"], ["3, 1, 1)", "8"]),
    (["mesh=(-1,-1,1,1)"], ["more than one -1"]),
    (["train={'num_stepz': 3}"], ["num_stepz", "num_steps"]),
    (["eval.every=-1"], ["eval.every = -1"]),
    (["eval.batch_size=3"], ["batch", "3"]),
    (["plugins=('no_such_folder',)"], ["no_such_folder"]),
    (["model.moe.balancers={'loss': 0.01}"], ["0.01", "name"]),
    (["model.moe.router.top_k=1"], ["top_k"]),
    (["model.moe.top_k=1"], ["renormalize"]),
    (["model.moe.tokens_per_group=seqence"], ["seqence", "sequence"]),
    (["model.dtype=bf16"], ["bf16", "bfloat16"]),
    (["model.name=attention"], ["attention"]),
    (["data.dir=/no/such/corpus"], ["/no/such/corpus"]),
    (["data.name=python_source"], ["python_source", "python_sources"]),
    (["model.moe.router={'name': 'topk'}"], ["topk", "top_k"]),
    (
      ["model.moe.router={'name': 'top_k', 'sore': 'sigmoid'}"],
      ["sore", "score"],
    ),
    (
      ["model.moe.router={'name': 'top_k', 'score': 'sigmod'}"],
      ["sigmod", "sigmoid"],
    ),
    (["model.moe.balancers={'a': {'name': 'switch'}}"], ["coefficient"]),
    (["model.moe.capacity_factor=None"], ["sorted", "capacity_factor"]),
    (["model.moe.dispatcher.order=choice"], ["future", "allow_noncausal"]),
    (["model.moe.tokens_per_group=100"], ["100", "64"]),
    (["model.moe.expert_buckets=3"], ["expert_buckets = 3"]),
    (["model.pattern=('sparse',)"], ["sparse"]),
    (["model.num_layers=5", "model.pattern=('dense','moe')"], ["5"]),
    (["model.num_kv_heads=3"], ["num_kv_heads = 3"]),
    (["model.remat=all"], ["remat", "block"]),
    (["optim.name=adam"], ["adam", "adamw"]),
    (["optim.schedule=cosin"], ["cosin", "cosine"]),
    (["optim.warmup_steps=99"], ["warmup_steps = 99"]),
    (["train.accumulation=3"], ["accumulation = 3", "batch_size = 8"]),
    (["train.accumulation=2"], ["micro-batch", "4", "8"]),
    (["train.num_steps=0"], ["num_steps", "0"]),
    (["model.moe.grouped_matmul=refrence"], ["refrence", "reference"]),
    (["model.moe.router.scale=abc"], ["scale", "abc", "float"]),
    (["model.moe.router.renormalize=flase"], ["renormalize", "flase"]),
    (["model.moe.router.num_expert_groups=4.0"], ["4.0", "int"]),
    (["model.moe.router.jitter=-3.0"], ["jitter", "-3.0"]),
    (
      ["model.moe.balancers={'a': {'name': 'switch', 'coefficient': -1.0}}"],
      ["coefficient", "-1.0"],
    ),
    (
      ["model.moe.balancers={'b': {'name': 'bias', 'rate': 1, 'rule': 3}}"],
      ["rule = 3", "str"],
    ),
    (["model.moe.balancers.a.name=switch"], ["whole section", "balancers={"]),
    (["data.batch_size=0"], ["data.batch_size = 0"]),
    (["data.seq_len=0"], ["data.seq_len = 0"]),
    (["model.moe.num_shared_experts=-1"], ["num_shared_experts = -1"]),
    (["model.moe.capacity_factor=1e999"], ["capacity_factor = inf"]),
    (["model.dtype=float64"], ["float64", "JAX_ENABLE_X64"]),
    (["optim.clip_norm=0.0"], ["clip_norm", "None"]),
    (["model.name=mlp"], ["mlp", "transformer"]),
    (["writers=('tensorbord',)"], ["tensorbord", "tensorboard"]),
    (["train.profile_steps=(5,5)"], ["profile_steps = (5, 5)"]),
    (["train.profile_steps=(5,)"], ["profile_steps = (5,)"]),
    (["checkpoint.keep_last=0"], ["keep_last = 0"]),
    (["checkpoint.every=-1"], ["checkpoint.every = -1"]),
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_compiles_exits_with_75(number):
  """XLA's threads are at work then, which an ordinary exit does not stop."""
  slow = """
import os, signal, threading, jax
from moe_jax import config
signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
  stop = lambda: os.kill(os.getpid(), signal.NUMBER)
  threading.Timer(1.5, stop).start()
  def deep(x):
    for i in range(4000):
      x = jax.numpy.sin(x) + i
    return x
  while True:
    jax.clear_caches()
    jax.jit(deep)(1.0)

config.run(main)
"""
  done = subprocess.run(
    [sys.executable, "-c", slow.replace("NUMBER", number.name)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 75, done.stderr
  assert done.stderr == "stopped by a signal; the same command goes on\n"


def test_its_handler_does_not_stay():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit):
    config_lib.run(lambda: 0)
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_disk_is_one_sentence_wherever_it_is_met(capsys):
  with pytest.raises(SystemExit) as e:
    config_lib.run(lambda: pathlib.Path("/dev/full").write_text("x"))
  assert e.value.code == 2
  error = capsys.readouterr().err
  assert "No space left on device" in error and "free space" in error
  assert "a file" in error
  assert len(error.splitlines()) == 1

  def named():
    with naming("the/row.json"):
      pathlib.Path("/dev/full").write_text("x")

  with pytest.raises(SystemExit):
    config_lib.run(named)
  assert "error: the/row.json cannot be written" in capsys.readouterr().err
  with pytest.raises(FileNotFoundError):  # Any other error is a fault of ours.
    config_lib.run(pathlib.Path("/not/there").read_text)


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
  assert run["recipe"]["top_k"] == 2 and run["data"]
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
  with pytest.raises(ConfigError, match="num_steps = 6, and now it is 7"):
    main.main([*command, "--config.train.num_steps=7"])
  assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_config_that_a_run_left_is_a_config(tmp_path):
  """Tuples, sections and options of parts as they were."""
  c = config_lib.load(
    "configs/tiny.py",
    [
      "model.prefix=('dense',)",
      "model.num_layers=3",
      "model.moe.balancers={'a': {'name': 'bias', 'rate': 0.5}}",
      "data.dir=somewhere",
    ],
  )
  path = tmp_path / "config.json"
  path.write_text(config_lib.to_json(c))
  again = config_lib.load(str(path))
  assert again.to_dict() == c.to_dict()
  again = config_lib.load(
    str(path), ["eval.every=5", "model.moe.balancers.a.rule=proportional"]
  )
  assert again.eval.every == 5
  assert again.model.moe.balancers.a.rule == "proportional"
  with pytest.raises(ConfigError, match='did you mean "every"'):
    config_lib.load(str(path), ["eval.evry=5"])
  again = config_lib.load(str(path), ["model.moe.tokens_per_group=128"])
  assert again.model.moe.tokens_per_group == 128
  for text in ("{", "[]", '{"a": 1}', '{"model": {"moe": {}}}'):
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not the config.json of a run"):
      config_lib.load(str(path))
  with pytest.raises(ConfigError, match="there is no config file"):
    config_lib.load(str(tmp_path / "none.json"))
  with pytest.raises(ConfigError, match="neither a Python file"):
    config_lib.load("README.md")


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
  """One prepared corpus for all tests of a machine's user."""
  return pathlib.Path(tempfile.gettempdir(), f"moe_jax_tests_{os.getuid()}")


def _documented_metrics():
  """The first column of docs/metrics.md."""
  with open("docs/metrics.md") as f:
    rows = [line.split("|")[1].strip() for line in f if line.startswith("| `")]
  return {row.strip("`").split("/")[0] for row in rows}


def test_show_sharding(capsys, tmp_path):
  """Of the right arrays the right parts; and nothing runs."""
  flags = [*ON_THE_MESH, "--config.mesh=(1,2,2,2)", "--show-sharding"]
  flags += ["--config.model.num_kv_heads=2", f"--workdir={tmp_path / 'run'}"]
  assert main.main(flags) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("mesh: data 1, fsdp 2, expert 2, tensor 2; 8 dev")
  cells = {line.split()[0]: line.split()[1:] for line in lines[3:]}
  gate = cells["decoder/0/moe/experts/gate"]
  assert gate[:4] == ["2x4x32x32", "expert", "fsdp", "tensor"]
  assert gate[4:] == ["2x2x16x16", "4,096", "32,768"]
  assert cells["decoder/0/moe/router/kernel"][1] == "fsdp"
  own, whole = (int(x.replace(",", "")) for x in cells["parameters"])
  held = [int(c[-2].replace(",", "")) for n, c in cells.items() if "/" in n]
  assert sum(held) < own < whole
  # AdamW has two numbers for every parameter, and counts its steps.
  moments = int(cells["optimizer"][0].replace(",", ""))
  assert 0 <= moments - 2 * own <= 16
  assert 0 <= moments - 2 * own <= 16
  assert not (tmp_path / "run").exists()
  for bad in (0, 3):
    with pytest.raises(ConfigError, match=f"train.accumulation = {bad} does"):
      main.main([*flags, f"--config.train.accumulation={bad}"])
