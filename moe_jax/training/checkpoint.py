"""Checkpoints, over Orbax: written while training goes on, checked when read.

FOLDER/STEP/state holds the arrays, FOLDER/STEP/meta a JSON of the rest. A
checkpoint is there as a whole or not at all. If it has changed since, its
checksums tell: it is set aside, and the checkpoint before it is used.
"""

import contextlib
import errno
import itertools
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from moe_jax.core import checksums, files
from moe_jax.core.errors import ConfigError, RunError, first_line
from moe_jax.core.options import integer, optional
from moe_jax.run import processes

OPTIONS = {
  "every": integer(0),
  "keep_last": integer(1),
  "keep_every": optional(integer(1)),
}
_MARGIN = 100_000  # Bytes of a checkpoint besides its arrays.
_ERRORS = errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM
# Errors of a machine that lacks a resource; the checkpoint may be whole.
_LACKS = re.compile(
  "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|"
  "MemoryError|" + "|".join(os.strerror(number) for number in _ERRORS)
)
_FORMAT = 2  # Add one when the meaning of a checkpoint changes.


class _Damaged(Exception):
  """A checkpoint is not as it was written."""


class Restored(NamedTuple):
  """A checkpoint that was read. meta: the argument of `save`."""

  step: int
  state: Any
  meta: Mapping[str, Any]


class Checkpoints:
  """The checkpoints of one run.

  Where several processes run it together, all of them call every method.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep_last: int = 3,
    keep_every: int | None = None,
  ):
    """Opens the folder, which need not exist yet.

    Args:
      folder: of the checkpoints, and of no other files.
      keep_last: how many of the newest to keep, >= 1.
      keep_every: also keep those of steps that it divides; None: no others.
    """
    import orbax.checkpoint as ocp  # Slow to import.

    self.folder = pathlib.Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep_last,
      keep_period=keep_every,
      cleanup_tmp_directories=True,  # Left by a killed process.
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._writing = None  # The step that is being written.

  def steps(self) -> list[int]:
    """Returns the steps of whole checkpoints, ascending, on all processes."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint in the background, once the one before is written.

    Args:
      step: of the checkpoint; if it has one already, nothing is written.
      state: a pytree of arrays. They are copied before this returns, so that
        they may be donated.
      meta: a value that JSON can hold.

    Raises:
      RunError: this one, or the one before it, cannot be written.
    """
    import orbax.checkpoint as ocp

    self.wait()
    if step in self.steps():
      return
    about = {"format": _FORMAT, "meta": dict(meta)}
    about["arrays"] = checksums.of_arrays(state)
    about["checksum"] = checksums.of_json(about)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(about)
    )
    self._writing = step
    with self._failing():
      _check_space(self.folder, state)
      self._manager.save(step, args=args)

  def wait(self) -> None:
    """Returns when everything is written; raises RunError if it cannot be."""
    with self._failing():
      self._manager.wait_until_finished()
    self._writing = None

  @contextlib.contextmanager
  def _failing(self):
    """Turns an error of writing into one sentence."""
    try:
      yield
    except Exception as e:
      whole = newest_first(self.folder, before=self._writing or math.inf)
      last = (
        f"the last whole one is {whole[0]}" if whole else "no other is whole"
      )
      raise RunError(
        f"the checkpoint of step {self._writing} cannot be written to"
        f" {self.folder} ({first_line(e)}); {last}."
        " Free space on that disk, older runs for instance, and give the same"
        " command to go on"
      ) from e

  def restore(self, like) -> Restored | None:
    """Reads the newest whole checkpoint.

    Args:
      like: a pytree of jax.ShapeDtypeStruct with the shardings to restore to.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      ConfigError: it is of another model or version, or all are damaged.
      RunError: it cannot be read just now, and may be whole.
    """
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(state=ocp.args.StandardRestore(like))

    def read(folder):
      return self._manager.restore(int(folder.name), args=args).state

    folders = [self.folder / str(step) for step in reversed(self.steps())]
    if not folders:
      return None
    wanted = checksums.types(like)
    damaged, state, meta = _newest_whole(folders, read, wanted=wanted)
    step = int(folders[len(damaged)].name)
    if damaged:
      processes.by_first(lambda: _set_aside(damaged))
      logging.warning("Going on from the one before it, step %d", step)
      self._manager.reload()
    return Restored(step, state, meta)

  def close(self) -> None:
    """Waits, and lets go of the folder."""
    try:
      self.wait()
    finally:
      self._manager.close()


def load_params(path: str | os.PathLike) -> dict:
  """Returns parameters, in numpy; raises as `load_step`.

  Args:
    path: a checkpoint (runs/tiny/checkpoints/300), or a work directory for its
      newest whole one.
  """
  return load_variables(path)["params"]


def load_variables(path: str | os.PathLike, ema: bool = False) -> dict:
  """Returns {"params", "balance"} for `model.apply`; raises as `load_step`.

  Args:
    path, ema: as in `load_step`.
  """
  return load_step(path, ema)[1]


def load_step(path: str | os.PathLike, ema: bool = False) -> tuple[int, dict]:
  """Returns (the step of a checkpoint, {"params", "balance"} in numpy).

  Args:
    path: as in `load_params`.
    ema: the moving average of the parameters in their place.

  Raises:
    ConfigError: there is no checkpoint that can be read, or no average in it.
    RunError: the newest cannot be read just now, and may be whole.
  """
  params = "ema" if ema else "params"
  names = params, "balance"
  folders = folders_of(pathlib.Path(path).absolute())
  damaged, variables, _ = _newest_whole(
    folders, lambda folder: _read_arrays(folder, names), parts=names
  )
  if params not in variables:
    raise ConfigError(
      f"the checkpoint in {path} has no moving average of its parameters, as"
      " its run has train.ema = None; leave --ema out"
    )
  step = int(folders[len(damaged)].name)
  return step, variables | {"params": variables.pop(params)}


def _read_arrays(folder, names):
  """The parts of the state that are there, as numpy arrays."""
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(folder / "state").tree
  wanted = {name: tree[name] for name in names if tree.get(name)}
  if not wanted:
    return {}
  kinds = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
  )
  args = ocp.args.PyTreeRestore(
    wanted, restore_args=kinds, partial_restore=True
  )
  return handler.restore(folder / "state", args=args)


def folders_of(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns a path's checkpoints, newest first; ConfigError if it has none."""
  if (path / "state").is_dir():
    return [path]
  if folders := newest_first(path / "checkpoints") or newest_first(path):
    return folders
  raise ConfigError(
    f"there is no checkpoint in {path}; give a run's work directory or a folder"
    " such as runs/tiny/checkpoints/300"
  )


def newest_first(folder: pathlib.Path, before=math.inf) -> list[pathlib.Path]:
  """Returns the checkpoints of a folder, in descending order of steps.

  Args:
    folder, before: the folder; only steps below `before`.
  """
  steps = [int(f.name) for f in folder.glob("*") if f.name.isdigit()]
  steps.sort(reverse=True)
  return [folder / str(step) for step in steps if step < before]


def _newest_whole(folders, read, **options):
  """Reads the newest whole checkpoint, or raises as `_read`.

  Args:
    folders: of the checkpoints, the newest first.
    read: folder -> its arrays.
    **options: of `_read`.

  Returns:
    (folders of newer ones, which are damaged; its arrays; its meta).
  """
  for number, folder in enumerate(folders):
    try:
      return folders[:number], *_read(folder, read, **options)
    except _Damaged:
      continue
  raise ConfigError(
    f"no checkpoint in {folders[0].parent} can be read:"
    f" {', '.join(f.name for f in folders)} are damaged; give another, or move"
    " them away to start again from step 0"
  )


def _read(folder, read, *, parts=None, wanted=None):
  """Returns (arrays, meta) of a checkpoint; raises as `load_step`, or _Damaged.

  Args:
    folder, read: as in `_newest_whole`.
    parts: of the state, which are read; None: all.
    wanted: the right types, from `checksums.types`; None: those that were
      saved.
  """
  about = _tried(folder, _about, folder)
  if about["format"] != _FORMAT:
    raise ConfigError(
      f"the checkpoint {folder} has format {about['format']}, not {_FORMAT}; use"
      " the version of moe_jax that wrote it, or another --workdir"
    )
  saved = {
    name: array
    for name, array in about["arrays"].items()
    if parts is None or name.split("/")[0] in parts
  }
  if wanted is not None:
    _check_model(folder, {k: kind for k, (kind, _) in saved.items()}, wanted)
  arrays = _tried(folder, read, folder)
  _tried(folder, _compare, arrays, saved)
  return arrays, about["meta"]


def _tried(folder, function, *args):
  """Returns function(*args), which reads from the folder of a checkpoint.

  Where several processes run, all of them call it: each reads other bytes, and
  all need a whole checkpoint.

  Raises:
    _Damaged: the function raised on one of them; a warning has told why.
    RunError: an error that says nothing about the checkpoint.
  """
  result = problem = None
  try:
    result = function(*args)
  except Exception as e:  # Damage makes Orbax raise many kinds of errors.
    problem = f"{type(e).__name__}: {first_line(e)}"
  problem = next(filter(None, processes.gather(problem)), None)
  if problem is None:
    return result
  if _LACKS.search(problem):
    raise RunError(
      f"the checkpoint {folder} cannot be read ({problem}), though it may be"
      " whole; give the same command again when it can, or move it away to use"
      " the one before it"
    )
  logging.warning("The checkpoint %s is damaged (%s)", folder, problem)
  raise _Damaged


def _about(folder) -> dict:
  """Returns the JSON that was saved beside the arrays.

  Raises:
    ValueError: it is damaged. Format 1 had no checksum of it.
  """
  about = files.read_json(
    folder / "meta" / "metadata", "what was saved", "", allow_nan=True
  )
  checksum = about.pop("checksum", None)
  if checksum is None and about.get("format") == 1:
    return about
  if checksum != checksums.of_json(about):
    raise ValueError("its JSON does not have the checksum that was saved")
  return about


def _compare(arrays, saved):
  """Raises ValueError for arrays that are damaged."""
  if checksums.of_arrays(arrays) != saved:
    raise ValueError("its arrays do not have the checksums that were saved")


def _check_model(folder, there, wanted):
  differ = [k for k in {*there, *wanted} if there.get(k) != wanted.get(k)]
  if differ:
    words = ", ".join(
      f"{k} is {there.get(k, 'nothing')} there and {wanted.get(k, 'nothing')} here"
      for k in sorted(differ)[:3]
    )
    raise ConfigError(
      f"the checkpoint {folder} is of another model or another version of moe_jax:"
      f" {len(differ)} of its arrays differ ({words}); use the config and the version"
      " that its run began with (config.json, run.json), or another --workdir"
    )


def _set_aside(folders):
  """Moves damaged checkpoints away, as their steps are written again."""
  aside = folders[0].parent.with_name("damaged_checkpoints")
  aside.mkdir(exist_ok=True)
  for folder in folders:
    names = (aside / f"{folder.name}.{n}" for n in itertools.count(1))
    folder.rename(next(to for to in names if not to.exists()))


def _check_space(folder, state):
  """Raises OSError now for a disk that would be full half way through."""
  needed = sum(x.nbytes for x in jax.tree.leaves(state)) + _MARGIN
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise OSError(
      f"it needs up to {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are"
      " free there"
    )
