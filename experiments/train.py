"""Trains the runs of a launch that are open, on all processes together."""

import contextlib
import sys
import time

import jax

from experiments import plan, runs, sweeps
from moe_jax.core.errors import (
  ConfigError,
  Diverged,
  Interrupted,
  InUse,
  RunError,
)
from moe_jax.core.progress import Progress
from moe_jax.run import processes, provenance, run_directory, wording
from moe_jax.training import loop, train_step
from moe_jax.training import program as programs
from moe_jax.training.starts import fit, upcycling


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
  meshes = _check(launch)
  processes.by_first(print, launch.summary, flush=True)
  if not launch.open:
    return
  _tell_devices(meshes)
  steps = sum(run.config.train.num_steps for run in launch.open)
  left, started = list(launch.open), time.monotonic()
  every = {run.folder for run in (*launch.runs, *launch.open)}
  try:
    with contextlib.closing(Progress(steps, "steps")) as progress:
      trained, compiling = _train_all(left, launch, progress, deadline)
  except Interrupted as e:
    raise Interrupted(
      f"{e}; {len(left)} of {len(every)} runs are left, {left[0].name} first, and"
      " --report shows the finished ones"
    ) from None
  others = len(launch.open) - trained
  text = (
    f"{trained} runs took {time.monotonic() - started:.0f} s,"
    f" {compiling:.0f} s of them compiling."
  )
  words = "are left to another launch, or lack what they start from"
  text += f" {others} {words}." * (others > 0)
  processes.by_first(print, text, flush=True)


def dry_run(launch: plan.Launch) -> None:
  """Does all but compile and train: checks every arm, and prints its size.

  Args:
    launch: the runs.

  Raises:
    ConfigError: an arm that cannot run.
  """
  meshes = _check(launch)
  processes.by_first(print, launch.summary, flush=True)
  _tell_devices(meshes)

  def count(name, config):
    facts = _traced(config)
    sizes, tokens = facts["parameters"], facts["tokens_per_step"]
    text = (
      f"{name}: {sizes['total']:,} parameters, {sizes['active']:,} active for a"
      f" token; {config.train.num_steps:,} steps of {tokens:,} tokens"
    )
    processes.by_first(print, text, flush=True)

  _of_each(launch, count)
  processes.by_first(
    print, "All arms can run; nothing was trained (--dry_run)."
  )


def _tell_devices(meshes):
  """Prints each mesh of several devices."""
  kinds = [device.device_kind for device in jax.devices()]
  for mesh in dict.fromkeys(filter(None, meshes)):
    words = wording.devices({"devices": kinds, "mesh": dict(mesh.shape)})
    processes.by_first(print, f"  devices: {words}", flush=True)


def _traced(config):
  """The facts of `provenance.of_model` about a config, whose steps are traced."""
  mesh, task, model = programs.build(config)
  task.train(0, None)  # Refuses too little data.
  task.validation(None)
  numbers = train_step.numbers(config, model)
  made = programs.functions(config, mesh, task, model, numbers)
  for call in (made.init, made.train_step, made.eval_step):
    call.function.lower(*call.arguments)
  return provenance.of_model(config, mesh, task, model, made.sizes)


def _check(launch):
  """The mesh of each arm, or None for one device.

  Raises:
    ConfigError: an arm that cannot run, or that processes differ in.
  """

  def mesh_of(name, config):
    del name
    return programs.build(config, prepare=False)[0]

  meshes = _of_each(launch, mesh_of)
  for run in {run.folder.parent: run for run in launch.open}.values():
    if run.start and run.config.upcycle:
      _check_start(run)
  for config in launch.configs.values():
    processes.check_same(provenance.of_process(launch.workdir, config))
  return meshes


def _of_each(launch, do):
  """Returns do(name, config) of each arm.

  Where some fail, all are tried, and the error of the first is raised: it says
  which ones can run.
  """
  results, failed = [], {}
  for name, config in launch.configs.items():
    try:
      results.append(do(name, config))
    except Exception as e:
      failed[name] = e
  for name, error in failed.items():
    with _named(name, launch, failed):
      raise error
  return results


@contextlib.contextmanager
def _named(name, launch, failed=None):
  """Errors that are raised inside name the arm, and how to run the others.

  Args:
    name, launch: of the arm.
    failed: {name: error} of all arms that cannot run; None: only this one.
  """
  failed = failed or {name: None}
  bad, arms = {failing.partition(" ")[0] for failing in failed}, {}
  for run in launch.runs:
    if not bad & {run.arm, run.start and run.start.arm}:
      arms[f"--arm={run.arm}"] = None
  remedy = f" To run the others, give {' '.join(arms)}" if arms else ""
  if len(failed) > 1 and not arms:
    texts = {str(error) for error in failed.values()}
    remedy = " No other arm can run" * (len(texts) > 1)
    remedy = remedy or " This holds for all arms"
  try:
    yield
  except (ConfigError, RunError) as e:
    sentence = f"arm {name}: {e}"
    raise type(e)(f"{sentence}.{remedy}" if remedy else sentence) from None
  except Exception as e:
    e.add_note(f"This happened in the arm {name}.{remedy}")
    raise


def _check_start(run):
  """Raises ConfigError for a model that cannot be made of that of its start."""
  source, target = (
    programs.build(one.config, prepare=False)[-1] for one in (run.start, run)
  )
  try:
    fit.check(source, target, upcycling.Upcycling(**run.config.upcycle))
  except ConfigError as e:
    raise ConfigError(
      f"arm {run.arm} cannot start from {run.start.arm}: {e}"
    ) from None


def _train_all(left, launch, progress, deadline):
  """(number of runs trained here, seconds of compiling).

  Takes out of `left` what is done, so that the rest is known where it stops.
  """
  trained, compiling, digest, compiled = 0, 0.0, None, {}
  together = [*launch.runs, *launch.open]
  while left:
    run = left[0]
    if deadline and processes.by_first(lambda: time.monotonic() >= deadline):
      raise Interrupted("stopped between two runs; the same command goes on")
    finished, data = processes.by_first(run.begun, together)
    if not finished and run.config_digest != digest:
      progress.set_postfix_str(f"{run.name}: compiling")
      begun = time.monotonic()
      with _named(run.name.partition(" seed ")[0], launch):
        program = programs.Program(run.config, data, compiled)
      digest = run.config_digest
      compiling += program.compile_seconds
      others = {later.config_digest for later in left} - {digest}
      progress.pause(time.monotonic() - begun, to_come=len(others))
    progress.about = f"{run.name}: "
    if not finished and _train_one(run, program, progress, deadline):
      trained += 1
    else:
      progress.skip(run.config.train.num_steps)
    left.pop(0)
  return trained, compiling


def _train_one(run, program, progress, deadline) -> bool:
  """Trains a run to its end; False if another launch has it, or what it starts from."""
  config = sweeps.apply(run.config, {"seed": run.seed})
  start = config.init_from
  if run.start is not None:
    row = processes.by_first(run.start.row)
    if row is None or runs.DIVERGED in row:
      why = (
        "diverged" if row else "is not finished; give the command again later"
      )
      text = f"{run.name} is left out: {run.start.name}, its start, {why}"
      processes.by_first(print, text, file=sys.stderr, flush=True)
      return False
    start = str(run.start.folder)
  try:
    with run_directory.RunDirectory(run.folder, config) as directory:
      try:
        validation = loop.run(
          program, run.seed, directory, progress, deadline, start
        )
      except Diverged as e:  # A diverged run is a result too.
        validation = None
        text = f"{run.name}: {e}"
        processes.by_first(print, text, file=sys.stderr, flush=True)
      processes.by_first(run.finish, validation)
      processes.check_shared(run.folder / "row.json")  # Tuning depends on it.
  except InUse:
    return False
  return True
