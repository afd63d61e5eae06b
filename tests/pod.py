"""Trains in several processes: the same run, however many there are?

  python -m tests.pod

A run of one process is the measure. The same one in several processes, on as
many devices in all; then one that is stopped by a SIGTERM to one of them, and
goes on in one, two and four processes of one device each. All metrics must
agree within 1e-4, or 1e-4 of their size, batches exactly. The last line is
"N passed, M failed".
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile

from moe_jax.launch import local
from moe_jax.run import command
from moe_jax.run import config as config_lib
from tests import kill

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 4  # Devices in all, of every run that is not stopped.
OPTIONS = (
  "--config=configs/tiny.py",
  "--config.train.log_every=1",
  "--config.train.accumulation=2",
  "--config.eval.batches_per_domain=1",
  "--config.model.moe.router={'name': 'top_k', 'noise': 0.1}",
  "--config.model.moe.balancers={'b': {'name': 'bias', 'rate': 1e-2}}",
)
NEAR = 1e-4  # Absolute for metrics up to 1, losses in nats; relative above.
TIMING = "tokens_per_second"


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--steps", type=config_lib.at_least_1, default=60)
  add("--digest", type=pathlib.Path, help=argparse.SUPPRESS)
  args, overrides = config_lib.parse_overrides(parser, argv)
  if args.digest:  # A process of `Pods.batches`.
    _write_digest(args.digest, config_lib.load("configs/tiny.py", overrides))
    return 0
  with tempfile.TemporaryDirectory() as work:
    found = run(Pods(pathlib.Path(work), args.steps), (2, 4), (1, 2, 4))
  failed = sum(not good for good in found)
  print(f"{len(found) - failed} passed, {failed} failed")
  return 1 if failed else 0


def run(pods, sizes, then) -> list[bool]:
  """All of it, told line by line.

  Args:
    pods: Pods.
    sizes: numbers of processes to begin with.
    then: numbers of processes to go on with.

  Returns:
    Whether each check passed.
  """
  found = []

  def tell(what, good, measured):
    found.append(good)
    word = "passed" if good else "FAILED"
    print(f"{word}: {what}: {measured}", flush=True)

  pods.finish("alone", 1, DEVICES)
  digests = [pods.batches(size) for size in (1, *sizes)]
  tell("the same batches", len(set(digests)) == 1, digests[0])
  for size in sizes:
    devices = DEVICES // size
    pods.finish(f"{size}", size, devices)
    tell(f"{size} processes", *pods.compare(f"{size}"))
    stopped = f"{size}-stopped"
    tell(f"SIGTERM to one of {size}", *pods.stop(stopped, size, devices))
    for more in then:
      name = f"{size}-then-{more}"
      shutil.copytree(pods.work / stopped, pods.work / name)
      pods.finish(name, more, 1)
      tell(f"{size} processes, then {more}", *pods.compare(name))
  return found


class Pods:
  """Runs of one config in one folder, each in some number of processes."""

  def __init__(self, work: pathlib.Path, steps: int, options: tuple = ()):
    self.work, self.steps = work, steps
    self.options = *OPTIONS, *options

  def start(self, name: str, size: int, devices: int, module=(), more=()):
    """The processes of a run; what they say goes to NAME.log."""
    compiled = str(self.work / "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    shape = (2, 1, 2, 1) if size * devices == DEVICES else (1, 1, -1, 1)
    flags = (
      *(
        module
        or ("moe_jax.main", self.options[0], f"--workdir={self.work / name}")
      ),
      *self.options[1:],
      f"--config.train.num_steps={self.steps}",
      f"--config.mesh={shape}",
      *more,
    )
    with (self.work / f"{name}.log").open("a") as log:
      return local.start(
        [sys.executable, "-m", *flags], size, devices, cwd=ROOT, stdout=log
      )

  def finish(self, *args, **kwargs) -> None:
    """Runs it to its end."""
    code = local.wait(self.start(*args, **kwargs))
    log = self.work / f"{args[0]}.log"
    assert code == 0, (code, log.read_text()[-3000:])

  def stop(self, name: str, size: int, devices: int) -> tuple[bool, str]:
    """Asks the last process to stop: did all of them, at one saved step?"""
    started = self.start(name, size, devices)
    kill.wait_for(self.work / name, self.steps // 5 + 5, started[0])
    started[-1].send_signal(signal.SIGTERM)
    local.wait(started)
    from moe_jax.run import run_directory

    codes = [process.returncode for process in started]
    log = (self.work / f"{name}.log").read_text()
    assert (self.work / name / "metrics.jsonl").exists(), (codes, log[-3000:])
    folder = self.work / name / "checkpoints"
    saved = [int(f.name) for f in folder.glob("*") if f.name.isdigit()]
    lines = run_directory.read_metrics(self.work / name, "train")
    last = max((line["step"] for line in lines), default=0)
    good = set(codes) == {75} and saved == [last] and last < self.steps
    return good, f"exit codes {codes}, saved {saved}, last line {last}"

  def compare(self, name: str) -> tuple[bool, str]:
    """All metrics of a finished run beside those of one process."""
    from moe_jax.run import run_directory

    far = {}
    for split in ("train", "validation"):
      one, other = (
        run_directory.read_metrics(self.work / folder, split)
        for folder in ("alone", name)
      )
      if [x["step"] for x in one] != [x["step"] for x in other]:
        return False, f"{len(other)} lines of {split}, not {len(one)}"
      for x, y in zip(one, other):
        if x.keys() != y.keys():
          return False, f"other metrics: {sorted(x.keys() ^ y.keys())}"
        for key in x.keys() - {"split", TIMING}:
          off = abs(x[key] - y[key]) / max(1.0, abs(x[key]))
          far[key] = max(off, far.get(key, 0.0))
    worst = max(far, key=far.get)
    measured = f"{len(far)} metrics; loss differs by up to {far['loss']:.1e}"
    measured += f", {worst} most, by {far[worst]:.1e}"
    return far[worst] <= NEAR, measured

  def batches(self, size: int) -> str:
    """Digest of the batches that so many processes put together."""
    name = f"batches-{size}"
    path = self.work / f"{name}.txt"
    module = ("tests.pod", f"--digest={path}")
    self.finish(name, size, DEVICES // size, module)
    return path.read_text()


def _write_digest(path, config, steps=8):
  """Writes a digest of the first batches and of the validation split."""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  from moe_jax.run import processes
  from moe_jax.training import program

  processes.join()
  made = program.Program(config)
  stream, digest = made.batches(config.seed), hashlib.sha256()
  own = 0
  for step in range(steps):
    batch = stream[step]
    own = batch["inputs"].shape[1]
    whole = multihost_utils.process_allgather(made.put(batch), tiled=True)
    for name in ("inputs", "targets", "mask"):
      digest.update(np.ascontiguousarray(whole[name]).tobytes())
  rows = config.data.batch_size // config.train.accumulation
  assert own == rows // jax.process_count(), "a process reads its rows only"
  if processes.is_first():
    path.write_text(digest.hexdigest())


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
