"""Checkpoints, over Orbax: written while training goes on, checked when read.

FOLDER/STEP/state holds the arrays, FOLDER/STEP/meta a JSON of what else is
needed to go on. A checkpoint is there as a whole or not at all; one whose
bytes changed later is noticed by its digest, set aside, and the one before it
is used. Arrays are restored onto any mesh.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from moe_jax.core.errors import ConfigError, RunError, first_line
from moe_jax.run import processes

_MARGIN = 100_000  # Bytes of a checkpoint besides its arrays.
_ERRORS = errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM
# What is said where a machine lacks something; the checkpoint may be whole.
_LACKS = re.compile(
  "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|"
  "MemoryError|" + "|".join(os.strerror(number) for number in _ERRORS)
)
_FORMAT = 1  # Raise it when a checkpoint means something else than before.


class Restored(NamedTuple):
  """A checkpoint that was read. meta: what was given to `save`."""

  step: int
  state: Any
  meta: Mapping[str, Any]


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep_last: int = 3,
    keep_every: int | None = None,
  ):
    """Opens the folder; it need not exist yet.

    Args:
      folder: where they lie; nothing else does.
      keep_last: how many of the newest to keep, >= 1.
      keep_every: keep those of steps that are multiples of it too; None: no.
    """
    check(keep_last, keep_every)
    self.folder = pathlib.Path(folder).absolute()
    self._manager = _manager(self.folder, keep_last, keep_every)
    self._writing = None  # The step that is being written.

  def steps(self) -> list[int]:
    """Steps of the whole checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint in the background, once the one before is written.

    Args:
      step: its number; one that is there already is not written again.
      state: a pytree of arrays. They are copied before this returns, so that
        they may be donated.
      meta: what JSON can hold.

    Raises:
      RunError: this one, or the one before it, cannot be written.
    """
    import orbax.checkpoint as ocp

    self.wait()
    if step in self.steps():
      return
    meta = {
      "format": _FORMAT,
      "digest": digest(state),
      "shapes": _shapes(state),
      "meta": dict(meta),
    }
    self._writing = step
    with self._failing():
      self._check_space(state)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        ),
      )

  def wait(self) -> None:
    """Returns when everything is written.

    Raises:
      RunError: it cannot be written.
    """
    with self._failing():
      self._manager.wait_until_finished()
    self._writing = None

  def restore(self, like) -> Restored | None:
    """Reads the newest whole checkpoint.

    Args:
      like: a pytree of jax.ShapeDtypeStruct with the shardings to restore to.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      ConfigError: it is of another model, or all of them are damaged.
      RunError: it cannot be read just now, and may be whole.
    """
    damaged = []
    for step in reversed(self.steps()):
      found, problem = self._read(step, like)
      if problem:
        logging.warning(
          "The checkpoint %s is damaged (%s)", self.folder / str(step), problem
        )
        damaged.append(step)
        continue
      self._set_aside(damaged)
      if damaged:
        logging.warning("Going on from the one before it, step %d", step)
      return found
    if damaged:
      raise ConfigError(
        f"all checkpoints in {self.folder} are damaged; move that folder away"
        " to start again from step 0"
      )
    return None

  def _read(self, step, like):
    """(Restored, None), or (None, what is wrong with it)."""
    found, problem = None, None
    try:
      found, saved = self._read_own(step, like)
    except ConfigError:
      raise
    except Exception as e:  # Whatever damage makes Orbax raise.
      problem = _problem(e)
    # Processes read different parts of it, and all need a whole one.
    problem = next(filter(None, processes.gather(problem)), None)
    if problem:
      _check_damage(self.folder / str(step), problem)
    if problem is None and digest(found.state) != saved:
      problem = "its arrays do not have the digest that was saved"
    return (None, problem) if problem else (found, None)

  def _read_own(self, step, like):
    """What this process holds of it, and the digest of the whole."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    about = self._manager.restore(step, args=args).meta
    if about["format"] != _FORMAT:
      raise ConfigError(
        f"the checkpoint {self.folder / str(step)} has format"
        f" {about['format']}, not {_FORMAT}; use the version of moe_jax that"
        " wrote it"
      )
    _check_shapes(self.folder / str(step), about["shapes"], _shapes(like))
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    state = self._manager.restore(step, args=args).state
    return Restored(step, state, about["meta"]), about["digest"]

  def _set_aside(self, steps):
    """Damaged ones go beside the folder: their steps are written again."""
    if steps:
      processes.by_first(lambda: self._move(steps))
      self._manager.reload()

  def _move(self, steps):
    aside = self.folder.with_name("damaged_checkpoints")
    aside.mkdir(exist_ok=True)
    for step in steps:
      number = 1
      while (to := aside / f"{step}.{number}").exists():
        number += 1
      (self.folder / str(step)).rename(to)

  def _check_space(self, state):
    """Raises OSError now for a disk that would be full half way through."""
    needed = sum(x.nbytes for x in jax.tree.leaves(state)) + _MARGIN
    free = shutil.disk_usage(self.folder).free
    if free < needed:
      raise OSError(
        f"it needs up to {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are"
        " free there"
      )

  @contextlib.contextmanager
  def _failing(self):
    """Turns what goes wrong in writing into one sentence."""
    try:
      yield
    except Exception as e:
      whole = [s for s in self.steps() if s != self._writing]
      last = f"the last whole one is {self.folder / str(max(whole, default=0))}"
      raise RunError(
        f"the checkpoint of step {self._writing} cannot be written to"
        f" {self.folder} ({first_line(e)});"
        f" {last if whole else 'there is no other'}."
        " Free space on that disk, older runs for instance, and give the same"
        " command to go on"
      ) from e

  def close(self) -> None:
    """Waits, and lets go of the folder."""
    try:
      self.wait()
    finally:
      self._manager.close()


def _manager(folder, keep_last, keep_every):
  import orbax.checkpoint as ocp  # Slow to import.

  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep_last,
      keep_period=keep_every,
      cleanup_tmp_directories=True,  # Of a process that was killed.
    ),
    item_handlers={
      "state": ocp.StandardCheckpointHandler(),
      "meta": ocp.JsonCheckpointHandler(),
    },
  )


def check(keep_last: int, keep_every: int | None) -> None:
  """Raises ConfigError for numbers of checkpoints that cannot be kept."""
  if keep_last < 1:
    raise ConfigError(f"checkpoint.keep_last = {keep_last} is not 1 or more")
  if keep_every is not None and keep_every < 1:
    raise ConfigError(
      f"checkpoint.keep_every = {keep_every} is not 1 or more; None keeps only"
      " the last ones"
    )


def load_params(path: str | os.PathLike) -> dict:
  """The parameters of a checkpoint as numpy arrays, on any machine.

  Args:
    path: a work directory (its newest whole checkpoint), or one checkpoint,
      such as runs/tiny/checkpoints/300.

  Returns:
    Nested dicts of numpy arrays.

  Raises:
    ConfigError: there is no checkpoint that can be read.
  """
  return load_variables(path)["params"]


def load_variables(path: str | os.PathLike) -> dict:
  """`load_params` with the selection biases, if there are any.

  Args:
    path: as in `load_params`.

  Returns:
    {"params": ..., "balance": ...}: what `model.apply` takes.

  Raises:
    ConfigError: there is no checkpoint that can be read.
    RunError: the newest cannot be read just now, and may be whole.
  """
  folders = _newest_first(pathlib.Path(path).absolute())
  for folder in folders:
    try:
      return _load_variables(folder / "state")
    except Exception as e:  # Whatever damage makes Orbax raise.
      problem = _problem(e)
      _check_damage(folder, problem)
      logging.warning("The checkpoint %s is damaged (%s)", folder, problem)
  raise ConfigError(
    f"no checkpoint in {path} can be read: {', '.join(f.name for f in folders)}"
    " are damaged; give another"
  )


def _problem(error):
  return f"{type(error).__name__}: {first_line(error)}"


def _check_damage(folder, problem):
  """Raises RunError for a problem that says nothing about a checkpoint."""
  if _LACKS.search(problem):
    raise RunError(
      f"the checkpoint {folder} cannot be read ({problem}), though it may be"
      " whole; give the same command again when it can, or move it away to use"
      " the one before it"
    )


def _load_variables(folder):
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(folder).tree
  wanted = {
    name: jax.tree.map(lambda _: 0, tree[name])
    for name in ("params", "balance")
    if tree.get(name)
  }
  kinds = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
  )
  args = ocp.args.PyTreeRestore(
    wanted, restore_args=kinds, partial_restore=True
  )
  found = handler.restore(folder, args=args)
  about = json.loads((folder.parent / "meta" / "metadata").read_text())
  saved = dict(zip(about["shapes"], about["digest"], strict=True))
  if digest(found) != [saved[name] for name in _shapes(found)]:
    raise ValueError("its arrays do not have the digest that was saved")
  return found


def _newest_first(path):
  if (path / "state").is_dir():
    return [path]
  for folder in (path / "checkpoints", path):
    if folder.is_dir():
      steps = [int(f.name) for f in folder.iterdir() if f.name.isdigit()]
      if steps:
        return [folder / str(step) for step in sorted(steps, reverse=True)]
  raise ConfigError(
    f"there is no checkpoint in {path}; give a run's work directory or a folder"
    " such as runs/tiny/checkpoints/300"
  )


def digest(state) -> list[str]:
  """A checksum of every array, the same on every mesh.

  The sum, modulo 2^32, of a hash of each element's bits and its place. One
  changed element always changes it; of several, all but one in 2^32 do.
  """
  state = jax.tree.map(_plain, state)
  return [f"{int(x):08x}" for x in jax.device_get(_checksums(state))]


@jax.jit
def _checksums(tree):
  return [_checksum(x) for x in jax.tree.leaves(tree)]


def _checksum(x):
  x = jnp.asarray(x)
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  width = min(x.dtype.itemsize, 4)
  bits = jax.lax.bitcast_convert_type(x, f"uint{8 * width}")
  place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for dim in reversed(range(bits.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    place += iota * np.uint32(stride % 2**32)
    stride *= bits.shape[dim]
  return _mixed(bits.astype(jnp.uint32) ^ _mixed(place)).sum(dtype=jnp.uint32)


def _mixed(h):
  """The finalizer of MurmurHash3, a bijection of 32-bit integers."""
  h ^= h >> 16
  h *= np.uint32(0x85EBCA6B)
  h ^= h >> 13
  h *= np.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def _plain(x):
  """Random keys as the integers that they are, and numpy's float64 as halves.

  Without jax_enable_x64 jax would round what a run with it has saved.
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(x)
  if isinstance(x, np.ndarray) and x.itemsize == 8:
    return x.reshape(-1).view(np.uint32).reshape(*x.shape, 2)
  return x


def _shapes(state):
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{x.dtype}{list(x.shape)}"
    )
    for path, x in leaves
  }


def _check_shapes(path, found, wanted):
  for name in sorted({*found, *wanted}):
    one, other = found.get(name), wanted.get(name)
    if one != other:
      raise ConfigError(
        f"the checkpoint {path} is of another model: it has"
        f" {name} {one or 'not at all'}, and the config makes it"
        f" {other or 'not at all'}; use the config that the run was started"
        " with (config.json), or another --workdir"
      )
