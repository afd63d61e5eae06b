"""Runs of a question: their folders, their rows of results and their curves."""

import csv
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections

from moe_jax.core import files
from moe_jax.core.errors import ConfigError

KEYS = ("scale", "arm", "seed", "config_digest")
ORIGIN = ("data", "revision")
COST = ("steps", "active_parameters", "total_parameters", "train_flops")
DIVERGED = "diverged"  # Column of runs that diverged, and have no metrics.
WHOLE = ("max_vio", "beyond_capacity/1.25")  # Metrics averaged over all steps.
_POINTS = 100  # Maximum of training points in a curve.
# Keys of a line of training that make no column.
_NO_METRICS = ("step", "split", "learning_rate")
_LAST = 0.25  # The part of training that `summary` averages over.


class Run(NamedTuple):
  """A run that is wanted. The first fields are `KEYS`.

  folder: where its files lie; a run of another config has another one.
  config: without the run's seed.
  name: the run in words.
  tried: what is tried with it, {config key: value}, if it is for tuning.
  start: the run whose trained model it starts from.
  """

  scale: str
  arm: str
  seed: int
  config_digest: str
  folder: pathlib.Path
  config: ml_collections.ConfigDict | None = None
  name: str = ""
  tried: Mapping[str, float] = MappingProxyType({})
  start: "Run | None" = None

  @property
  def identity(self) -> tuple:
    """The values of `KEYS`, by which the run and its rows are known."""
    return identity(self.key)

  @property
  def key(self) -> dict:
    """The first columns of the run's rows."""
    return dict(zip(KEYS, self))

  def row(self) -> dict | None:
    """The row in its folder; None if the run is not finished."""
    row = _read_row(self.folder / "row.json")
    return row if row and identity(row) == self.identity else None

  def finish(self, validation: dict[str, float] | None) -> None:
    """Writes the run's row, the mark that it is finished.

    Args:
      validation: metrics of the validation split at the end; None: it diverged.
    """
    facts = _read_object(self.folder / "run.json")
    git, steps = facts["git"], self.config.train.num_steps
    tokens = steps * facts["tokens_per_step"]
    row = self.key | {
      "data": facts["data"][:12],
      "revision": git[:12] + "+" * git.endswith("+"),
      "steps": steps,
      "active_parameters": facts["parameters"]["active"],
      "total_parameters": facts["parameters"]["total"],
      "train_flops": tokens * facts["train_flops_per_token"],
    }
    if validation is None:
      row[DIVERGED] = 1.0
    else:
      row |= summary(_lines(self.folder, "train"), validation)
    files.write_text(self.folder / "row.json", json.dumps(row, indent=2) + "\n")

  def begun(self, others: Iterable["Run"]) -> tuple[bool, str | None]:
    """(whether it is finished, the fingerprint of the data to train it on).

    Args:
      others: runs of the same launch. The data are those which one of them
        started with, if its config names the same; None before that.
    """
    for other in others:
      if other.config.data == self.config.data:
        facts = _read_object(other.folder / "run.json")
        if isinstance(facts.get("data"), str):  # It has started.
          return self.row() is not None, facts["data"]
    return self.row() is not None, None

  def curve(self) -> list[dict]:
    """At most a hundred lines of training metrics, then the evaluations.

    Metrics of evaluations are called validation/METRIC. [] without any lines.
    """
    try:
      points = _lines(self.folder, "train")
      evaluations = _lines(self.folder, "validation")
    except OSError:
      return []
    every = -(-len(points) // _POINTS) or 1
    points = points[::-every][::-1]  # The last point is always kept.
    for line in evaluations:
      named = {f"validation/{k}": v for k, v in line.items() if k != "step"}
      points.append({"step": line["step"]} | named)
    return [
      self.key | {k: v for k, v in point.items() if not k.endswith("split")}
      for point in points
    ]


def _lines(folder, split):
  from moe_jax.run import run_directory

  return run_directory.read_metrics(folder, split)


def identity(row: Mapping) -> tuple:
  """The values of `KEYS`, by which a row and its run belong together."""
  return tuple(row.get(k) for k in KEYS)


def grouped(pairs: Iterable[tuple]) -> dict[Any, list]:
  """{key: values} of (key, value), in the order in which they come."""
  groups = {}
  for key, value in pairs:
    groups.setdefault(key, []).append(value)
  return groups


def finished(
  beside: pathlib.Path, scale: str, workdir: pathlib.Path
) -> list[list[dict]]:
  """[published rows of a scale, those of its tuning, those in the work directory].

  Args:
    beside: the folder of the question.
    scale: of the published rows.
    workdir: of the launch.
  """
  here = []
  for folder in (workdir, workdir / "tuning"):
    rows = map(_read_row, sorted(folder.glob("*/*/*/row.json")))
    here += filter(None, rows)
  published, tuning = (
    read_scale(beside / f"{name}.csv", scale) for name in ("results", "tuning")
  )
  return [published, tuning, here]


def _read_row(path):
  """A row; None where there is none, or something else."""
  row = _read_object(path)
  types = tuple(map(type, identity(row)))
  return row if types == (str, str, int, str) else None


def _read_object(path):
  """A JSON object; {} where there is none, or something else."""
  try:
    return files.read_json(path, "a file of a run", "", allow_nan=True)
  except (OSError, ConfigError):
    return {}


def summary(lines: list[dict], validation: dict[str, float]) -> dict:
  """The metrics of a row.

  Args:
    lines: of training, from `run_directory.read_metrics`.
    validation: metrics of the validation split at the end.

  Returns:
    The validation metrics; train/NAME: the training metrics' mean over the last
    quarter of the steps; and whole/NAME: the mean of some over all steps.
  """
  whole = grouped((k, line[k]) for line in lines for k in WHOLE if k in line)
  late = [x for x in lines if x["step"] > (1 - _LAST) * lines[-1]["step"]]
  # A line of steps that were all skipped has no metrics.
  values = grouped(item for line in late for item in line.items())
  means = {k: v for k, v in values.items() if k not in _NO_METRICS}
  return validation | {
    f"{part}/{k}": sum(v) / len(v)
    for part, some in (("train", means), ("whole", whole))
    for k, v in some.items()
  }


def write_csv(path: pathlib.Path, rows: list[dict]) -> None:
  """Writes rows under the union of their columns."""
  columns = list(dict.fromkeys(k for row in rows for k in row))
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  with files.writing(path):
    with open(temporary, "w", newline="") as f:
      writer = csv.DictWriter(f, columns, lineterminator="\n")
      writer.writeheader()
      writer.writerows(rows)
    temporary.replace(path)


def replace_scale(path: pathlib.Path, scale: str, rows: list[dict]) -> None:
  """Writes rows of a scale into a csv; its rows of other scales stay."""
  others = [row for row in read_csv(path) if row["scale"] != scale]
  write_csv(path, others + rows)


def read_scale(path: pathlib.Path, scale: str) -> list[dict]:
  """The rows of a csv that are of a scale."""
  return [row for row in read_csv(path) if row["scale"] == scale]


def read_csv(path: pathlib.Path) -> list[dict]:
  """The rows that `write_csv` wrote; [] if there is no such file."""
  if not pathlib.Path(path).exists():
    return []
  with open(path, newline="") as f:
    reader = csv.DictReader(f)
    try:
      return [_typed(row) for row in reader]
    except (ValueError, TypeError, csv.Error) as e:
      raise ConfigError(
        f"{path}, line {reader.line_num}, is not a row of an experiment ({e});"
        " bring back the file that was written"
      ) from None


def _typed(row):
  whole = {"seed", "step", "process", "round", *COST}
  words = {*KEYS, *ORIGIN} - {"seed"}
  return {
    k: v if k in words else int(v) if k in whole else float(v)
    for k, v in row.items()
    if v != ""  # Another arm has this metric.
  }
