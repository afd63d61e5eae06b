"""Reads the files of a run for its page, the parts of them that are whole.

The run may be going on, or stopped, or of another version, and its folder is
not trusted: a damaged file becomes a sentence in `Run.problems`.
"""

import fcntl
import io
import math
import os
import pathlib
import time
from typing import NamedTuple

from moe_jax.core import files
from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib
from moe_jax.run import wording
from moe_jax.run.run_directory import LOADS
from moe_jax.run.wording import at

_FILES = ("config.json", "run.json", "metrics.jsonl")
_REMEDY = "bring it back as it was"
_LARGEST = 1e30  # Larger numbers cannot be drawn.
_PICTURES = 3  # Steps that are shown of each picture.
_PICTURE_BYTES = 1_000_000  # Limit on all pictures of a page.


class Record(NamedTuple):
  """The lines of metrics that curves are made of.

  label: in words, such as the name of the work directory.
  train, validation: {metric: number} by line, each with its "step".
  """

  label: str
  train: list[dict[str, float]]
  validation: list[dict[str, float]]


class Run(NamedTuple):
  """The files of a run, as far as they can be read.

  path: the work directory.
  record: lines of metrics.
  loads: {layer: (steps, a list of loads for each step)}.
  config, facts: of config.json and run.json; {} where they cannot be read.
  pictures: {name: (step, PNG) pairs, the latest first}.
  state: "finished", "running", "stopped" or "not begun".
  step, num_steps: the last step in the metrics, and the steps of the whole run
    or None.
  written: the time of metrics.jsonl, in words; "" without it.
  problems: a sentence for each file that is missing or damaged.
  """

  path: pathlib.Path
  record: Record
  loads: dict[str, tuple[list[int], list[list[float]]]]
  config: dict
  facts: dict
  pictures: dict[str, list[tuple[int, bytes]]]
  state: str
  step: int
  num_steps: int | None
  written: str
  problems: list[str]


def run(path: str | os.PathLike, label: str) -> Run:
  """Returns the files of a work directory.

  Args:
    path: the folder.
    label: of the run, see `labels`.

  Raises:
    ConfigError: the folder holds no run.
  """
  path, problems = pathlib.Path(path), []
  if not has_begun(path):
    raise _no_run(path, "give the --workdir of a run")
  lines = _lines(path / "metrics.jsonl", problems)
  # A run that has just begun has not written all of its files yet.
  begun = problems if lines else []
  config = _json(path, "config.json", "the config of a run", problems, begun)
  facts = _json(path, "run.json", "the record of a run", problems, begun)
  if words := config_lib.of_another_version(config):
    problems.append(f"{path / 'config.json'} {words}.")
  train, validation = (
    [_numbers(x) for x in lines if x["split"] == split]
    for split in ("train", "validation")
  )
  step = max((line["step"] for line in lines), default=0)
  num_steps = at(config, "train.num_steps")
  num_steps = num_steps if _is_step(num_steps) else None
  finished = any(line["step"] == num_steps for line in validation)
  return Run(
    path,
    Record(label, train, validation),
    _loads([x for x in lines if x["split"] == LOADS]),
    *(config, facts, _pictures(path / "pictures")),
    "finished" if finished else _state(path, step),
    *(step, num_steps, _written(path / "metrics.jsonl"), problems),
  )


def labels(paths) -> list[str]:
  """Returns short names of folders: the ends of their paths that differ."""
  # A path may hold bytes that are not UTF-8.
  texts = (os.path.abspath(p).encode(errors="replace").decode() for p in paths)
  parts = [pathlib.Path(text).parts for text in texts]
  for length in range(1, max(map(len, parts), default=0) + 1):
    names = ["/".join(p[-length:]) for p in parts]
    if len({*names}) == len({*parts}):
      return names
  return ["/".join(p) for p in parts]


def has_begun(path: pathlib.Path) -> bool:
  """Returns whether a folder is there and has a file of a run.

  Args:
    path: the folder.

  Raises:
    ConfigError: it holds folders of runs instead.
  """
  if any((path / name).exists() for name in _FILES):
    return True
  depths = ("*/", "*/*/", "*/*/*/")
  inside = (p for d in depths for p in path.glob(f"{d}config.json"))
  if one := next(inside, None):
    raise _no_run(path, f"give a run inside of it, such as {one.parent}")
  return False


def _no_run(path, remedy):
  return ConfigError(
    f"{path} holds no run, as it has none of {', '.join(_FILES)}; {remedy}"
  )


def _json(path, name, what, problems, missing):
  """A JSON object; {} and a further problem where it is damaged or missing."""
  try:
    return files.read_json(path / name, what, _REMEDY, allow_nan=True)
  except FileNotFoundError:
    missing.append(f"{path / name} is not there.")
  except ConfigError as e:
    problems.append(f"{e}.")
  return {}


def _lines(path, problems):
  """The whole lines of metrics."""
  damaged, what = [], "a line of metrics"
  try:
    whole = files.read_json_lines(
      path, what, _REMEDY, check=_check_line, damaged=damaged
    )
  except FileNotFoundError:
    return []  # A run that has just begun.
  except ConfigError as e:
    problems.append(f"{e}.")
    return []
  if lost := wording.damaged(damaged, whole, path):
    problems.append(f"{lost}; {_REMEDY}. The page shows the other lines.")
  return whole


def _check_line(line):
  """Raises ValueError for a line without a step and a split."""
  if not isinstance(line, dict):
    raise ValueError(f"it is a {type(line).__name__}")
  step, split = line.get("step"), line.get("split")
  if not _is_step(step):
    raise ValueError(f"step is {step!r:.20}")
  if not isinstance(split, str):
    raise ValueError(f"split is {split!r:.20}")


def _is_step(value):
  """Whether a value is a step: an integer that a float can hold."""
  return type(value) is int and 0 <= value < 2**53


def _numbers(line):
  """The step and the numbers of a line."""
  return {
    k: v if k == "step" else number(v)
    for k, v in line.items()
    if type(v) in (int, float)
  }


def number(value: float) -> float:
  """Returns a number that can be drawn; NaN in place of any other."""
  return float(value) if abs(value) < _LARGEST else math.nan


def _loads(lines):
  """The loads by layer, from lines in which each expert has a number."""
  by_layer = {}
  for line in lines:
    for layer, loads in line.items():
      if isinstance(loads, list) and loads:
        plain = all(type(x) in (int, float) for x in loads)
        steps, rows = by_layer.setdefault(layer, ([], []))
        if plain and len(loads) == len((rows or [loads])[0]):
          steps.append(line["step"])
          rows.append([number(x) for x in loads])
  return {layer: found for layer, found in by_layer.items() if found[0]}


def _pictures(folder):
  """The latest pictures of each name, as far as they fit on a page."""
  found, left = {}, _PICTURE_BYTES
  for place in sorted(p for p in folder.glob("*") if p.is_dir()):
    for path in sorted(place.glob("*.png"), reverse=True)[:_PICTURES]:
      content = _picture(path, left)
      if content and path.stem.isdecimal():
        found.setdefault(place.name, []).append((int(path.stem), content))
        left -= len(content)
  return found


def _picture(path, most):
  """The bytes of a whole PNG file; None if it is damaged or too large."""
  from PIL import Image  # Only where there are pictures.

  try:
    if path.is_symlink() or path.stat().st_size > most:
      return None
    content = path.read_bytes()
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
      image.verify()
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    return None
  return content


def _state(path, step):
  """ "running" or "stopped", by the lock on the folder of an unfinished run."""
  try:
    with (path / ".lock").open("rb") as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return "running"
  except OSError:  # There is no lock, or the system has none.
    pass
  return "stopped" if step else "not begun"


def _written(path):
  """The local time when a file was written, with its zone; "" without it."""
  try:
    seconds = path.stat().st_mtime
  except OSError:
    return ""
  return time.strftime("%Y-%m-%d %H:%M:%S%z", time.localtime(seconds))
