"""What a run leaves behind: config.json, run.json, metrics.jsonl."""

import json
import os
import pathlib
import subprocess
import time
from importlib import metadata

import jax

from moe_jax import config as config_lib
from moe_jax.errors import ConfigError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain", "moe_jax")


class RunDirectory:
  """Writes one run's files. Refuses a folder that already holds a run."""

  def __init__(self, path: str | os.PathLike, config):
    """Makes the folder.

    Args:
      path: the work directory; it may exist, but must hold no metrics.jsonl.
      config: the run's config.

    Raises:
      ConfigError: it holds a run, or cannot be written to.
    """
    self.path = pathlib.Path(path)
    if (self.path / "metrics.jsonl").exists():
      raise ConfigError(
        f"{self.path} already holds a run (metrics.jsonl); choose another"
        " --workdir, or move that one away"
      )
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._write("config.json", config_lib.to_json(config))
    except OSError as e:
      raise ConfigError(
        f"the work directory {self.path} cannot be written to"
        f" ({e.strerror}); choose another --workdir"
      ) from None

  def describe(self, **facts) -> None:
    """Writes run.json: versions, devices, and the given facts."""
    run = {
      "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
      "git": _git(),
      "versions": {p: metadata.version(p) for p in _PACKAGES if _has(p)},
      "platform": jax.default_backend(),
      "devices": [d.device_kind for d in jax.devices()],
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
      **facts,
    }
    self._write("run.json", json.dumps(run, indent=2, sort_keys=True))

  def log(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Appends one line to metrics.jsonl."""
    line = {"step": step, "split": split, **metrics}
    with open(self.path / "metrics.jsonl", "a") as f:
      f.write(json.dumps(line) + "\n")

  def _write(self, name, text):
    temporary = self.path / f".{name}"
    temporary.write_text(text + "\n")
    temporary.replace(self.path / name)


def read_metrics(path: str | os.PathLike, split: str) -> list[dict]:
  """The lines of a run's metrics.jsonl of one split, in order."""
  with open(pathlib.Path(path, "metrics.jsonl")) as f:
    lines = [json.loads(line) for line in f]
  return [line for line in lines if line["split"] == split]


def _git():
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
