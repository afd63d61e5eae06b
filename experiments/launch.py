"""Runs the arms of a question for several seeds, and reports.

  python -m experiments.launch load_balancing --scale=demo

What is finished is not run again: a run whose row lies in the work directory,
or in the results.csv beside the question, with the same scale, arm, seed and
config. What was stopped goes on from its last checkpoint. What another launch
in the same work directory is running is left to it. The report is written to
WORKDIR/report. Several processes that are given the same command on a cluster
run one run after another together.
"""

import sys
import tempfile
import time
from collections.abc import Sequence

from experiments import plan, questions, report, runs
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib


def main(argv: Sequence[str] | None = None) -> int:
  """The command: plans the runs, trains the open ones, reports all."""
  args, overrides = _arguments(argv)
  if args.list and not args.question:
    print(*questions.titles(), sep="\n")
    return 0
  deadline = time.monotonic() + 60 * args.minutes if args.minutes else None

  from experiments import train
  from moe_jax.run import processes

  processes.join(args.multihost, args.multihost_timeout)
  flags = {f"--{name}": value for name, value in vars(args).items()}
  processes.check_same(flags | {"--config": overrides})
  experiment = plan.make(
    questions.load(args.question),
    scale=args.scale,
    arms=args.arm,
    workdir=args.workdir,
    overrides=overrides,
    fresh=args.fresh,
  )
  # The first process reads what is finished, and all plan by it alike.
  rows = processes.by_first(lambda: _look(args, overrides, experiment))
  for stage in _stages(args, experiment):
    launch = experiment.knowing(rows).launch(args.seeds, stage)
    train.train(launch, deadline)
    rows = processes.by_first(experiment.look)
  return processes.by_first(lambda: _tell(args, experiment, rows))


def _arguments(argv):
  parser = config_lib.Parser(__doc__, prog="python -m experiments.launch")
  questions.add_arguments(parser, argv)
  add = parser.add_argument
  add("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 of each arm")
  add("--workdir", metavar="DIR", help="runs/QUESTION/SCALE by default")
  minutes = {"type": config_lib.at_least_1, "metavar": "N"}
  add("--minutes", **minutes, help="stop after them, with everything saved")
  for name, text in (
    ("report", "of finished runs; run nothing"),
    ("list", "questions, or the arms of QUESTION and what is finished"),
    ("tune", "choose what is tuned for each arm"),
    ("fresh", "run again even where results are committed, and compare"),
    ("publish", "put rows and figures beside the question, to be committed"),
  ):
    add(f"--{name}", action="store_true", help=text)
  config_lib.add_multihost(parser)
  return config_lib.parse_overrides(parser, argv)


def _stages(args, experiment):
  """The launches of a command, by their stage of the tuning; None: the runs."""
  if args.list or args.report:
    return ()
  return range(len(experiment.sweep.stages)) if args.tune else (None,)


def _look(args, overrides, experiment) -> list[dict]:
  """The rows of finished runs.

  Raises:
    ConfigError: flags that would lose rows or prove nothing, or a work
      directory that cannot be written to.
  """
  if args.tune:
    _check_tuning(args, experiment)
  rows = experiment.look()
  if not args.tune and not args.list:
    known = experiment.knowing(rows)
    launch = known.launch(args.seeds)
    lost = known.lost(launch)
    _check_rows(args, overrides, launch, lost)
  if not args.list:
    _check_writable(experiment.workdir)
  return rows


def _check_tuning(args, experiment):
  if args.report or args.publish or args.fresh:
    raise ConfigError(
      "--tune only tries and chooses; give --report, --publish or --fresh to"
      " a launch of its own"
    )
  if not experiment.sweep.stages:
    raise ConfigError(
      f"{experiment.question.name} tunes nothing at scale {experiment.scale};"
      " leave out --tune"
    )


def _check_rows(args, overrides, launch, lost):
  scale = launch.runs[0].scale
  if args.publish and (args.arm or overrides or args.fresh or lost):
    raise ConfigError(
      f"--publish replaces all rows of scale {scale}, so it goes with all arms,"
      " no fewer seeds than are committed, and neither --config nor --fresh"
    )
  if args.publish and args.report and launch.open:
    raise ConfigError(
      f"--publish replaces all rows of scale {scale}, and {len(launch.open)}"
      f" runs are not finished, {launch.open[0].name} first; leave out --report"
      " to run them"
    )
  known = [run.folder for run in launch.runs if run.row() is not None]
  if args.fresh and known:
    raise ConfigError(
      f"--fresh runs again what is committed, but {known[0]} holds a finished"
      " run already; choose another --workdir"
    )


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


def _tell(args, experiment, rows) -> int:
  """Prints the list, the choices or the report; returns the exit code."""
  experiment = experiment.knowing(rows)
  if args.list:
    print(*experiment.status(args.seeds), sep="\n")
    return 0
  folder = experiment.workdir / "report"
  tried, choices = experiment.tuning_rows(), experiment.choices()
  folder.mkdir(parents=True, exist_ok=True)
  if tried:
    runs.write_csv(folder / "tuning.csv", tried)
  if args.tune:
    print(*choices, f"All that was tried: {folder / 'tuning.csv'}", sep="\n")
    return 0
  launch, question = experiment.launch(args.seeds), experiment.question
  if not launch.finished:
    raise ConfigError(
      f"no run of these is finished in {launch.workdir} yet; leave out --report"
      " to run them, or wait for the launch that does"
    )
  rows = experiment.timed(launch.finished)
  curves, shown = experiment.curves(launch.runs), question.report
  text = report.write(folder, launch.title, shown, rows, curves, choices)
  print(f"\n{text}\n")
  if launch.open:
    names = (run.name for run in launch.open)
    print("Not finished, so not in it:", *names, sep="\n- ")
  print(f"Report: {folder}")
  if args.fresh:
    lines, same = report.compare(rows, experiment.published)
    print(*lines, sep="\n")
    return 0 if same else 1
  if args.publish:
    report.publish(folder, question.folder, experiment.scale)
    print(f"Beside the question: {question.folder}")
  return 0


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
