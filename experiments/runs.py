"""One run of a question: its folder, and whether it is finished."""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

from moe_jax.core.errors import naming

KEYS = ("scale", "arm", "seed", "config_digest")
ORIGIN = ("data", "revision")
COST = ("steps", "active_parameters", "total_parameters", "train_flops")
_POINTS = 100  # Of a curve, at most.
_LAST = 0.25  # The part of training that `summary` averages over.


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that is wanted.

  folder: of its own, which no run of another config has.
  tried: what is tried with it, {config key: value}, if it is for tuning.
  """

  scale: str
  arm: str
  seed: int
  config_digest: str
  folder: pathlib.Path
  tried: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """The arm, and what is tried with it."""
    tried = (f"{k.split('.')[-1]}={v:g}" for k, v in self.tried.items())
    return " ".join([self.arm, *tried])

  @property
  def key(self) -> dict:
    """What the run's rows begin with."""
    return {k: getattr(self, k) for k in KEYS}

  def row(self) -> dict | None:
    """Its row of results; None if it is not finished, or of another config."""
    try:
      row = json.loads((self.folder / "row.json").read_text())
    except (OSError, ValueError):
      return None
    return row if self.is_of(row) else None

  def is_of(self, row) -> bool:
    """Whether a row is this run's."""
    return isinstance(row, dict) and all(
      row.get(k) == v for k, v in self.key.items()
    )

  def fingerprint(self) -> str | None:
    """Of the data that its folder's run began with; None if there is none."""
    try:
      return self._facts()["data"]
    except (OSError, ValueError, KeyError):
      return None

  def _facts(self):
    return json.loads((self.folder / "run.json").read_text())

  def _origin(self):
    """Of which data and code it is, so that rows of several are noticed."""
    facts = self._facts()
    git = facts["git"]
    edited = "+" if git.endswith("+") else ""
    return {"data": facts["data"][:12], "revision": git[:12] + edited}

  def _cost(self):
    """What it took: steps, and operations of its active parameters."""
    facts = self._facts()
    config = json.loads((self.folder / "config.json").read_text())
    steps, data = config["train"]["num_steps"], config["data"]
    tokens = steps * data["batch_size"] * data["seq_len"]
    parameters = (facts["parameters"][k] for k in ("active", "total"))
    flops = tokens * facts["train_flops_per_token"]
    return dict(zip(COST, (steps, *parameters, flops), strict=True))

  def finish(self, validation: dict[str, float] | None) -> None:
    """Writes its row, the mark that the run is whole.

    Args:
      validation: metrics of the validation split at the end; None: it diverged.
    """
    found = {"diverged": 1.0}
    if validation is not None:
      found = summary(self._lines("train"), validation)
    row = self.key | self._origin() | self._cost() | found
    path, temporary = self.folder / "row.json", self.folder / ".row.json"
    with naming(path):
      temporary.write_text(json.dumps(row, indent=2) + "\n")
      os.replace(temporary, path)

  def curve(self) -> list[dict]:
    """Some hundred lines of its training metrics, at most; [] without any.

    Then those of its evaluations, as validation/METRIC.
    """
    try:
      lines, evaluations = self._lines("train"), self._lines("validation")
    except OSError:
      return []
    every = -(-len(lines) // _POINTS) or 1
    lines = lines[::-every][::-1]  # Always the last one.
    named = [dict(line) for line in lines]
    for line in evaluations:
      step = {"step": line.pop("step")}
      named.append(step | {f"validation/{k}": v for k, v in line.items()})
    extra = ("split", "validation/split")
    return [
      self.key | {k: v for k, v in line.items() if k not in extra}
      for line in named
    ]

  def _lines(self, split):
    from moe_jax.run import run_directory

    return run_directory.read_metrics(self.folder, split)


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
  names = dict.fromkeys(k for x in late for k in x)
  out = dict(validation)
  for name in names:
    # A line of steps that were all skipped has no metrics.
    found = [x[name] for x in late if name in x]
    if name not in ("step", "split"):
      out[f"train/{name}"] = sum(found) / len(found)
  return out


def write_csv(path: pathlib.Path, rows: list[dict]) -> None:
  """Writes rows under the union of their columns."""
  columns = list(dict.fromkeys(k for row in rows for k in row))
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  with naming(path):
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
  """What `write_csv` wrote; [] if there is no such file."""
  if not path.exists():
    return []
  with open(path, newline="") as f:
    return [_typed(row) for row in csv.DictReader(f)]


def _typed(row):
  whole = {"seed", "step", "process", "round", *COST}
  words = {*KEYS, *ORIGIN} - {"seed"}
  return {
    k: v if k in words else int(v) if k in whole else float(v)
    for k, v in row.items()
    if v != ""  # Another arm has this metric.
  }
