"""The runs that a command asks for, and which of them are finished.

All of it follows from the question, the flags and one look at finished rows.
An arm that is tuned gets its choices from such rows too, so that choices can be
made again from the rows that are committed.
"""

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from experiments import questions, runs, sweeps, tuning
from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib


class Launch(NamedTuple):
  """Runs that are wanted, arm by arm.

  workdir: where the runs lie.
  runs: the ones that are wanted.
  open: those of them that are not finished, after the runs that they start from
    where these are not in the work directory.
  configs: {arm, and what is tried with it: its config}.
  summary: in words, how much is finished and how the arms differ.
  """

  workdir: pathlib.Path
  runs: Sequence[runs.Run]
  open: Sequence[runs.Run]
  configs: Mapping[str, ml_collections.ConfigDict]
  summary: str


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A question at a scale.

  question, scale, sweep: what is asked.
  arms: names of those that are wanted.
  workdir: of its runs.
  fresh: take no row that is published.
  published: rows of results.csv beside the question, by `runs.identity`.
  rows: of all finished runs that count, in the same way.
  here: identities of the runs that are finished in the work directory.
  """

  question: questions.Question
  scale: str
  sweep: sweeps.Sweep
  arms: tuple[str, ...]
  workdir: pathlib.Path
  fresh: bool = False
  published: Mapping[tuple, dict] = dataclasses.field(default_factory=dict)
  rows: Mapping[tuple, dict] = dataclasses.field(default_factory=dict)
  here: Collection[tuple] = ()

  def knowing(self, tables: Iterable[Iterable[dict]]) -> "Experiment":
    """The same experiment with the rows that `runs.finished` has returned."""
    published, tried, here = (
      {runs.identity(r): r for r in some} for some in tables
    )
    rows = tried | here if self.fresh else published | tried | here
    return dataclasses.replace(self, published=published, rows=rows, here=here)

  def _beside(self, name):
    """The rows of a csv beside the question, of this scale."""
    return runs.read_scale(self.question.folder / name, self.scale)

  def row(self, run: runs.Run) -> dict | None:
    """The row of a run; None if it is not finished."""
    return self.rows.get(run.identity)

  def launch(
    self, seeds: int | None = None, stage: int | None = None
  ) -> Launch:
    """The runs of all arms, or of a stage of their tuning.

    Args:
      seeds: 0 to N - 1 of each arm; None: as many as the sweep says.
      stage: None: the arms with what was chosen for them.

    Raises:
      ConfigError: no seeds, or an arm that is to be tuned first.
    """
    title, workdir = self.question.title, self.workdir
    if stage is None:
      wanted = [run for arm in self.arms for run in self._seeds(arm, seeds)]
    else:
      title += f" Tuning, stage {stage + 1} of {len(self.sweep.stages)}"
      workdir, wanted = workdir / "tuning", self._stage(stage)
    unfinished = [run for run in wanted if self.row(run) is None]
    starts = self._starts(unfinished)
    configs = {_words(r.arm, r.tried): r.config for r in [*starts, *wanted]}
    # A single arm is described by its differences from the others.
    others = self.sweep.configs() if len(configs) == 1 else {}
    differ = differences(others | configs)
    finished = len(wanted) - len(unfinished)
    summary = [
      title,
      f"{len(configs)} arms, {finished} of {len(wanted)} runs finished; in"
      f" {workdir}",
      *(f"  {name}: {differ[name]}" for name in configs),
    ]
    opened = [*starts, *unfinished]
    return Launch(workdir, wanted, opened, configs, "\n".join(summary))

  def _starts(self, unfinished):
    """Runs that others start from, not among them and not in the work directory."""
    starts = {run.start.identity: run.start for run in unfinished if run.start}
    there = {*self.here, *(run.identity for run in unfinished)}
    return [run for identity, run in starts.items() if identity not in there]

  def _seeds(self, arm, seeds):
    """The runs of an arm, with the values chosen for it."""
    if seeds is not None and seeds < 1:
      raise ConfigError(f"--seeds={seeds} is no run at all; give 1 or more")
    overrides = self.chosen(arm)
    if overrides is None:
      raise ConfigError(
        f"the arm {arm} of {self.question.name} is not tuned yet at scale"
        f" {self.scale}; give the same command with --tune first, or wait for the"
        " launch that is tuning it"
      )
    count = seeds or self.sweep.seeds_of.get(arm, self.sweep.seeds)
    return self._runs(arm, range(count), overrides)

  def _stage(self, stage):
    """The tuning runs of a stage, for the arms that have come to it.

    These are the ones that are wanted and those whose choices or models they take.
    """
    arms = dict.fromkeys(self.arms)
    for later in reversed(self.sweep.stages[stage:]):
      arms |= dict.fromkeys(map(later.source, arms))
    starts = [
      self.sweep.starts[arm] for arm in arms if arm in self.sweep.starts
    ]
    for later in reversed(self.sweep.stages[stage:]):
      starts += [later.source(arm) for arm in starts]
    arms |= dict.fromkeys(starts)
    chosen = {arm: self.chosen(arm, stage) for arm in arms}
    return [
      run
      for arm in arms
      if chosen[arm] is not None
      for tried in self._tried(arm, stage, chosen[arm]).values()
      for run in tried
    ]

  def chosen(self, arm: str, stages: int | None = None) -> dict | None:
    """An arm's tuned overrides; None if runs that decide are not finished.

    Each choice is made with what its source had chosen before.

    Args:
      stages: how many stages count; None: all.
    """
    chosen, start = {}, self.sweep.starts.get(arm)
    if start is not None and self.chosen(start) is None:
      return None
    for number, stage in enumerate(self.sweep.stages[:stages]):
      source = stage.source(arm)
      if not stage.tried(source):
        continue
      before = chosen if source == arm else self.chosen(source, number)
      choice = None if before is None else self._choose(source, number, before)
      if choice is None:
        return None
      chosen |= choice
    return chosen

  def _choose(self, arm, number, chosen):
    """An arm's choice in one stage; None if its runs are not finished."""
    stage, means = self.sweep.stages[number], {}
    for value, tried in self._tried(arm, number, chosen).items():
      rows = [self.row(run) for run in tried]
      if None in rows:
        return None
      for row in rows:
        if runs.DIVERGED not in row and stage.metric not in row:
          raise ConfigError(
            f"{self.question.name} tunes by {stage.metric}, which runs of the"
            f" arm {arm} do not have; they have: {', '.join(sorted(row))}"
          )
      # A run that diverged has no metrics.
      means[value] = statistics.fmean(
        row.get(stage.metric, math.inf) for row in rows
      )
    return stage.choose(arm, means)

  def _tried(self, arm, number, chosen):
    """{value: the runs of all seeds that try it} of an arm in a stage."""
    stage = self.sweep.stages[number]
    seeds = range(tuning.SEED, tuning.SEED + stage.seeds)
    return {
      value: self._runs(arm, seeds, chosen | overrides, tuned=True)
      for value, overrides in stage.tried(arm).items()
    }

  def _runs(self, arm, seeds, overrides, tuned=False):
    """The runs of an arm with some overrides, one for each seed."""
    tried, starts = overrides if tuned else {}, {}
    if source := self.sweep.starts.get(arm):
      own = self._runs(source, seeds, self.chosen(source), tuned)
      starts = {run.seed: run for run in own}
      # The name of the start in the config; `train` finds its folder.
      known = f"{source}/{own[0].config_digest}"
      overrides = overrides | {"init_from": known}
    config = sweeps.apply(self.sweep.config, self.sweep.arms[arm] | overrides)
    digest = sweeps.digest(config)
    workdir = self.workdir / "tuning" if tuned else self.workdir
    folder = workdir / arm / digest
    run = runs.Run(self.scale, arm, 0, digest, folder, config, tried=tried)
    words = _words(arm, tried)
    return [
      run._replace(
        seed=n,
        folder=folder / str(n),
        name=f"{words} seed {n}",
        start=starts.get(n),
      )
      for n in seeds
    ]

  def results(
    self, wanted: Iterable[runs.Run]
  ) -> tuple[list[dict], list[dict], list[dict], list[str]]:
    """Returns rows, curves, rows of the tuning and the choices, for a report.

    The curve of a run is read from the place that has its row. train_seconds of
    a row are its steps times the median in times.csv.

    Args:
      wanted: the runs whose rows and curves are returned, if they are finished.
    """
    digests = {a: sweeps.digest(c) for a, c in self.sweep.configs().items()}
    seconds = [
      (time["arm"], time["seconds_per_step"])
      for time in self._beside("times.csv")
      if time["config_digest"] == digests.get(time["arm"])
    ]
    points = [(runs.identity(p), p) for p in self._beside("curves.csv")]
    seconds, published = runs.grouped(seconds), runs.grouped(points)
    tried, choices, rows, curves = self.tuning_rows(), self.choices(), [], []
    for run in wanted:
      if row := self.row(run):
        if run.arm in seconds:
          second = statistics.median(seconds[run.arm])
          row = row | {"train_seconds": row["steps"] * second}
        rows.append(row)
        curves += run.curve() if run.row() else published.get(run.identity, [])
    return rows, curves, tried, choices

  def choices(self) -> list[str]:
    """The values chosen for the arms, in words; [] if nothing is tuned."""
    stages = self.sweep.stages
    if not stages:
      return []
    words = {a: tuning.describe(stages, a, self.chosen(a)) for a in self.arms}
    alike = runs.grouped((words[arm], arm) for arm in self.arms if words[arm])
    last = tuning.SEED + max(s.seeds for s in stages) - 1
    seeds = f"s {tuning.SEED} to {last}" if last > tuning.SEED else f" {last}"
    return [
      f"Chosen for each arm on seed{seeds}, from tuning.csv:",
      *(f"- {', '.join(arms)}: {words}" for words, arms in alike.items()),
    ]

  def tuning_rows(self) -> list[dict]:
    """Everything that was tried and is finished.

    What lies beside the question and is tried no more is kept: it is part of how
    the choices came about.
    """
    rows = {runs.identity(row): row for row in self._beside("tuning.csv")}
    for stage in range(len(self.sweep.stages)):
      for run in self._stage(stage):
        if row := self.row(run):
          rows[run.identity] = row | dict(run.tried)
    return list(rows.values())

  def lost(self, launch: Launch) -> set[tuple[str, int]]:
    """(arm, seed) of published rows that the launch does not make again.

    Rows of arms that the question has no more are none of them.
    """
    rows = self.published.values()
    known = {(r["arm"], r["seed"]) for r in rows if r["arm"] in self.sweep.arms}
    return known - {(run.arm, run.seed) for run in launch.runs}

  def status(self, seeds: int | None) -> list[str]:
    """Lines for --list: the scales, and how many seeds of an arm are finished."""
    lines = [f"scales: {', '.join(self.question.scales)}"]
    for arm in self.arms:
      words = "not tuned yet"
      if self.chosen(arm) is not None:
        rows = [self.row(run) for run in self._seeds(arm, seeds)]
        finished = len(rows) - rows.count(None)
        words = f"{finished} of {len(rows)} seeds finished"
      lines.append(f"{arm:24}{words}")
    return lines


def make(
  question: questions.Question,
  *,
  scale: str | None = None,
  arms: Sequence[str] | None = None,
  workdir: str | None = None,
  overrides: Sequence[str] = (),
  fresh: bool = False,
) -> Experiment:
  """Resolves flags; None stands for the question's own choice.

  Args:
    overrides: texts KEY=VALUE, for the config of all arms.

  Raises:
    ConfigError: no such scale, arm or config key.
  """
  scale = scale or next(iter(question.scales))
  if scale not in question.scales:
    raise ConfigError(
      f'{question.name} has no scale "{scale}"; it has:'
      f" {', '.join(question.scales)}"
    )
  sweep = question.scales[scale]().beside(question.folder)
  names, sweep = sweep.asked(arms or (), overrides)
  folder = pathlib.Path(workdir or pathlib.Path("runs", question.name, scale))
  return Experiment(question, scale, sweep, names, folder, fresh)


def _words(arm, tried):
  """An arm, and what is tried with it."""
  values = [f"{k.split('.')[-1]}={v:g}" for k, v in tried.items()]
  return " ".join([arm, *values])


def differences(configs: Mapping[str, Any]) -> dict[str, str]:
  """{name: the config keys in which the configs differ, with its values}."""
  flat = {n: dict(config_lib.flat(c.to_dict())) for n, c in configs.items()}
  keys = dict.fromkeys(itertools.chain.from_iterable(flat.values()))
  texts = {k: {repr(values.get(k)) for values in flat.values()} for k in keys}
  differ = [key for key in keys if len(texts[key]) > 1]
  return {
    name: ", ".join(f"{k}={values[k]!r}" for k in differ if k in values)
    for name, values in flat.items()
  }
