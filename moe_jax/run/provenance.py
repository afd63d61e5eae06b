"""Provenance of a run: code, versions, devices."""

import hashlib
import json
import os
import pathlib
import platform
import subprocess
import time
from importlib import metadata

import jax
import numpy

import moe_jax
from moe_jax import models
from moe_jax.core import parallel
from moe_jax.models import counts
from moe_jax.moe import kernels
from moe_jax.run import config as config_lib

_PACKAGE = pathlib.Path(moe_jax.__file__).parent
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def facts(config) -> dict:
  """Returns the facts about this process for `run.json`, as JSON.

  Args:
    config: of the run, whose plugins are code too.
  """
  plugins = _digests(*config.plugins)
  code = json.dumps(_digests(_PACKAGE, name="moe_jax"))
  return {
    "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    "git": git_revision(),
    "code": _digest(code.encode()),
    "versions": _versions(),
    "python": platform.python_version(),
    "platform": jax.default_backend(),
    "devices": [d.device_kind for d in jax.devices()],
    "processes": jax.process_count(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    **({"plugins": plugins} if plugins else {}),
  }


def of_model(config, mesh, task, model, sizes: dict) -> dict:
  """Returns the facts about a run that are known before it is compiled.

  Args:
    config, mesh, task, model: from `program.build`.
    sizes: numbers of parameters, see `counts.count`.
  """
  platform = parallel.platform(mesh)
  backend = kernels.backend_for(platform, config.model.moe.grouped_matmul)
  lengths = models.lengths(model, task.lengths)
  return {
    "data": task.fingerprint,
    "data_sources": task.sources,
    "data_about": f"{task.name}: {task.about}" if task.about else "",
    "given": dict(task.given),
    "mesh": dict(parallel.grid(mesh).shape),
    "grouped_matmul": backend,
    "grouped_matmul_chosen": kernels.chosen(backend),
    "recipe": counts.describe(model),
    "parameters": sizes,
    "train_flops_per_token": counts.train_flops_per_token(
      model, sizes, lengths
    ),
    "tokens_per_step": config.data.batch_size * sum(lengths.values()),
  }


def of_process(workdir: str | os.PathLike, config) -> dict:
  """Returns the facts that all processes of a run must share, by name.

  Args:
    workdir: of the run.
    config: its config, whose plugins are code too.
  """
  values = config_lib.flat(json.loads(config.to_json()))
  return {
    "--workdir": str(workdir),
    "python": platform.python_version(),
    "jax_enable_x64": bool(jax.config.jax_enable_x64),
    **{f"the version of {p}": v for p, v in _versions().items()},
    **{f"config.{key}": value for key, value in values},
    **_digests(_PACKAGE, name="moe_jax"),
    **_digests(*config.plugins),
  }


def git_revision() -> str:
  """Returns the revision of the code's checkout, with "+" if it was edited.

  A new file is an edit too, as parts are found by their files.
  """

  def git(*args):
    options = {"cwd": _PACKAGE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.check_output(["git", *args], **options).strip()

  try:
    return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain"))
  except (OSError, subprocess.CalledProcessError):
    return ""


def _versions():
  """{package: its version}."""
  versions = {name: metadata.version(name) for name in _LIBRARIES}
  return versions | {m.__name__: m.__version__ for m in (numpy, moe_jax)}


def _digests(*folders, name=None):
  """{path of a Python file: digest} for all in some folders.

  Args:
    *folders: the folders.
    name: the beginning of the paths, in place of the folder.
  """
  return {
    f"{name or folder}/{path.relative_to(folder)}": _digest(path.read_bytes())
    for folder in folders
    for path in sorted(pathlib.Path(folder).rglob("*.py"))
  }


def _digest(content):
  return hashlib.sha256(content).hexdigest()[:16]
