"""What a run leaves behind: config.json, run.json, metrics.jsonl."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import socket
import subprocess
import time
from importlib import metadata

import jax

from moe_jax.core.errors import ConfigError, InUse, RunError, naming
from moe_jax.run import config as config_lib
from moe_jax.run import processes, writers

_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "grain",
  "moe_jax",
)


class RunDirectory:
  """One run's files, for one run at a time.

  Where several processes run it together, the first one alone reads and writes
  them, and tells the others.

  Attributes:
    path: the folder.
    facts: what run.json said when it was opened; {} for a new run.
    lines: how many metrics.jsonl has.
  """

  def __init__(self, path: str | os.PathLike, config):
    """Makes the folder, or opens that of the same run to go on with it.

    Args:
      path: the work directory.
      config: the run's config.

    Raises:
      InUse: another run is going on in it.
      ConfigError: it holds a run of another config, it cannot be written to,
        or not all processes share it.
    """
    self.path = pathlib.Path(path)
    self._config, self._writers, self._lock = config, [], None
    self._is_first = processes.is_first()
    self.facts, self.lines, mark = processes.by_first(self._open)
    try:
      self._check_shared(mark)
    except ConfigError:
      self.close()
      raise

  def _open(self):
    """What run.json said, how many lines metrics.jsonl has, and .lock."""
    with contextlib.ExitStack() as on_error:
      try:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = on_error.enter_context(_lock(self.path))
        self._begin(config_lib.to_json(self._config))
      except OSError as e:
        raise ConfigError(
          f"the work directory {self.path} cannot be written to"
          f" ({e.strerror}); choose another --workdir"
        ) from None
      on_error.pop_all()
    facts = _read_json(self.path / "run.json") or {}
    return facts, len(self._read_lines()), self._read_mark()

  def _check_shared(self, mark):
    """Raises ConfigError, on all processes, where one sees another folder."""
    seen = processes.seen(lambda: self._read_mark() == mark)
    if not all(seen):
      raise ConfigError(
        f"process {seen.index(False)} does not see what process 0 has written"
        f" in {self.path.absolute()}; give a --workdir that all processes share"
      )

  def _read_mark(self):
    try:
      return (self.path / ".lock").read_text()
    except OSError:
      return None

  def write_to(self, names, step: int) -> None:
    """Logs to other places too, see `writers`.

    Args:
      names: of the writers.
      step: that the run goes on from.
    """

    def build():
      self._writers = writers.build(
        names, self.path, self._config.to_dict(), step
      )

    processes.by_first(build)

  def _begin(self, config):
    known = _read_json(self.path / "config.json")
    if known is not None and self._has_begun():
      _check_same(self.path, known, json.loads(config))
      return
    if self._has_begun():
      raise ConfigError(
        f"{self.path} holds a run without its config.json; choose another"
        " --workdir, or move that one away"
      )
    self._write("config.json", config + "\n")

  def _has_begun(self):
    """Whether it holds more than a config.json, as one that was refused does."""
    checkpoints = self.path / "checkpoints"
    return (
      (self.path / "run.json").exists()
      or self._metrics.exists()
      or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    )

  def describe(self, step: int = 0, **facts) -> None:
    """Writes run.json: versions, devices, and the given facts.

    Args:
      step: where this process starts. Above 0, what it found goes to the list
        "continued", and the rest stays as it was at the start.
      **facts: more of it.
    """
    now = {
      "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
      "git": git_revision(),
      "versions": {p: metadata.version(p) for p in _PACKAGES if _has(p)},
      "python": platform.python_version(),
      "platform": jax.default_backend(),
      "devices": [d.device_kind for d in jax.devices()],
      "processes": jax.process_count(),
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
      **facts,
    }
    if step and self.facts:
      changed = {k: v for k, v in now.items() if v != self.facts.get(k)}
      self.facts.setdefault("continued", []).append({"step": step} | changed)
    else:
      self.facts = now
    text = json.dumps(self.facts, indent=2, sort_keys=True)
    processes.by_first(lambda: self._write("run.json", text + "\n"))

  def log(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Appends one line to metrics.jsonl.

    Raises:
      RunError: the disk is full, for instance.
    """
    line = {"step": step, "split": split, **metrics}
    self.lines += 1
    if not self._is_first:
      return
    try:
      with open(self._metrics, "a") as f:
        f.write(json.dumps(line) + "\n")
    except OSError as e:
      raise RunError(
        f"{self._metrics} cannot be written to ({e.strerror});"
        " free space on that disk, older runs for instance, and give the same"
        " command to go on from the last checkpoint"
      ) from None
    for writer in self._writers:
      writer.log(step, split, metrics)

  def sync(self) -> None:
    """Returns when metrics.jsonl would survive a loss of power."""
    if not self._is_first:
      return
    with naming(self._metrics), open(self._metrics, "a") as f:
      os.fsync(f.fileno())

  def cut(self, step: int, at_least: int = 0) -> None:
    """Takes the lines after a step out of metrics.jsonl, and broken ones.

    Args:
      step: of the last line that stays.
      at_least: how many were written by then.

    Raises:
      ConfigError: some of these are gone; nothing is cut then.
    """
    self.lines = processes.by_first(lambda: self._cut(step, at_least))

  def _cut(self, step, at_least):
    kept = [x for x in self._read_lines() if x["step"] <= step]
    if len(kept) < at_least:
      raise ConfigError(
        f"{self._metrics} has {len(kept)} whole lines up to step {step}, where"
        f" {at_least} were written; bring them back, or choose another"
        " --workdir to start again"
      )
    if self._metrics.exists():
      text = "".join(json.dumps(x) + "\n" for x in kept)
      self._write("metrics.jsonl", text)
    return len(kept)

  def first_config(self) -> dict:
    """As the run was begun, of which what changes no number may have changed."""
    return processes.by_first(lambda: _read_json(self.path / "config.json"))

  def last_step(self) -> int:
    """Of the last line of metrics.jsonl; 0 if it has none."""

    def last():
      return max((x["step"] for x in self._read_lines()), default=0)

    return processes.by_first(last)

  def logged(self, step: int, split: str) -> dict[str, float] | None:
    """The metrics of a line, if there is one of that step and split."""
    return processes.by_first(lambda: self._logged(step, split))

  def _logged(self, step, split):
    for line in self._read_lines():
      if (line["step"], line["split"]) == (step, split):
        return {k: v for k, v in line.items() if k not in ("step", "split")}
    return None

  @property
  def _metrics(self):
    return self.path / "metrics.jsonl"

  def _read_lines(self):
    return _lines(self._metrics) if self._metrics.exists() else []

  def close(self) -> None:
    """Lets another run have it."""
    for writer in self._writers:
      writer.close()
    if self._lock is not None:
      self._lock.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _write(self, name, text):
    temporary = self.path / f".{name}"
    with naming(self.path / name):
      temporary.write_text(text)
      temporary.replace(self.path / name)


def facts_of_a_process(workdir: str | os.PathLike, config) -> dict[str, str]:
  """What all processes of a run must have alike, for `processes.check_same`.

  Args:
    workdir: of the run.
    config: its config, whose plugins are code too.
  """
  values = config_lib.flat(json.loads(config_lib.to_json(config)))
  package = pathlib.Path(__file__).parents[1]
  sources = [(package.name, p, package) for p in package.rglob("*.py")]
  for folder in map(pathlib.Path, config.plugins):
    sources += [(str(folder), p, folder) for p in folder.rglob("*.py")]
  return {
    "--workdir": str(workdir),
    "python": platform.python_version(),
    "jax_enable_x64": bool(jax.config.jax_enable_x64),
    **{
      f"the version of {p}": metadata.version(p) for p in _PACKAGES if _has(p)
    },
    **{f"config.{key}": value for key, value in values},
    **{
      f"{name}/{file.relative_to(folder)}": _digest(file)
      for name, file, folder in sources
    },
  }


def _digest(file):
  return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _lock(path):
  """A file that the system keeps locked while this process lives."""
  file = (path / ".lock").open("a+")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    with file:
      file.seek(0)
      raise InUse(
        f"another run is going on in {path} ({file.read().strip()}); wait for"
        " it, or choose another --workdir"
      ) from None
  file.truncate(0)
  since = datetime.datetime.now().isoformat(" ")
  file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
  file.flush()
  return file


def _check_same(path, known, wanted):
  """Raises ConfigError for a value that would change the run's numbers."""
  known, wanted = (dict(config_lib.numbers(x)) for x in (known, wanted))
  for key in sorted({*known, *wanted}):
    old, new = (d.get(key, "not set") for d in (known, wanted))
    if old != new:
      raise ConfigError(
        f"{path} holds a run with config.{key} = {old!r}, and now it is"
        f" {new!r}; give the same value to go on with that run, or choose"
        " another --workdir"
      )


def _read_json(path):
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return None


def _lines(path):
  """The lines of metrics.jsonl up to the first that is broken.

  The last one is, where a process was killed while it wrote it.
  """
  found = []
  with open(path) as f:
    for line in f:
      try:
        value = json.loads(line)
        found.append(value | {"step": int(value["step"])})
      except (ValueError, TypeError, KeyError):
        break
  return found


def read_metrics(path: str | os.PathLike, split: str) -> list[dict]:
  """The lines of a run's metrics.jsonl of one split, in order."""
  lines = _lines(pathlib.Path(path, "metrics.jsonl"))
  return [line for line in lines if line["split"] == split]


def git_revision() -> str:
  """Revision of the checkout the code runs from, with "+" if it was edited."""

  def git(*args):
    done = subprocess.run(
      ["git", *args],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
    )
    return done.stdout.strip() if done.returncode == 0 else ""

  try:
    revision = git("rev-parse", "HEAD")
    return revision + ("+" if git("status", "--porcelain") else "")
  except OSError:
    return ""


def _has(package):
  try:
    metadata.version(package)
  except metadata.PackageNotFoundError:
    return False
  return True
