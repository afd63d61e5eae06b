"""What is asked for, resolved: the runs of a question, and which are finished.

An arm that is tuned gets its choices from rows, of the work directory or of the
tuning.csv beside the question, so that choices can be made again from them.
"""

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import questions, runs, sweeps, tuning
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.run import config as config_lib


@dataclasses.dataclass(frozen=True)
class Launch:
  """Runs that are wanted, arm by arm.

  title: of their report.
  workdir: where the runs lie.
  configs: by digest.
  runs: wanted, arm by arm.
  committed: rows and curves that lie beside the question.
  seconds: {arm: of a training step, where it was timed}.
  choices: what was tuned, in words.
  """

  title: str
  workdir: pathlib.Path
  configs: Mapping[str, Any]
  runs: Sequence[runs.Run]
  committed: tuple[list[dict], list[dict]] = ([], [])
  seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  choices: Sequence[str] = ()

  def row(self, run: runs.Run) -> dict | None:
    """A run's row, from the work directory or committed; None: to be run."""
    rows = (row for row in self.committed[0] if run.is_of(row))
    row = run.row() or next(rows, None)
    if row is not None and run.arm in self.seconds:
      row = row | {"train_seconds": row["steps"] * self.seconds[run.arm]}
    return row

  def finished(self) -> list[runs.Run]:
    """The runs that have a row."""
    return [run for run in self.runs if self.row(run) is not None]

  def todo(self) -> list[runs.Run]:
    """The runs that have none."""
    return [run for run in self.runs if self.row(run) is None]

  def fingerprint(self, config_digest: str) -> str | None:
    """Of the data that runs here were trained on; None: there are none yet.

    Only runs count whose config names the same data as that of the digest.
    """
    data = {d: c.data.to_dict() for d, c in self.configs.items()}
    found = (
      run.fingerprint()
      for run in self.runs
      if data[run.config_digest] == data[config_digest]
    )
    return next((f for f in found if f is not None), None)

  def curve(self, run: runs.Run) -> list[dict]:
    """A finished run's curve, from where its row is."""
    if run.row():
      return run.curve()
    return [point for point in self.committed[1] if run.is_of(point)]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A question at a scale.

  question, scale, sweep: what is asked.
  arms: names of those that are wanted.
  workdir: of its runs.
  fresh: take no row that is committed.
  """

  question: questions.Question
  scale: str
  sweep: sweeps.Sweep
  arms: tuple[str, ...]
  workdir: pathlib.Path
  fresh: bool = False

  def launch(self, seeds: int | None = None) -> Launch:
    """All arms with seeds 0 to N - 1; None: as many as the sweep says.

    Raises:
      ConfigError: no seeds, or an arm that is to be tuned first.
    """
    if seeds is not None and seeds < 1:
      raise ConfigError(f"--seeds={seeds} is no run at all; give 1 or more")
    chosen = self.chosen()
    for arm, overrides in chosen.items():
      if overrides is None:
        raise ConfigError(
          f"the arm {arm} of {self.question.name} is not tuned yet at scale"
          f" {self.scale}; give the same command with --tune first"
        )
    wanted, configs = [], {}
    for arm, overrides in chosen.items():
      count = seeds or self.sweep.seeds_of.get(arm, self.sweep.seeds)
      for seed in range(count):
        run, config = self._run(arm, seed, overrides)
        wanted.append(run)
        configs[run.config_digest] = config
    rows = [] if self.fresh else self._committed("results.csv")
    curves = [] if self.fresh else self._committed("curves.csv")
    return Launch(
      self.question.title,
      self.workdir,
      configs,
      wanted,
      (rows, curves),
      self._seconds(),
      self.choices(),
    )

  def tuning(self, stage: int) -> Launch:
    """What a stage of the tuning tries, for the arms whose turn it is.

    These are the ones that are wanted and those whose choices they take.
    """
    wanted = dict.fromkeys(self.arms)
    for later in reversed(self.sweep.stages[stage:]):
      wanted |= dict.fromkeys(map(later.source, wanted))
    chosen = dataclasses.replace(self, arms=tuple(wanted)).chosen(stage)
    return self._tuning(
      [(a, c) for a, c in chosen.items() if c is not None], stage
    )

  def chosen(self, stages: int | None = None) -> dict[str, dict | None]:
    """{arm: its tuned overrides}; None for one whose runs are not finished.

    Args:
      stages: how many stages count; None: all.
    """
    return {arm: self._chosen(arm, stages) for arm in self.arms}

  def _chosen(self, arm, stages):
    """An arm's choices, each with what its source had chosen before."""
    chosen = {}
    for number, stage in enumerate(self.sweep.stages[:stages]):
      source = stage.source(arm)
      if not stage.tried(source):
        continue
      before = chosen if source == arm else self._chosen(source, number)
      found = None if before is None else self._choose(source, number, before)
      if found is None:
        return None
      chosen |= found
    return chosen

  def choices(self) -> list[str]:
    """What was chosen for the arms, in words; [] if nothing is tuned."""
    if not self.sweep.stages:
      return []
    arms = {}  # That chose alike.
    for arm, chosen in self.chosen().items():
      what = "not tuned yet"
      if chosen is not None:
        what = tuning.describe(self.sweep.stages, arm, chosen)
      arms.setdefault(what, []).append(arm)
    last = tuning.SEED + max(s.seeds for s in self.sweep.stages) - 1
    seeds = f"s {tuning.SEED} to {last}" if last > tuning.SEED else f" {last}"
    return [
      f"Chosen for each arm on seed{seeds}, from tuning.csv:",
      *(f"- {', '.join(alike)}: {what}" for what, alike in arms.items()),
    ]

  def tuning_rows(self) -> list[dict]:
    """Everything that was tried and is finished.

    What lies beside the question of this scale and is tried no more is kept: it
    is part of how the choices came about.
    """
    launches = [self.tuning(i) for i in range(len(self.sweep.stages))]
    found = {
      (run.config_digest, run.seed): launch.row(run) | dict(run.tried)
      for launch in launches
      for run in launch.finished()
    }
    before = {
      (row["config_digest"], row["seed"]): row
      for row in self._committed("tuning.csv")
      if row["scale"] == self.scale
    }
    return list((before | found).values())

  def _choose(self, arm, number, chosen):
    stage = self.sweep.stages[number]
    launch = self._tuning([(arm, chosen)], number)
    rows = [launch.row(run) for run in launch.runs]
    if None in rows:
      return None
    lost = {stage.metric: math.inf}  # What a run that diverged has.
    rows = [lost | row if runs.diverged(row) else row for row in rows]
    if any(stage.metric not in row for row in rows):
      raise ConfigError(
        f"{self.question.name} tunes by {stage.metric}, which runs of the arm"
        f" {arm} do not have; they have: {', '.join(sorted(rows[0]))}"
      )
    metrics, n = [row[stage.metric] for row in rows], stage.seeds
    found = {
      value: statistics.fmean(metrics[n * i : n * (i + 1)])
      for i, value in enumerate(stage.tried(arm))
    }
    return stage.choose(arm, found)

  def _tuning(self, arms, number):
    """The launch of a stage for (arm, its choices so far)."""
    wanted, configs, stages = [], {}, self.sweep.stages
    seeds = range(tuning.SEED, tuning.SEED + stages[number].seeds)
    for arm, chosen in arms:
      for tried, seed in itertools.product(
        stages[number].tried(arm).values(), seeds
      ):
        run, config = self._run(arm, seed, chosen | tried, tuned=True)
        wanted.append(run)
        configs[run.config_digest] = config
    return Launch(
      f"{self.question.title} Tuning, stage {number + 1} of {len(stages)}",
      self.workdir / "tuning",
      configs,
      wanted,
      (self._committed("tuning.csv"), []),
    )

  def _run(self, arm, seed, overrides, tuned=False):
    """A run, and its config."""
    config = sweeps.apply(self.sweep.config, self.sweep.arms[arm] | overrides)
    digest = sweeps.digest(config)
    folder = self.workdir / "tuning" if tuned else self.workdir
    folder = folder / arm / digest / str(seed)
    tried = overrides if tuned else {}
    return runs.Run(self.scale, arm, seed, digest, folder, tried), config

  def _seconds(self):
    """{arm: median seconds of a step} out of times.csv, of these configs."""
    by_arm = {}
    digests = {a: sweeps.digest(c) for a, c in self.sweep.configs().items()}
    for row in self._committed("times.csv"):
      same = row["config_digest"] == digests.get(row["arm"])
      if row["scale"] == self.scale and same:
        by_arm.setdefault(row["arm"], []).append(row["seconds_per_step"])
    return {arm: statistics.median(found) for arm, found in by_arm.items()}

  def _committed(self, name):
    return runs.read_csv(self.question.folder / name)


def make(
  question: questions.Question,
  *,
  scale: str | None = None,
  arms: Sequence[str] | None = None,
  workdir: str | None = None,
  overrides: Sequence[str] = (),
  fresh: bool = False,
) -> Plan:
  """Resolves what was asked for; None stands for the question's own choice.

  Args:
    overrides: texts KEY=VALUE, for the config of all arms.

  Raises:
    ConfigError: no such scale, arm or config key.
  """
  scale = scale or next(iter(question.scales))
  sweep = question.sweep(scale)
  for arm in arms or ():
    if arm not in sweep.arms:
      raise ConfigError(
        f'{question.name} has no arm "{arm}" at scale {scale}'
        + did_you_mean(arm, sweep.arms)
      )
  wanted = tuple(arm for arm in sweep.arms if not arms or arm in arms)
  config = sweeps.apply(sweep.config, {})
  for text in overrides:
    _check_is_shared(sweep, wanted, text.partition("=")[0])
    config_lib.override(config, text)
  return Plan(
    question,
    scale,
    dataclasses.replace(sweep, config=config),
    wanted,
    pathlib.Path(workdir or pathlib.Path("runs", question.name, scale)),
    fresh,
  )


def _check_is_shared(sweep, arms, key):
  """Raises ConfigError for a key that is not the same for all arms."""
  if key == "seed":
    raise ConfigError("--config.seed is what the arms repeat; give --seeds=N")
  for arm in arms:
    own = list(sweep.arms[arm])
    for stage in sweep.stages:
      tried = stage.tried(stage.source(arm)).values()
      own += [key for overrides in tried for key in overrides]
    for other in own:
      if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
        raise ConfigError(
          f"--config.{key} would have no effect on the arm {arm}, which has or"
          f" tunes a {other} of its own; change sweep.py, or train it alone with"
          " python -m moe_jax.main and a run's config.json"
        )
