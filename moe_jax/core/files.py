"""Files on disk: JSON that is not trusted, and text written as a whole."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

from moe_jax.core.errors import ConfigError, RunError

MAX_BYTES = 100_000_000  # Limit on the size of a file, and of a line.
MAX_DEPTH = 64
_SCRATCH = set()  # Folders of `scratch_folder` that are there.


def read_json(path, what: str, remedy: str, *, allow_nan=False) -> dict:
  """Returns the JSON object in a file.

  Args:
    path: the file.
    what: what it should be, for the message, such as "the config of a run".
    remedy: what the user can do about it, for the end of the message.
    allow_nan: also accept NaN and infinite numbers.

  Raises:
    ConfigError: the file cannot be read, or holds something else, or is too
      large or too deep.
    FileNotFoundError: there is no such file.
  """
  with _readable(path, remedy), open(path, "rb") as file:
    raw = file.read(MAX_BYTES + 1)
  try:
    value = _parse(raw, allow_nan)
    if not isinstance(value, dict):
      raise ValueError(f"it holds a {type(value).__name__}")
  except ValueError as e:
    raise ConfigError(f"{path} is not {what} ({e}); {remedy}") from None
  return value


def read_json_lines(
  path, what: str, remedy: str, *, check: Callable, damaged: list | None = None
) -> list:
  """Returns the JSON values in a file that has one on each line.

  A last line that has no newline and is not JSON is left out: its writer was
  killed, or is still writing. NaN and infinite numbers are accepted.

  Args:
    path, what, remedy: as in `read_json`.
    check: called with each value; raises ValueError for a wrong one.
    damaged: gets the numbers of broken lines, from 1, in place of an error.

  Raises:
    ConfigError: the file cannot be read, or a line is broken.
    FileNotFoundError: there is no such file.
  """
  values, number = [], 0
  with _readable(path, remedy), open(path, "rb") as file:
    while line := file.readline(MAX_BYTES + 1):
      number += 1
      try:
        check(value := _parse(line, allow_nan=True))
        values.append(value)
      except ValueError as e:
        if not (line.endswith(b"\n") or file.peek(1)):
          break
        if damaged is None:
          raise ConfigError(
            f"line {number} of {path} is not {what} ({e}); {remedy}"
          ) from None
        damaged.append(number)
  return values


def _parse(raw, allow_nan):
  """Returns the value of JSON text in UTF-8.

  Raises:
    ValueError: it is none, or is too large or too deep; says so in a few words.
  """
  if len(raw) > MAX_BYTES:
    raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
  try:
    value = json.loads(raw.decode())
    # Refuses infinite numbers, and then halves of surrogate pairs.
    json.dumps(value, allow_nan=allow_nan, ensure_ascii=False).encode()
    is_too_deep = _is_deeper(value, MAX_DEPTH)
  except RecursionError:
    is_too_deep = True
  if is_too_deep:
    raise ValueError(f"it is deeper than {MAX_DEPTH} levels")
  return value


def _is_deeper(value, levels):
  """Whether dicts and lists are nested more than `levels` deep."""
  if not isinstance(value, dict | list):
    return False
  inside = value.values() if isinstance(value, dict) else value
  return levels == 0 or any(_is_deeper(item, levels - 1) for item in inside)


@contextlib.contextmanager
def _readable(path, remedy):
  """Turns an OSError of reading a file that is there into one sentence."""
  try:
    yield
  except FileNotFoundError:
    raise
  except OSError as e:
    raise ConfigError(f"{path} cannot be read ({e.strerror}); {remedy}") from e


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text in UTF-8 as a whole; raises as `write_bytes`.

  Args:
    path, text: the file and its new content.
  """
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file as a whole: it has its old content or all of the new one.

  Args:
    path: the file.
    content: its new content.

  Raises:
    RunError: the file cannot be written.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}")
  with writing(path):
    try:
      with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      temporary.replace(path)
    finally:
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(parent: str | os.PathLike, prefix: str):
  """Makes a folder that is removed at the end of `with`, or by a signal.

  Args:
    parent: folder to make it in.
    prefix: how its name begins.
  """
  folder = pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
  _SCRATCH.add(folder)
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    _SCRATCH.discard(folder)


def check_empty(path: str | os.PathLike) -> None:
  """Raises ConfigError if something is already where a folder will be made."""
  folder = pathlib.Path(path)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ConfigError(f"{path} is not an empty folder; give another")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike):
  """Gives a folder to fill, which appears at `path` as a whole or not at all.

  Args:
    path: a folder that is not there yet, or is empty.

  Raises:
    ConfigError: the folder is there with something in it.
  """
  check_empty(path)
  folder = pathlib.Path(path).absolute()
  folder.parent.mkdir(parents=True, exist_ok=True)
  with scratch_folder(folder.parent, f".{folder.name}-") as work:
    whole = work / "whole"
    whole.mkdir()
    yield whole
    whole.rename(folder)


def remove_scratch() -> None:
  """Removes all scratch folders, for a process that ends without unwinding."""
  for folder in tuple(_SCRATCH):
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike):
  """Turns an OSError of writing a file of a run into one sentence.

  Args:
    path: the path that the user knows, for the message.

  Raises:
    RunError: the file cannot be written.
  """
  try:
    yield
  except OSError as e:
    raise RunError(not_written(path, e)) from None


def not_written(path: str | os.PathLike, error: OSError) -> str:
  """Returns the sentence for the user about a file that cannot be written.

  Args:
    path: the file.
    error: the reason.
  """
  full = error.errno in (errno.ENOSPC, errno.EDQUOT)
  remedy = "free space on that disk" if full else "mend this"
  return (
    f"{path} cannot be written to ({error.strerror}); {remedy} and give the same"
    " command again, or choose another path"
  )
