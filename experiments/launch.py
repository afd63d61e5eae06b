"""Runs the arms of a question for several seeds, and reports.

  python -m experiments.launch load_balancing --scale=demo

What is finished is not run again: a run whose row lies in the work directory,
or in the results.csv beside the question, with the same scale, arm, seed and
config. What was stopped goes on from its last checkpoint. What another launch
in the same work directory is running is left to it. The report is written to
WORKDIR/report. Several processes that are given the same command on a cluster
run one run after another together.
"""

import argparse
import dataclasses
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence

from experiments import plan as plans
from experiments import questions, report, runs, sweeps
from moe_jax.core.errors import ConfigError, Diverged, InUse, RunError
from moe_jax.run import config as config_lib
from moe_jax.run.progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
  """The command."""
  args, overrides = _arguments(argv)

  from moe_jax.run import processes

  processes.join(args.multihost, args.multihost_timeout)
  flags = {f"--{name}": value for name, value in vars(args).items()}
  processes.check_same(flags | {"--config": overrides})
  question = questions.load(args.question)
  plan = plans.make(
    question,
    scale=args.scale,
    arms=args.arm,
    workdir=args.workdir,
    overrides=overrides,
    fresh=args.fresh,
  )
  if args.list:
    processes.by_first(lambda: _list(plan, args.seeds))
    return 0
  if args.tune:
    if args.report or args.publish or args.fresh:
      raise ConfigError(
        "--tune only tries and chooses; give --report, --publish or --fresh to"
        " a launch of its own"
      )
    _tune(plan)
    return 0
  launch = plan.launch(args.seeds)
  processes.by_first(lambda: _check_flags(args, overrides, plan, launch))
  processes.by_first(lambda: _check_writable(launch.workdir))
  if not args.report:
    _run(launch)
  return processes.by_first(lambda: _tell(args, plan, launch))


def _tell(args, plan, launch) -> int:
  """Reports, and does what else was asked for; returns the exit code."""
  _report(plan, launch)
  if args.publish:
    _publish(plan, launch)
  if args.fresh:
    known = dataclasses.replace(plan, fresh=False).launch(args.seeds)
    return 0 if _repeated(launch, known) else 1
  return 0


def _check_flags(args, overrides, plan, launch):
  """Raises ConfigError for what would lose rows, or prove nothing."""
  rows = (r for r in launch.committed[0] if r["scale"] == plan.scale)
  committed = {(row["arm"], row["seed"]) for row in rows}
  wanted = {(run.arm, run.seed) for run in launch.runs}
  fewer = {one for one in committed - wanted if one[0] in plan.sweep.arms}
  if args.publish and (args.arm or overrides or args.fresh or fewer):
    raise ConfigError(
      f"--publish replaces all rows of scale {plan.scale}, so it goes with all"
      " arms, no fewer seeds than are committed, and neither --config nor"
      " --fresh"
    )
  open_runs = launch.todo()
  if args.publish and args.report and open_runs:
    raise ConfigError(
      f"--publish replaces all rows of scale {plan.scale}, and {len(open_runs)}"
      f" runs are not finished, {open_runs[0].arm} seed {open_runs[0].seed}"
      " first; leave out --report to run them"
    )
  known = [run for run in launch.runs if run.row() is not None]
  if args.fresh and known:
    raise ConfigError(
      f"--fresh runs again what is committed, but {known[0].folder} holds a"
      " finished run already; choose another --workdir"
    )


def _run(launch):
  """Runs what is not finished yet."""
  from moe_jax.run import processes

  processes.check_same(
    {
      f"the folder of {r.name}, seed {r.seed}": str(r.folder)
      for r in launch.runs
    }
  )
  _check_arms(launch)
  processes.by_first(lambda: _announce(launch))
  todo = _open(launch, launch.runs)
  if todo:
    _train(launch, todo)


def _open(launch, group):
  """Those of some runs that are not finished, as the first process sees it."""
  from moe_jax.run import processes

  found = processes.by_first(
    lambda: [i for i, run in enumerate(group) if launch.row(run) is None]
  )
  return [group[i] for i in found]


def _tune(plan):
  """Runs all stages, one on the choices of the one before; tells the choices.

  Raises:
    ConfigError: there is nothing to tune.
  """
  from moe_jax.run import processes

  stages = plan.sweep.stages
  if not stages:
    raise ConfigError(
      f"{plan.question.name} tunes nothing at scale {plan.scale}; leave out"
      " --tune"
    )
  processes.by_first(lambda: _check_writable(plan.workdir))
  for number in range(len(stages)):
    _run(plan.tuning(number))
  processes.by_first(lambda: _tell_choices(plan))


def _tell_choices(plan):
  folder = plan.workdir / "report"
  folder.mkdir(exist_ok=True)
  runs.write_csv(folder / "tuning.csv", plan.tuning_rows())
  print("\n".join(plan.choices()))
  print(f"All that was tried: {folder / 'tuning.csv'}")


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
  add("--tune", action="store_true", help="choose what is tuned for each arm")
  add("--fresh", action="store_true", help="run what is committed too")
  add("--publish", action="store_true", help="put rows and figures beside it")
  config_lib.add_multihost(parser)
  return config_lib.parse_overrides(parser, argv)


def _list(plan, seeds):
  print(f"scales: {', '.join(plan.question.scales)}")
  untuned = [arm for arm, chosen in plan.chosen().items() if chosen is None]
  for arm in untuned:
    print(f"{arm:24}not tuned yet")
  tuned = [arm for arm in plan.arms if arm not in untuned]
  if not tuned:
    return
  launch = dataclasses.replace(plan, arms=tuple(tuned)).launch(seeds)
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
  from moe_jax import models
  from moe_jax.core import parallel
  from moe_jax.data import tokenizers
  from moe_jax.training import optim

  for name, config in _configs(launch).items():
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
      raise ConfigError(f"arm {name}: {e}") from None


def _announce(launch):
  """What is going to happen, with every arm's resolved balancing recipe."""
  from moe_jax.models import counts

  arms, wanted = len(_configs(launch)), len(launch.runs)
  print(launch.title)
  print(
    f"{arms} arms, {len(launch.finished())} of {wanted} runs finished; in"
    f" {launch.workdir}"
  )
  for name, config in _configs(launch).items():
    recipe = counts.describe(config.model, config.plugins)
    balancers = map(_call, recipe.get("balancers", {}).values())
    print(f"  {name}: {'; '.join(balancers) or 'no balancer'}")
  sys.stdout.flush()


def _configs(launch):
  """{name of an arm, with what is tried: its config}."""
  return {run.name: launch.configs[run.config_digest] for run in launch.runs}


def _call(options):
  """A part with its options, as one would write it."""
  options = dict(options)
  name = options.pop("name")
  return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _train(launch, todo):
  """Runs arm by arm, all seeds of an arm with one program."""
  from moe_jax.run import processes, run_directory
  from moe_jax.training import program as programs

  started, compiling, trained, progress = time.monotonic(), 0.0, 0, None
  for digest, group in itertools.groupby(todo, lambda r: r.config_digest):
    group = _open(launch, list(group))
    if not group:  # Another launch was faster.
      continue
    config = launch.configs[digest]
    processes.check_same(
      run_directory.facts_of_a_process(launch.workdir, config)
    )
    fingerprint = processes.by_first(lambda d=digest: launch.fingerprint(d))
    program = programs.Program(config, fingerprint)
    compiling += program.compile_seconds
    if progress is None:  # Its clock starts when the steps do.
      steps = sum(
        launch.configs[run.config_digest].train.num_steps for run in todo
      )
      progress = Progress(steps, "steps", shown=processes.is_first())
    for run in group:
      try:
        _train_one(run, program, progress)
        trained += 1
      except InUse:
        progress.skip(program.config.train.num_steps)
  if progress is not None:
    progress.close()
  if not processes.is_first():
    return
  print(
    f"{trained} runs took {time.monotonic() - started:.0f} s,"
    f" {compiling:.0f} s of them compiling."
    + f" {len(todo) - trained} are another launch's."
    * (trained < len(todo)),
    flush=True,
  )


def _train_one(run, program, progress):
  """Raises InUse where another launch runs it, or has run it."""
  from moe_jax.run import processes, run_directory
  from moe_jax.training import loop

  config = sweeps.apply(program.config, {"seed": run.seed})
  with run_directory.RunDirectory(run.folder, config) as directory:
    if processes.by_first(lambda: run.row() is not None):
      raise InUse(f"{run.folder} was finished by another launch")
    named = _Named(progress, f"{run.name}, seed {run.seed}")
    try:
      validation = loop.run(program, run.seed, directory, named)
    except Diverged as e:  # That is a result too.
      validation = None
      if processes.is_first():
        print(f"{run.name}, seed {run.seed}: {e}", file=sys.stderr, flush=True)
    processes.by_first(lambda: run.finish(validation))
    seen = processes.seen(lambda: run.row() is not None)
    if not all(seen):  # What is tuned depends on it.
      raise RunError(
        f"process {seen.index(False)} does not see the row that process 0 has"
        f" written in {run.folder}; see that all processes share that folder,"
        " and give the same command again"
      )


class _Named:
  """Says in the shared progress line which run it is."""

  def __init__(self, progress, name):
    self._progress, self._name = progress, name

  def update(self, n: int, note: str = "") -> None:
    self._progress.update(n, f"{self._name}: {note}")

  def skip(self, n: int) -> None:
    self._progress.skip(n)


def _publish(plan, launch):
  """Puts rows, curves and figures beside the question, to be committed.

  What lies there of other scales stays.
  """
  folder, made = plan.question.folder, launch.workdir / "report"
  if plan.sweep.stages:
    runs.write_csv(made / "tuning.csv", plan.tuning_rows())
  for path in sorted(made.glob("*.csv")):
    rows = runs.read_csv(path)
    runs.replace_scale(folder / path.name, plan.scale, rows)
  (folder / "figures").mkdir(exist_ok=True)
  for path in [*made.glob("*.png"), *made.glob("*.pdf")]:
    name = f"{plan.scale}_{path.name}"
    shutil.copyfile(path, folder / "figures" / name)
  shutil.copyfile(made / "table.md", folder / "figures" / f"{plan.scale}.md")
  print(f"Beside the question: {folder}")


def _repeated(fresh, known) -> bool:
  """Whether every fresh run repeated the row that is committed; says so."""
  same = True
  for run in fresh.finished():
    old = next((r for r in known.committed[0] if run.is_of(r)), None)
    if old is None:
      print(f"{run.arm} seed {run.seed}: no row is committed")
      continue
    new = fresh.row(run)
    timings = ("train/tokens_per_second", "train_seconds", *runs.ORIGIN)
    metrics = [k for k in old if k not in (*runs.KEYS, *timings)]
    differ = [k for k in metrics if old[k] != new.get(k)]
    same &= not differ
    print(
      f"{run.arm} seed {run.seed}: {len(metrics) - len(differ)} of"
      f" {len(metrics)} committed numbers are the same to the last bit"
      + (f"; not {', '.join(differ[:5])}" if differ else "")
    )
  return same


def _report(plan, launch):
  finished = launch.finished()
  if not finished:
    raise ConfigError(
      f"no run of these is finished in {launch.workdir} yet; leave out --report"
      " to run them, or wait for the launch that does"
    )
  folder = launch.workdir / "report"
  rows = [launch.row(run) for run in finished]
  for what in report.unknown(plan.question.plan, rows):
    print(f"No run here has the metric {what}", file=sys.stderr)
  text = report.write(
    folder,
    launch.title,
    plan.question.plan,
    rows,
    [point for run in finished for point in launch.curve(run)],
    launch.choices,
  )
  print(f"\n{text}\n")
  missing = [f"{r.arm} seed {r.seed}" for r in launch.runs if r not in finished]
  if missing:
    print(f"Not finished, so not in it: {', '.join(missing)}.")
  print(f"Report: {folder}")


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
