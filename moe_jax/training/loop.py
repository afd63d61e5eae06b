"""The training loop: one seed, from its first step or newest checkpoint.

A run that was stopped at any moment and a run that never was write the same
lines and end with the same parameters. For that, all numbers that a line is
made of are in the train state, or depend on the step alone, or are saved with
the checkpoint (the sums of a line that has not been written yet).
"""

import contextlib
import sys
import time
from collections.abc import Sequence

import jax

from moe_jax.core.errors import ConfigError, Diverged, Interrupted
from moe_jax.core.progress import Progress
from moe_jax.moe.types import Mean
from moe_jax.run import (
  processes,
  provenance,
  run_directory,
  signals,
  summary,
)
from moe_jax.training import hooks, metrics, starts
from moe_jax.training.checkpoint import Checkpoints, newest_first
from moe_jax.training.optimizers import schedules
from moe_jax.training.program import Program
from moe_jax.training.starts import extension

# Seconds without a progress line, so that a resumed run shows no step 0.
_DELAY = 0.01


def train_and_evaluate(config, workdir) -> dict[str, float]:
  """Runs a config: builds, trains, evaluates, writes the run's files.

  Args:
    config: see `configs/base.py`.
    workdir: the run's folder. A run that it holds goes on, to more steps if the
      config has more; if it is finished, it is only read.

  Returns:
    The final metrics of the validation split.

  Raises:
    ConfigError: impossible values, a folder that holds another run, or
      processes of other configs or code.
    RunError: it cannot go on.
    Interrupted: a signal stopped it.
  """
  processes.check_same(provenance.of_process(workdir, config))
  opened = run_directory.RunDirectory(workdir, config, extension.extend)
  with opened as directory:
    finished = directory.logged(config.train.num_steps, "validation")
    if finished is not None:
      return finished
    program, given = _prepared(config, directory)
    progress = Progress(config.train.num_steps, "steps", delay=_DELAY)
    options = {"start": config.init_from, "given": given}
    with contextlib.closing(progress):
      return run(program, config.seed, directory, progress, **options)


def _prepared(config, directory):
  """The Program of a run, and a list of the weights that it starts with, if any.

  The first process tells the user of it before it compiles.
  """
  given = []

  def tell(text, end="\n"):
    if processes.is_first():
      print(text, end=end, file=sys.stderr, flush=True)

  def before(program, facts):
    # Weights may be refused, for which nobody should wait.
    if is_new and config.init_from is not None:
      given.append(starts.read(config.init_from, program.model, config))
    devices = {"devices": [d.device_kind for d in jax.devices()]}
    tell(summary.begin(config, facts | devices, directory.path))
    tell("compiling ...", end=" ")

  is_new = "data" not in directory.facts
  if is_new:
    starts.check(config.init_from)
  program = Program(config, directory.facts.get("data"), before=before)
  same = (
    ", and the mesh computes what one device does" if program.mesh_check else ""
  )
  tell(f"compiled in {program.compile_seconds:.0f} s{same}")
  return program, given


def run(
  program: Program,
  seed: int,
  directory,
  progress,
  deadline: float | None = None,
  start: str | None = None,
  given: Sequence = (),
) -> dict[str, float]:
  """Trains one seed, from its newest checkpoint on; returns the last metrics.

  Args:
    program: compiled functions; shared by all seeds.
    seed: of the parameters, the data's order and the router's noise.
    directory: RunDirectory to write to.
    progress: Progress, told of every step.
    deadline: time.monotonic() at which to stop as at a signal; None: never.
    start: of the first weights, as init_from in a config; None: random ones.
    given: a list of what `starts.read` returned, emptied here; else it is read.

  Raises:
    ConfigError, RunError, Interrupted: as in `train_and_evaluate`.
  """
  options, train = program.config.checkpoint, program.config.train
  checkpoints = Checkpoints(
    directory.path / "checkpoints",
    keep_last=options.keep_last,
    keep_every=options.keep_every,
  )
  with (
    contextlib.closing(checkpoints),
    contextlib.ExitStack() as profile,
    signals.Stop(deadline) as stop,
  ):
    places = directory, checkpoints, progress
    state, step, lines = _begin(program, seed, start, given, *places)
    stream = program.batches(seed)
    made = hooks.of_run(program, directory)
    while True:
      if step in train.profile_steps:
        jax.block_until_ready(state)
        profile.close()  # Does nothing before the profile has begun.
      if step in train.profile_steps[:1]:
        profile.enter_context(jax.profiler.trace(directory.path / "profile"))
      if step == train.num_steps:
        checkpoints.wait()  # Parameters are there before the last line is.
      final = _evaluate(program, state, step, lines, directory, stop)
      if stop.asked():
        lines.write()
        lines.save(checkpoints, step, state)
        checkpoints.wait()
        raise Interrupted(
          f"stopped after step {step} and saved in {directory.path}; the same"
          " command goes on"
        )
      if step == train.num_steps:
        return final
      state = take_step(program, state, stream, step, lines, checkpoints, made)
      step += 1


def _begin(program, seed, start, given, directory, checkpoints, progress):
  """(state, step, lines) of a new run, or of its newest checkpoint."""
  processes.check_same({"the data's fingerprint": program.task.fingerprint})
  restored = checkpoints.restore(program.abstract_state)
  last = program.config.train.num_steps
  facts = program.facts() | {"seed": seed, "num_steps": last}
  if restored is None:
    of_run = program.model, program.config
    # Before the run compiles or writes: the weights may be refused.
    if start is not None:
      # Nobody else holds on to them, as they may fill the memory.
      weights = given.pop() if given else starts.read(start, *of_run)
    state = program.init(jax.random.key(seed))
    if start is not None:
      state = starts.replaced(state, weights, *of_run, start, seed)
      facts["init_from"] = starts.place(start)
    directory.start_over(**facts)
    return state, 0, Lines(program, directory, progress)
  known = restored.meta["data"]
  if known != program.task.fingerprint:
    raise ConfigError(
      f"the checkpoint {checkpoints.folder / str(restored.step)} was trained on"
      f" data with fingerprint {known[:12]}…, but {program.task.name} now has"
      f" {program.task.fingerprint[:12]}…; bring that data back (run.json has"
      " the versions it was made from), or choose another --workdir"
    )
  directory.go_on(restored.step, restored.meta["lines"], **facts)
  progress.skip(restored.step)
  lines = Lines(
    program, directory, progress, restored.step, restored.meta["line"]
  )
  return restored.state, restored.step, lines


def _evaluate(program, state, step, lines, directory, stop):
  """Metrics of the validation split, or None if this step has none.

  It is also None if a stop is asked for meanwhile; the next process then makes
  them.
  """
  last, every = program.config.train.num_steps, program.config.eval.every
  if step != last and not (step and every and step % every == 0):
    return None
  lines.write()
  values = directory.logged(step, "validation")
  if values is None:
    values = program.evaluate(state, stop.asked)
    if values is not None:
      directory.log(step, "validation", values)
  return values


def take_step(program, state, stream, step, lines, checkpoints, made=()):
  """Trains for a step; calls hooks and saves, when the step is due for it.

  A line is written while the devices compute the step after it.

  Args:
    program: compiled functions.
    state: TrainState before the step.
    stream: batches by step.
    step: number of the step, from 0.
    lines: Lines that the metrics go to.
    checkpoints: where a state is saved every `checkpoint.every` steps.
    made: hooks, from `hooks.build`.

  Returns:
    TrainState after the step.
  """
  every, last = program.config.checkpoint.every, program.config.train.num_steps
  batch = stream[step]
  state, sums = program.train_step(state, program.put(batch))
  lines.write()  # The devices are busy with the step meanwhile.
  done = step + 1
  routing = sums.pop("routing", None)
  lines.add(done, sums)
  if due := [hook for period, hook in made if done % period == 0]:
    told = metrics.for_hooks(jax.device_get(sums), program)
    if routing is not None:
      told |= {"routing": jax.device_get(routing), "batch": batch}
    for hook in due:
      hook(state, done, told)
  if done == last or (every and done % every == 0):
    lines.write()
    lines.save(checkpoints, done, state)
  return state


def _passes(before: int, step: int, every: int) -> bool:
  """Whether a multiple of `every`, which may be 0, lies in (before, step]."""
  return every > 0 and step // every > before // every


class Lines:
  """Writes the training lines of metrics.jsonl.

  Each line has means over the steps since the line before: the sum of all their
  totals over the sum of all their weights, not a mean of the steps' means.
  """

  def __init__(self, program: Program, directory, progress, step=0, begun=None):
    """Starts after a step.

    Args:
      program: of the run.
      directory: RunDirectory to write to.
      progress: Progress, told of every step.
      step: number of steps done, 0 in a new run.
      begun: {metric: (total, weight)}, the sums for the next line in the
        checkpoint that the run goes on from.
    """
    self._program, self._directory = program, directory
    self._progress = progress
    config = program.config
    numbers = schedules.numbers(config.optim, config.train.num_steps)
    self._rate = schedules.rate(numbers)
    self._waiting = []  # (step, sums on the devices) not added up yet.
    self._skipped = 0
    self._loads = {}  # The loads of the last step that was added up.
    # Sums of the next line of metrics.
    self._means = {k: Mean(*pair) for k, pair in (begun or {}).items()}
    self._tokens, self._since = 0.0, time.monotonic()
    self._told, self._note = step, ""  # What the progress line knows.

  def save(self, checkpoints: Checkpoints, step: int, state) -> None:
    """Writes the checkpoint after a step, with all that a restart needs.

    Args:
      checkpoints: of the run.
      step, state: the number of steps done, and the TrainState.
    """
    self._add_up()
    self._tell(step)
    self._directory.sync()
    begun = {k: (m.total, m.weight) for k, m in self._means.items()}
    meta = {
      "config": self._program.config.to_dict(),
      "data": self._program.task.fingerprint,
      "line": begun,
      "lines": self._directory.lines,
    }
    checkpoints.save(step, state, meta)

  def add(self, step: int, sums) -> None:
    """Takes the sums of a step, without waiting for the devices.

    Args:
      step, sums: the number of steps done, and the result of `train_step`.
    """
    self._waiting.append((step, sums))

  def write(self) -> None:
    """Writes a line if one is complete.

    Raises:
      Diverged: too many steps in a row were not finite.
    """
    if not self._waiting:
      return
    step, train = self._waiting[-1][0], self._program.config.train
    if step % train.log_every and step != train.num_steps:
      return
    self._add_up()
    now = time.monotonic()
    values = metrics.divide(self._means)
    values["skipped_steps"] = self._skipped
    applied = max(step - self._skipped, 1)  # The optimizer counts these alone.
    values["learning_rate"] = float(self._rate(applied - 1))
    values["tokens_per_second"] = self._tokens / (now - self._since)
    self._directory.log(step, "train", values)
    before = (step - 1) // train.log_every * train.log_every
    if self._loads and _passes(before, step, train.loads_every):
      self._directory.log(step, "loads", self._loads)
    self._means, self._tokens, self._since = {}, 0.0, now
    note = [f"{k} {values[k]:.3f}" for k in ("loss", "max_vio") if k in values]
    self._note = ", ".join(note)
    self._tell(step)

  def _tell(self, step):
    """Moves the progress line to a step."""
    self._progress.update(step - self._told, self._note)
    self._told = step

  def _add_up(self):
    for step, sums in jax.device_get(self._waiting):
      self._tokens += float(sums["loss"].weight)
      self._skipped = int(sums["skipped"])
      if not sums["skipped_in_a_row"]:
        means = metrics.of_step(sums, self._program)
        self._loads = metrics.loads(sums, self._program.model)
        self._means = metrics.add_up([self._means, means])
      in_a_row = int(sums["skipped_in_a_row"])
      if in_a_row >= self._program.config.train.max_skipped_in_a_row:
        raise self._diverged(step, in_a_row)
    self._waiting = []

  def _diverged(self, step, in_a_row):
    folder = self._directory.path / "checkpoints"
    good = newest_first(folder, before=step - in_a_row + 1)
    last = good[0] if good else "none"
    return Diverged(
      f"the loss or the gradient was not finite in {in_a_row} steps in a row,"
      f" the last of them {step}, and none of these was applied. The last"
      f" checkpoint before them: {last}. Raise train.max_skipped_in_a_row to go"
      " on, or lower optim.learning_rate in another --workdir"
    )
