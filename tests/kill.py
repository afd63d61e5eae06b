"""Kills a run at random moments: does it write what a run left alone writes?

  python -m tests.kill --kills=12

One run is left alone. The same command in another folder is killed (SIGKILL)
again and again and given again, until it ends; a third is asked to stop
(SIGTERM). The lines of metrics.jsonl, timings apart, and the bytes of the final
parameters must be equal. The last line is "N passed, M failed".
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 60
# This config draws noise, keeps state and cuts lines at odd steps.
OPTIONS = (
  "--config=configs/tiny.py",
  f"--config.train.num_steps={STEPS}",
  "--config.train.log_every=5",
  "--config.train.accumulation=2",
  "--config.checkpoint.every=7",
  "--config.eval.every=16",
  "--config.eval.batches_per_domain=1",
  "--config.model.moe.router={'name': 'top_k', 'noise': 0.1}",
  "--config.model.moe.balancers={'b': {'name': 'bias', 'rate': 1e-2}}",
)
TIMINGS = {"tokens_per_second"}


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=12, help="SIGKILLs")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as work:
    failed = run(pathlib.Path(work), args.kills, args.seed)
  for line in failed:
    print(line)
  print(f"{2 - len(failed)} passed, {len(failed)} failed")
  return 1 if failed else 0


def run(work: pathlib.Path, kills: int, seed: int = 0) -> list[str]:
  """The three runs; what differs, one sentence for each run that does."""
  rng = random.Random(seed)
  finish(work, "alone")
  # Some kills hit the start, some the steps, some the end.
  moments = sorted(rng.randrange(STEPS) for _ in range(kills))
  for moment in moments:
    process = start(work, "killed")
    wait_for(work / "killed", moment, process)
    time.sleep(rng.random() * 0.3)
    process.kill()
    code = process.wait()
    print(f"killed near step {moment}: exit code {code}", flush=True)
    assert code in (0, -signal.SIGKILL), code
  finish(work, "killed")
  process = start(work, "stopped")
  wait_for(work / "stopped", STEPS // 3, process)
  process.send_signal(signal.SIGTERM)
  code = process.wait()
  print(f"asked to stop near step {STEPS // 3}: exit code {code}", flush=True)
  assert code == 75, code
  finish(work, "stopped")
  found = (
    difference(work / "alone", work / name) for name in ("killed", "stopped")
  )
  return [f for f in found if f]


def finish(work, name):
  """Lets it run to its end."""
  code = start(work, name).wait()
  assert code == 0, (code, (work / f"{name}.log").read_text()[-2000:])


def start(work, name):
  """The command, given (again)."""
  env = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  command = (sys.executable, "-m", "moe_jax.main", *OPTIONS)
  with (work / f"{name}.log").open("a") as log:
    return subprocess.Popen(
      [*command, f"--workdir={work / name}"],
      cwd=ROOT,
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=log,
    )


def wait_for(folder, step, process):
  """Returns when a training line of that step or a later one is there."""
  while process.poll() is None:
    try:
      text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
      text = ""
    steps = [json.loads(x)["step"] for x in text.split("\n")[:-1]]
    if max(steps, default=-1) >= step - 5 or (step < 5 and folder.exists()):
      return
    time.sleep(0.02)


def difference(one, other) -> str | None:
  """The first thing in which two finished runs differ."""
  from moe_jax.training import checkpoint

  for here, there in zip(lines(one), lines(other)):
    if here != there:
      return f"{other.name}: {there} is not {here}"
  if len(lines(one)) != len(lines(other)):
    return f"{other.name} has {len(lines(other))} lines, not {len(lines(one))}"
  here, there = (flat(checkpoint.load_params(x)) for x in (one, other))
  if here.keys() != there.keys():
    return f"{other.name}: other parameters"
  for name, value in here.items():
    if value.tobytes() != there[name].tobytes():
      worst = np.abs(value - there[name]).max()
      return f"{other.name}: {name} differs by up to {worst}"
  return None


def lines(folder):
  """metrics.jsonl without timings."""
  text = (folder / "metrics.jsonl").read_text()
  found = [json.loads(line) for line in text.splitlines()]
  return [{k: v for k, v in x.items() if k not in TIMINGS} for x in found]


def flat(tree, prefix=""):
  """{path: array}."""
  out = {}
  for key, value in tree.items():
    path = f"{prefix}/{key}"
    out |= flat(value, path) if isinstance(value, dict) else {path: value}
  return out


if __name__ == "__main__":
  sys.exit(main())
