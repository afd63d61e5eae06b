"""Runs the arms of a question for several seeds, and reports.

  python -m experiments.launch load_balancing --scale=demo

What is finished is not run again: a run whose row lies in the work directory,
or in the results.csv beside the question, with the same scale, arm, seed and
config. What was stopped goes on from its last checkpoint. The report is
written to WORKDIR/report.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from experiments import questions, report, runs, sweeps
from moe_jax import config as config_lib
from moe_jax.errors import ConfigError, OtherRun, did_you_mean
from moe_jax.progress import Progress


class Launch(NamedTuple):
  """What was asked for.

  title: of the report.
  question: whose arms these are.
  workdir: where the runs lie.
  configs: of each arm.
  runs: wanted, arm by arm.
  committed: rows and curves that lie beside the question.
  """

  title: str
  question: questions.Question
  workdir: pathlib.Path
  configs: dict
  runs: list[runs.Run]
  committed: tuple[list[dict], list[dict]]

  def row(self, run: runs.Run) -> dict | None:
    """A run's row, from the work directory or committed; None: to be run."""
    rows = (row for row in self.committed[0] if run.is_of(row))
    return run.row() or next(rows, None)

  def fingerprint(self) -> str | None:
    """Of the data that runs here were trained on; None: there are none yet."""
    found = (run.fingerprint() for run in self.runs)
    return next((f for f in found if f is not None), None)

  def curve(self, run: runs.Run) -> list[dict]:
    """A finished run's curve, from where its row is."""
    if run.row():
      return run.curve()
    return [point for point in self.committed[1] if run.is_of(point)]


def main(argv: Sequence[str] | None = None) -> int:
  """The command."""
  args = _arguments(argv)
  launch = plan(
    questions.load(args.question),
    scale=args.scale,
    seeds=args.seeds,
    arms=args.arm,
    workdir=args.workdir,
  )
  if args.list:
    _list(launch)
    return 0
  _check_writable(launch.workdir)
  todo = [run for run in launch.runs if launch.row(run) is None]
  if not args.report:
    _check_arms(launch)
    _announce(launch, todo)
    if todo:
      _train(launch, todo)
  _report(launch)
  return 0


def plan(
  question: questions.Question,
  *,
  scale: str | None = None,
  seeds: int | None = None,
  arms: Sequence[str] | None = None,
  workdir: str | None = None,
) -> Launch:
  """Resolves what was asked for; None stands for the question's own choice.

  Raises:
    ConfigError: no such scale, arm or config key, or no seeds.
  """
  scale = scale or next(iter(question.scales))
  sweep = question.sweep(scale)
  seeds = sweep.seeds if seeds is None else seeds
  if seeds < 1:
    raise ConfigError(f"--seeds={seeds} is no run at all; give 1 or more")
  for arm in arms or ():
    if arm not in sweep.arms:
      raise ConfigError(
        f'{question.name} has no arm "{arm}" at scale {scale}'
        + did_you_mean(arm, sweep.arms)
      )
  configs = sweep.configs()
  if arms:
    configs = {name: c for name, c in configs.items() if name in arms}
  folder = pathlib.Path(workdir or pathlib.Path("runs", question.name, scale))
  return Launch(
    title=question.title,
    question=question,
    workdir=folder,
    configs=configs,
    runs=[
      runs.Run(scale, arm, seed, sweeps.digest(c), folder / arm / str(seed))
      for arm, c in configs.items()
      for seed in range(seeds)
    ],
    committed=(
      runs.read_csv(question.folder / "results.csv"),
      runs.read_csv(question.folder / "curves.csv"),
    ),
  )


def _arguments(argv):
  parser = argparse.ArgumentParser(
    prog="python -m experiments.launch",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("question", metavar="QUESTION", help=", ".join(questions.names()))
  add("--scale", metavar="NAME", help="demo: minutes; others as --list says")
  add("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 of each arm")
  add("--arm", action="append", metavar="NAME", help="only this; repeatable")
  add("--workdir", metavar="DIR", help="runs/QUESTION/SCALE by default")
  add("--report", action="store_true", help="of what is finished; run nothing")
  add("--list", action="store_true", help="the arms, and what is finished")
  return parser.parse_args(argv)


def _list(launch):
  print(f"scales: {', '.join(launch.question.scales)}")
  for arm, group in itertools.groupby(launch.runs, lambda run: run.arm):
    group = list(group)
    done = [run for run in group if launch.row(run) is not None]
    print(f"{arm:24}{len(done)} of {len(group)} seeds finished")


def _check_writable(workdir):
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as e:
    raise ConfigError(
      f"the work directory {workdir} cannot be written to ({e.strerror});"
      " choose another --workdir"
    ) from None


def _check_arms(launch):
  """No arm trains where a later one could not."""
  from moe_jax import models, optim, parallel, tokenizers

  for arm, config in launch.configs.items():
    try:
      models.build(
        config.model,
        vocab_size=tokenizers.load(config.data.tokenizer).vocab_size,
        seq_len=config.data.seq_len,
        batch_sizes=(
          config.data.batch_size // config.train.accumulation,
          config.eval.batch_size,
        ),
        mesh=parallel.mesh_or_none(config.mesh),
        plugins=config.plugins,
      )
      optim.build(config.optim, config.train.num_steps)
    except ConfigError as e:
      raise ConfigError(f"arm {arm}: {e}") from None


def _announce(launch, todo):
  """What is going to happen, with every arm's resolved balancing recipe."""
  from moe_jax import params

  arms, wanted = len(launch.configs), len(launch.runs)
  print(launch.title)
  print(
    f"{arms} arms x {wanted // arms} seeds, {wanted - len(todo)} of {wanted}"
    f" runs finished; in {launch.workdir}, report in {launch.workdir}/report"
  )
  for arm, config in launch.configs.items():
    recipe = params.describe(config.model, config.plugins)
    balancers = map(_call, recipe.get("balancers", {}).values())
    print(f"  {arm}: {'; '.join(balancers) or 'no balancer'}")
  sys.stdout.flush()


def _call(options):
  """A part with its options, as one would write it."""
  options = dict(options)
  name = options.pop("name")
  return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _train(launch, todo):
  """Runs arm by arm, all seeds of an arm with one program."""
  from moe_jax import program as programs

  started, compiling, progress = time.monotonic(), 0.0, None
  for arm, group in itertools.groupby(todo, lambda run: run.arm):
    program = programs.Program(launch.configs[arm], launch.fingerprint())
    compiling += program.compile_seconds
    if progress is None:  # Its clock starts when the steps do.
      steps = sum(launch.configs[run.arm].train.num_steps for run in todo)
      progress = Progress(steps, "steps")
    for run in group:
      _train_one(run, program, _Named(progress, f"{arm}, seed {run.seed}"))
  progress.close()
  print(
    f"{len(todo)} runs took {time.monotonic() - started:.0f} s,"
    f" {compiling:.0f} s of them compiling.",
    flush=True,
  )


def _train_one(run, program, progress):
  from moe_jax import loop, run_directory

  config = sweeps.apply(program.config, {"seed": run.seed})
  try:
    directory = run_directory.RunDirectory(run.folder, config)
  except OtherRun:
    aside = run.set_aside()
    print(f"{run.folder} is of a run of another config: now {aside}")
    directory = run_directory.RunDirectory(run.folder, config)
  with directory:
    run.finish(loop.run(program, run.seed, directory, progress))


class _Named:
  """Says in the shared progress line which run it is."""

  def __init__(self, progress, name):
    self._progress, self._name = progress, name

  def update(self, n: int, note: str = "") -> None:
    self._progress.update(n, f"{self._name}: {note}")

  def skip(self, n: int) -> None:
    self._progress.skip(n)


def _report(launch):
  finished = [run for run in launch.runs if launch.row(run) is not None]
  if not finished:
    raise ConfigError(
      f"no run of these is finished in {launch.workdir}; leave out --report to"
      " run them"
    )
  folder = launch.workdir / "report"
  text = report.write(
    folder,
    launch.title,
    launch.question.plan,
    [launch.row(run) for run in finished],
    [point for run in finished for point in launch.curve(run)],
  )
  print(f"\n{text}\n")
  missing = [f"{r.arm} seed {r.seed}" for r in launch.runs if r not in finished]
  if missing:
    print(f"Not finished, so not in it: {', '.join(missing)}.")
  print(f"Report: {folder}")


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
