"""Trains the runs of a launch that are open, on all processes together."""

import contextlib
import sys
import time

from experiments import plan, sweeps
from moe_jax.core.errors import ConfigError, Diverged, Interrupted, InUse
from moe_jax.run import processes, provenance, run_directory
from moe_jax.run.progress import Progress
from moe_jax.training import loop
from moe_jax.training import program as programs


def train(launch: plan.Launch, deadline: float | None = None) -> None:
  """Trains arm by arm, all seeds of an arm with one program.

  Args:
    launch: the runs. One that another launch is running, or has run meanwhile,
      is left to it.
    deadline: time.monotonic() at which to stop. The first process decides.

  Raises:
    ConfigError: an arm that cannot run, before any of them does.
    Interrupted: a signal or the deadline stopped it; says what is left.
  """
  for config in _check(launch):
    processes.check_same(provenance.of_process(launch.workdir, config))
  first = processes.is_first()
  if first:
    print(launch.summary, flush=True)
  steps = sum(run.config.train.num_steps for run in launch.open)
  progress = Progress(steps, "steps", shown=first)
  left, started = list(launch.open), time.monotonic()
  try:
    with contextlib.closing(progress):
      trained, compiling = _train_all(left, launch, progress, deadline)
  except Interrupted as e:
    raise Interrupted(
      f"{e}; {len(left)} of {len(launch.runs)} runs are left, {left[0].name}"
      " first, and --report shows the finished ones"
    ) from None
  if first and launch.open:
    others = len(launch.open) - trained
    print(
      f"{trained} runs took {time.monotonic() - started:.0f} s,"
      f" {compiling:.0f} s of them compiling."
      + f" {others} are another launch's."
      * (others > 0),
      flush=True,
    )


def _train_all(left, launch, progress, deadline):
  """(number of runs trained here, seconds of compiling).

  Takes out of `left` what is done, so that the rest is known where it stops.
  """
  trained, compiling, digest, compiled = 0, 0.0, None, {}
  while left:
    run = left[0]
    data = processes.by_first(lambda run=run: _look(run, launch, deadline))
    if data is not None and run.config_digest != digest:
      progress.update(0, f"{run.name}: compiling")
      program = programs.Program(run.config, *data, compiled)
      digest = run.config_digest
      compiling += program.compile_seconds
    if data is not None and _train_one(run, program, progress, deadline):
      trained += 1
    else:
      progress.skip(run.config.train.num_steps)
    left.pop(0)
  return trained, compiling


def _look(run, launch, deadline) -> list | None:
  """[the fingerprint of the data to train on, or None]; None if it is finished.

  Raises:
    Interrupted: the time is up.
  """
  if run.row() is not None:
    return None
  if deadline is not None and time.monotonic() >= deadline:
    raise Interrupted("stopped between two runs; the same command goes on")
  return [launch.fingerprint(run)]


def _train_one(run, program, progress, deadline) -> bool:
  """Trains a run to its end; False if another launch has it."""
  config = sweeps.apply(run.config, {"seed": run.seed})
  named = _Named(progress, run.name)
  try:
    with run_directory.RunDirectory(run.folder, config) as directory:
      try:
        validation = loop.run(program, run.seed, directory, named, deadline)
      except Diverged as e:  # A diverged run is a result too.
        validation = None
        if processes.is_first():
          print(f"{run.name}: {e}", file=sys.stderr, flush=True)
      processes.by_first(lambda: run.finish(validation))
      processes.check_shared(run.folder / "row.json")  # Tuning depends on it.
  except InUse:
    return False
  return True


class _Named:
  """Says in the shared progress line which run it is."""

  def __init__(self, progress, name):
    self._progress, self._name = progress, name
    self.skip = progress.skip

  def update(self, n: int, note: str = "") -> None:
    self._progress.update(n, f"{self._name}: {note}")


def _check(launch):
  """The configs of a launch, once it is clear that all of them can run."""
  configs = {run.arm_and_tried: run.config for run in launch.runs}
  for name, config in configs.items():
    try:
      programs.check(config)
      programs.build(config, prepare=False)
    except ConfigError as e:
      raise ConfigError(
        f"arm {name}: {e}. To run the others without it, give --arm=NAME for"
        " each of them"
      ) from None
  return configs.values()
