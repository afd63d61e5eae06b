"""The folder of a run: config.json, run.json, metrics.jsonl."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, InUse, RunError
from moe_jax.run import config as config_lib
from moe_jax.run import processes, provenance, wording, writers

_CONFIG, _FACTS, _METRICS = "config.json", "run.json", "metrics.jsonl"
LOADS = "loads"  # The split of lines with the load of every expert, by layer.
_STEPS = "train.num_steps"
_MOMENT = 0.2  # Seconds.
_REMEDY = "bring it back as it was, or choose another --workdir"


class RunDirectory(contextlib.ExitStack):
  """The files of a run, in a folder that is locked while they are open.

  Where several processes run it together, the first one alone reads and writes
  them, and tells the others. All processes call every method.

  Attributes:
    path: the folder.
    facts: the content of run.json when it was opened; {} for a new run.
    lines: number of lines in metrics.jsonl, after `go_on` or `start_over`.
  """

  def __init__(
    self, path: str | os.PathLike, config, extend: Callable | None = None
  ):
    """Makes the folder, or opens that of the same run to go on with it.

    Args:
      path: the work directory.
      config: the run's config.
      extend: called where only `train.num_steps` of the run has changed: (path,
        its value before, config, lines of metrics) -> None. It turns the folder
        into the folder of a run of that length, or raises. None: no run's
        length changes.

    Raises:
      InUse: another run is going on in it.
      ConfigError: it holds a run of another config or a damaged one, or not all
        processes share it.
      RunError: it cannot be written to.
    """
    super().__init__()
    self.path, self.lines = pathlib.Path(path), 0
    self._config, self._extend, self._writers = config, extend, []
    self._sizes = {}  # Bytes of the files after this process's last write.
    with contextlib.ExitStack() as stack:
      self.facts = processes.by_first(lambda: self._open(stack))
      processes.check_shared(self.path / ".lock")
      self.enter_context(stack.pop_all())

  def _open(self, stack):
    """Returns run.json, once the folder belongs to this run."""
    with files.writing(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
      stack.enter_context(_lock(self.path))
    stack.callback(self._take_back)
    facts = self._begin(self._config.to_json(indent=2, sort_keys=True))
    self._sizes = {n: _size(self.path / n) for n in (_CONFIG, _METRICS)}
    return facts

  def _begin(self, config):
    """Returns the facts of the run in the folder, or writes config.json."""
    if not self._has_begun():
      files.write_text(self.path / _CONFIG, config + "\n")
      return {}
    begun_with = self._read(_CONFIG, "the config of a run")
    known = dict(config_lib.numbers(config_lib.complete(begun_with)))
    before, steps = known.get(_STEPS), self._config.train.num_steps
    other = self._extend and type(before) is int and before != steps
    but = {_STEPS} if other else set()
    _check_same(self.path, begun_with, json.loads(config), but)
    facts = self._read(_FACTS, "the record of a run")
    for name, kind in (("data", str), ("continued", list)):
      if not isinstance(facts.get(name, kind()), kind):
        raise ConfigError(
          f"{self.path / _FACTS} is not the record of a run ({name} is"
          f" {facts[name]!r:.50}); {_REMEDY}"
        )
    if other:
      self._extend(self.path, before, self._config, self._lines()[0])
      begun_with.setdefault("train", {})["num_steps"] = steps
      text = json.dumps(begun_with, indent=2, sort_keys=True)
      files.write_text(self.path / _CONFIG, text + "\n")
    return facts

  def _take_back(self):
    """Removes the files of a run that was refused before it began."""
    if self._has_begun():
      return
    (self.path / _CONFIG).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # The folder holds something else.
      (self.path / "checkpoints").rmdir()

  def _has_begun(self):
    """Whether the folder holds a run."""
    begun = (_FACTS, _METRICS, "checkpoints/*")
    return any(any(self.path.glob(pattern)) for pattern in begun)

  def _read(self, name, what):
    try:
      return files.read_json(self.path / name, what, _REMEDY)
    except FileNotFoundError:
      raise ConfigError(
        f"{self.path} holds a run without its {name}; {_REMEDY}"
      ) from None

  def start_over(self, **facts) -> None:
    """Begins at step 0, as there is no checkpoint.

    Args:
      **facts: for run.json, see `describe`.

    Raises:
      ConfigError: the lines of metrics tell of a checkpoint that is gone, or a
        writer cannot begin.
    """
    self.go_on(0, 0, **facts)

  def go_on(self, step: int, lines: int, **facts) -> None:
    """Begins after a checkpoint; takes later lines out of metrics.jsonl.

    Args:
      step: of the checkpoint.
      lines: number of lines that were written by then.
      **facts: for run.json, see `describe`.

    Raises:
      ConfigError: some of these lines are gone, and nothing is cut; or a writer
        cannot begin.
    """
    self.lines = processes.by_first(lambda: self._begin_files(step, lines))
    links = [writer.link for writer in self._writers if writer.link]
    self.describe(step, **facts, **({"links": links} if links else {}))
    for link in links:
      print(f"its metrics are shown at {link}", file=sys.stderr)
    if step and processes.is_first():
      print(f"{self.path} goes on after step {step}", file=sys.stderr)

  def _begin_files(self, step, lines):
    """Begins the writers; returns how many lines metrics.jsonl keeps."""
    path, (there, damaged) = self.path / _METRICS, self._lines()
    lost = wording.damaged(damaged, there, _METRICS)
    # Lines after the checkpoint are written again, so these may be damaged.
    kept = [line for line in there if line["step"] <= step]
    if len(kept) < lines:
      raise ConfigError(
        f"{path} has {len(kept)} whole lines up to step {step}, where {lines} were"
        f" written{lost and f' ({lost})'}; {_REMEDY} (evaluate, generate and"
        " init_from read checkpoints only, and still work)"
      )
    if not step:
      if lost:
        raise ConfigError(f"{self.path}: {lost}; {_REMEDY}")
      self._check_lost(max((line["step"] for line in there), default=0))
    self._writers = writers.begin(self._config, self.path, step)
    for writer in self._writers:
      self.callback(writer.close)
    if path.exists():
      self._write(_METRICS, "".join(json.dumps(x) + "\n" for x in kept))
    return len(kept)

  def _check_lost(self, last):
    """Raises ConfigError if a checkpoint was written before the last line."""
    # A process may be killed while it writes its first checkpoint, and how often
    # they are saved may have been changed since the run began.
    begun_with = config_lib.complete(self._read(_CONFIG, "a config"))
    every = self._config.checkpoint.every, begun_with["checkpoint"]["every"]
    if all(type(x) is int and x for x in every) and last > 2 * max(every):
      raise ConfigError(
        f"{self.path} has metrics up to step {last} and no checkpoint, which is"
        f" saved every {every[0]} steps; bring its folder checkpoints back, or"
        " choose another --workdir to start again"
      )

  def describe(self, step: int = 0, **facts) -> None:
    """Writes run.json: versions, devices, and the given facts.

    Args:
      step: where this process starts. Above 0, facts that have changed go to
        the list "continued", and the others stay as they were at the start.
      **facts: further facts.
    """
    now = json.loads(json.dumps(provenance.facts(self._config) | facts))
    if step and self.facts:
      changed = {k: v for k, v in now.items() if v != self.facts.get(k)}
      self.facts.setdefault("continued", []).append({"step": step} | changed)
      if "plugins" in changed and processes.is_first():
        logging.warning("The plugins of %s changed; see run.json", self.path)
    else:
      self.facts = now
    text = json.dumps(self.facts, indent=2, sort_keys=True) + "\n"
    processes.by_first(lambda: self._write(_FACTS, text))

  def log(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
    """Appends a line to metrics.jsonl.

    Args:
      step: of the run.
      split: "train", "validation" or `LOADS`.
      metrics: {name: number}; for `LOADS`, {layer: list of numbers}.

    Raises:
      RunError: it cannot be written, or a file of the run was changed.
    """
    self.lines += 1
    if not processes.is_first():
      return
    self._append(json.dumps({"step": step, "split": split, **metrics}) + "\n")
    for writer in self._writers if split != LOADS else ():
      writer.log(step, split, metrics)

  def show(self, step: int, name: str, pixels) -> None:
    """Writes pictures/NAME/STEP.png, and gives it to the writers.

    Args:
      step: of the run.
      name: of the picture.
      pixels: bytes [height, width, 3].

    Raises:
      RunError: it cannot be written.
    """
    if not processes.is_first():
      return
    from PIL import Image  # Only for runs that show pictures.

    path = self.path / "pictures" / name / f"{step:08d}.png"
    with files.writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(path)
    for writer in self._writers:
      writer.image(step, name, pixels)

  def sync(self) -> None:
    """Returns when metrics.jsonl would survive a loss of power.

    Raises:
      RunError: as in `log`.
    """
    if processes.is_first():
      self._append("", sync=True)

  def _append(self, text, sync=False):
    path, raw = self.path / _METRICS, text.encode()
    with files.writing(path):
      self._check_kept()
      with path.open("ab") as f:
        f.write(raw)
        if sync:
          f.flush()
          os.fsync(f.fileno())
    self._sizes[_METRICS] += len(raw)

  def _check_kept(self):
    """Raises RunError if another program has changed a file meanwhile."""
    for name, size in self._sizes.items():
      there = _size(self.path / name)
      if there != size:
        raise RunError(
          f"{self.path / name} has {there} bytes, where this run has left {size}:"
          f" it was changed or deleted meanwhile; {_REMEDY}"
        )

  def logged(self, step: int, split: str) -> dict[str, float] | None:
    """Returns the metrics of a line; None if there is no such line.

    Args:
      step, split: of the line.
    """

    def find():
      for line in self._lines()[0]:
        if (line.pop("step"), line.pop("split")) == (step, split):
          return line

    return processes.by_first(find)

  def _lines(self):
    """The whole lines of metrics, and the numbers of the damaged ones."""
    there, damaged = (self.path / _METRICS).exists(), []
    return _read_lines(self.path, damaged=damaged) if there else [], damaged

  def _write(self, name, text):
    files.write_text(self.path / name, text)
    self._sizes[name] = len(text.encode())


def read_metrics(path: str | os.PathLike, split: str) -> list[dict]:
  """Returns the lines of a split in a run's metrics.jsonl, in order.

  Args:
    path: the work directory.
    split: as in `RunDirectory.log`.

  Raises:
    ConfigError: a line is damaged.
    FileNotFoundError: there is no such file.
  """
  return [x for x in _read_lines(pathlib.Path(path)) if x["split"] == split]


def _read_lines(path, **options):
  return files.read_json_lines(
    path / _METRICS, "a line of metrics", _REMEDY, check=_check_line, **options
  )


def _check_line(line):
  """Raises ValueError for a line of another shape."""
  if not isinstance(line, dict):
    raise ValueError(f"it is a {type(line).__name__}")
  usual = (list,) if line.get("split") == LOADS else (int, float)
  for name, value in ({"step": None, "split": None} | line).items():
    kinds = {"step": (int,), "split": (str,)}.get(name, usual)
    if type(value) not in kinds:
      raise ValueError(f"{name} is {value!r:.20}")


def _check_same(path, known, wanted, but=frozenset()):
  """Raises ConfigError if other values than those of `but` change numbers."""
  if words := config_lib.of_another_version(known):
    raise ConfigError(f"{path / _CONFIG} {words}, or choose another --workdir")
  known = config_lib.complete(known)
  known, wanted = (dict(config_lib.numbers(x)) for x in (known, wanted))
  for key in sorted({*known, *wanted} - but):
    old, new = known.get(key), wanted.get(key)
    if old != new:
      now = f"now it is {new!r}; give the same value"
      if key not in known:
        now = "it was not given there; leave it out"
      raise ConfigError(
        f"{path} holds a run with config.{key} = {old!r}, and {now} to go on with"
        " that run, or choose another --workdir"
      )


def _lock(path):
  """Opens a file that the system keeps locked while this process lives."""
  file = (path / ".lock").open("a+", errors="replace")
  lock = functools.partial(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  try:
    try:
      lock()
    except BlockingIOError:  # A page that is drawn holds it for a moment.
      time.sleep(_MOMENT)
      lock()
  except BlockingIOError:
    with file:
      file.seek(0)
      raise InUse(
        f"another run is going on in {path} ({file.read().strip()}); wait for"
        " it, or choose another --workdir"
      ) from None
  file.truncate(0)
  who = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}"
  print(who, end="", file=file, flush=True)
  return file


def _size(path):
  """Bytes of a file; 0 if it is not there."""
  return path.stat().st_size if path.exists() else 0
