"""One run of a question: its folder, its row of results and its curve."""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from moe_jax.core.errors import ConfigError
from moe_jax.core.files import writing

KEYS = ("scale", "arm", "seed", "config_digest")
ORIGIN = ("data", "revision")
COST = ("steps", "active_parameters", "total_parameters", "train_flops")
_POINTS = 100  # Maximum of training points in a curve.
_LAST = 0.25  # The part of training that `summary` averages over.


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is wanted.

  folder: where its files lie; a run of another config has another one.
  config: without the run's seed.
  tried: what is tried with it, {config key: value}, if it is for tuning.
  """

  scale: str
  arm: str
  seed: int
  config_digest: str
  folder: pathlib.Path
  config: ml_collections.ConfigDict | None = dataclasses.field(
    default=None, repr=False, compare=False
  )
  tried: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def arm_and_tried(self) -> str:
    """The arm, and what is tried with it."""
    tried = (f"{k.split('.')[-1]}={v:g}" for k, v in self.tried.items())
    return " ".join([self.arm, *tried])

  @property
  def name(self) -> str:
    """The run in words."""
    return f"{self.arm_and_tried} seed {self.seed}"

  @property
  def key(self) -> dict:
    """The first columns of the run's rows, by which it is known."""
    return {k: getattr(self, k) for k in KEYS}

  def row(self) -> dict | None:
    """The row in its folder; None if the run is not finished."""
    row = _read_row(self.folder / "row.json")
    return row if row and identity(row) == identity(self.key) else None

  def fingerprint(self) -> str | None:
    """Fingerprint of the data that the run started with; None before that."""
    try:
      return self._json("run.json")["data"]
    except (OSError, ValueError, KeyError):
      return None

  def finish(self, validation: dict[str, float] | None) -> None:
    """Writes the run's row, the mark that it is finished.

    Args:
      validation: metrics of the validation split at the end; None: it diverged.
    """
    row = self.key | self._origin_and_cost()
    if validation is None:
      row["diverged"] = 1.0
    else:
      row |= summary(self._lines("train"), validation)
    path, temporary = self.folder / "row.json", self.folder / ".row.json"
    with writing(path):
      temporary.write_text(json.dumps(row, indent=2) + "\n")
      os.replace(temporary, path)

  def _origin_and_cost(self):
    """The columns `ORIGIN` and `COST`: data, code, and the training's size."""
    facts, config = self._json("run.json"), self._json("config.json")
    git, steps = facts["git"], config["train"]["num_steps"]
    tokens = steps * facts["tokens_per_step"]
    return {
      "data": facts["data"][:12],
      "revision": git[:12] + "+" * git.endswith("+"),
      "steps": steps,
      "active_parameters": facts["parameters"]["active"],
      "total_parameters": facts["parameters"]["total"],
      "train_flops": tokens * facts["train_flops_per_token"],
    }

  def curve(self) -> list[dict]:
    """At most a hundred lines of training metrics, then the evaluations.

    Metrics of evaluations are called validation/METRIC. [] without any lines.
    """
    try:
      points, evaluations = self._lines("train"), self._lines("validation")
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

  def _json(self, name):
    return json.loads((self.folder / name).read_text())

  def _lines(self, split):
    from moe_jax.run import run_directory

    return run_directory.read_metrics(self.folder, split)


def identity(row: Mapping) -> tuple:
  """The values of `KEYS`, by which a row and its run belong together."""
  return tuple(row.get(k) for k in KEYS)


def grouped(pairs: Iterable[tuple]) -> dict[Any, list]:
  """{key: values} of (key, value), in the order in which they come."""
  groups = {}
  for key, value in pairs:
    groups.setdefault(key, []).append(value)
  return groups


def finished(workdir: pathlib.Path) -> list[dict]:
  """The rows of all runs that are finished in a work directory."""
  folders = (workdir, workdir / "tuning")
  paths = (p for f in folders for p in sorted(f.glob("*/*/*/row.json")))
  return [row for row in map(_read_row, paths) if row]


def _read_row(path):
  """A row; None where there is none, or something else."""
  try:
    row = json.loads(path.read_text())
    types = [type(row.get(k)) for k in KEYS]
  except (OSError, ValueError, AttributeError):
    return None
  return row if types == [str, str, int, str] else None


def diverged(row: dict) -> bool:
  """Whether a row is of a run that diverged, and has no metrics."""
  return "diverged" in row


def summary(lines: list[dict], validation: dict[str, float]) -> dict:
  """The metrics of a row.

  Args:
    lines: of training, from `run_directory.read_metrics`.
    validation: metrics of the validation split at the end.

  Returns:
    The validation metrics, and train/NAME: the training metrics' mean over the
    last quarter of the steps.
  """
  late = [x for x in lines if x["step"] > (1 - _LAST) * lines[-1]["step"]]
  # A line of steps that were all skipped has no metrics.
  values = grouped(item for line in late for item in line.items())
  means = {k: v for k, v in values.items() if k not in ("step", "split")}
  return validation | {f"train/{k}": sum(v) / len(v) for k, v in means.items()}


def write_csv(path: pathlib.Path, rows: list[dict]) -> None:
  """Writes rows under the union of their columns."""
  columns = list(dict.fromkeys(k for row in rows for k in row))
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  with writing(path):
    with open(temporary, "w", newline="") as f:
      writer = csv.DictWriter(f, columns, lineterminator="\n")
      writer.writeheader()
      writer.writerows(rows)
    temporary.replace(path)


def replace_scale(path: pathlib.Path, scale: str, rows: list[dict]) -> None:
  """Writes rows of a scale into a csv; its rows of other scales stay."""
  path = pathlib.Path(path)
  others = [row for row in read_csv(path) if row["scale"] != scale]
  write_csv(path, others + rows)


def read_csv(path: pathlib.Path) -> list[dict]:
  """The rows that `write_csv` wrote; [] if there is no such file."""
  if not path.exists():
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
