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

  flags = {f"--{name}": value for name, value in vars(args).items()}
  processes.join(
    args.multihost, args.multihost_timeout, flags | {"--config": overrides}
  )
  question = questions.load(args.question)
  experiment = plan.make(
    question,
    scale=args.scale,
    arms=args.arm,
    workdir=args.workdir,
    overrides=overrides,
    fresh=args.fresh,
  )
  place = question.folder, experiment.scale, experiment.workdir
  # The first process reads what is finished, and all plan by it alike.
  rows = processes.by_first(runs.finished, *place)
  experiment = experiment.knowing(rows)
  processes.by_first(_check, args, overrides, experiment)
  stages = [*range(len(experiment.sweep.stages))] if args.tune else [None]
  # First the arms that others start from are tuned, in all stages, then the others.
  stages *= 2 if args.tune and experiment.sweep.starts else 1
  if args.dry_run:
    train.dry_run(experiment.launch(args.seeds, stages[0]))
    return 0
  for stage in [] if args.list or args.report else stages:
    train.train(experiment.launch(args.seeds, stage), deadline)
    rows = processes.by_first(runs.finished, *place)
    experiment = experiment.knowing(rows)
  return processes.by_first(_tell, args, experiment)


def _arguments(argv):
  name = "python -m experiments.launch"
  about = __doc__.replace(name, command.called or name)
  parser = config_lib.Parser(about, multihost=True)
  questions.add_arguments(parser, argv)
  add = parser.add_argument
  add("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 of each arm")
  add("--workdir", metavar="DIR", help="runs/QUESTION/SCALE by default")
  minutes = {"type": config_lib.at_least_1, "metavar": "N"}
  add("--minutes", **minutes, help="stop after them, with everything saved")
  for name, text in (
    ("report", "of finished runs; run nothing"),
    ("dry_run", "check every arm and count, then stop; nothing is trained"),
    ("list", "questions, or the arms of QUESTION and what is finished"),
    ("tune", "choose what is tuned for each arm"),
    ("fresh", "run again even where results are committed, and compare"),
    ("publish", "put rows and figures beside the question, to be committed"),
  ):
    add(f"--{name}", action="store_true", help=text)
  return config_lib.parse_overrides(parser, argv)


def _check(args, overrides, experiment):
  """Refuses flags that would lose rows or prove nothing, and a bad folder."""
  if args.tune and (args.report or args.publish or args.fresh):
    raise ConfigError(
      "--tune only tries and chooses; give --report, --publish or --fresh to"
      " a launch of its own"
    )
  if args.tune and not experiment.sweep.stages:
    raise ConfigError(
      f"{experiment.question.name} tunes nothing at scale {experiment.scale};"
      " leave out --tune"
    )
  if args.dry_run and (args.list or args.report or args.publish):
    raise ConfigError(
      "--dry_run checks what would be trained; leave out --list, --report and"
      " --publish"
    )
  if args.list or args.dry_run:
    return
  if not args.tune:
    _check_rows(args, overrides, experiment)
  _check_writable(experiment.workdir)


def _check_rows(args, overrides, experiment):
  scale, launch = experiment.scale, experiment.launch(args.seeds)
  lost = args.publish and experiment.lost(launch)
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
  known = [run for run in launch.runs if experiment.row(run) is not None]
  if args.fresh and known:
    raise ConfigError(
      f"--fresh runs again what is committed, but {known[0].folder} holds a"
      " finished run already; choose another --workdir"
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


def _tell(args, experiment) -> int:
  """Prints the list, the choices or the report; returns the exit code."""
  if args.list:
    print(*experiment.status(args.seeds), sep="\n")
    return 0
  from moe_jax.run.pages import words

  folder, question = experiment.workdir / "report", experiment.question
  wanted = [] if args.tune else experiment.launch(args.seeds).runs
  missing = [run.name for run in wanted if experiment.row(run) is None]
  rows, curves, tried, choices = experiment.results(wanted)
  folder.mkdir(parents=True, exist_ok=True)
  if tried:
    runs.write_csv(folder / "tuning.csv", tried)
  if args.tune:
    print(*choices, f"All that was tried: {folder / 'tuning.csv'}", sep="\n")
    return 0
  if not rows:
    raise ConfigError(
      f"no run of these is finished in {experiment.workdir} yet; leave out"
      " --report to run them, or wait for the launch that does"
    )
  shown = question.report
  configs = experiment.sweep.configs().values()
  unit = words.loss_unit(config.task.name for config in configs)
  text = report.write(
    *(folder, question.title, shown, rows, curves, choices), loss_unit=unit
  )
  print(f"\n{text}\n")
  if missing:
    print("Not finished, so not in it:", *missing, sep="\n- ")
  print(f"Report: {folder}, page: {folder / 'report.html'}")
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
