"""Files on disk: JSON that is not trusted, and text written as a whole."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from moe_jax.core.errors import ConfigError

MAX_BYTES = 100_000_000
MAX_DEPTH = 64
_SCRATCH = set()  # Folders of `scratch_folder` that are there.


def read_json(
  path: str | os.PathLike,
  what: str,
  remedy: str,
  max_bytes: int = MAX_BYTES,
  max_depth: int = MAX_DEPTH,
  *,
  kind: type | tuple[type, ...] = dict,
  allow_nan: bool = False,
) -> Any:
  """Returns the JSON value in a file.

  Args:
    path: the file.
    what: what it should be, for the message, such as "the config of a run".
    remedy: what the user can do about it, for the end of the message.
    max_bytes: refuse a larger file, before it is read as a whole.
    max_depth: refuse lists and objects inside each other beyond this depth.
    kind: the type that the value must have; `object` takes any.
    allow_nan: also accept NaN and infinite numbers.

  Raises:
    ConfigError: the file cannot be read or is not such a value.
    FileNotFoundError: there is no such file.
  """
  with _readable(path, remedy), open(path, "rb") as file:
    raw = file.read(max_bytes + 1)
  try:
    value = parse_json(_bounded(raw, max_bytes), max_depth, allow_nan=allow_nan)
    if not isinstance(value, kind):
      raise ValueError(f"it holds a {type(value).__name__}")
  except ValueError as e:
    raise ConfigError(f"{path} is not {what} ({e}); {remedy}") from None
  return value


def read_json_lines(
  path: str | os.PathLike,
  what: str,
  remedy: str,
  max_line_bytes: int = 10_000_000,
  *,
  check: Callable[[Any], None] = lambda value: None,
  until_broken: bool = False,
) -> list:
  """Returns the JSON values in a file that has one on each line.

  A last line that has no newline and is not JSON is left out: its writer was
  killed, or is still writing. NaN and infinite numbers are accepted.

  Args:
    path, what, remedy: as in `read_json`.
    max_line_bytes: refuse a longer line, before it is read as a whole.
    check: called with each value; raises ValueError for a wrong one.
    until_broken: return the values before the first broken line, in place of
      an error. The caller must know how many there should be.

  Raises:
    ConfigError: the file cannot be read, or a line is broken.
    FileNotFoundError: there is no such file.
  """
  values = []
  with _readable(path, remedy), open(path, "rb") as file:
    while line := file.readline(max_line_bytes + 1):
      try:
        value = parse_json(_bounded(line, max_line_bytes), allow_nan=True)
        check(value)
      except ValueError as e:
        if until_broken or not (line.endswith(b"\n") or file.readline(1)):
          break
        raise ConfigError(
          f"line {len(values) + 1} of {path} is not {what} ({e}); {remedy}"
        ) from None
      values.append(value)
  return values


def parse_json(
  raw: bytes, max_depth: int = MAX_DEPTH, *, allow_nan: bool = False
) -> Any:
  """Returns the value of JSON text in UTF-8.

  Raises:
    ValueError: it is none, or is too deep; the text says so in a few words.
  """
  try:
    value = json.loads(raw.decode())
  except UnicodeDecodeError as e:
    raise ValueError(f"byte {e.start} is not UTF-8") from None
  except RecursionError:
    raise ValueError(f"it is deeper than {max_depth} levels") from None
  except json.JSONDecodeError as e:
    raise ValueError(f"it is not JSON: {e}") from None
  level, depth = [value], 0
  while level:
    if depth > max_depth:
      raise ValueError(f"it is deeper than {max_depth} levels")
    level = [child for item in level for child in _children(item, allow_nan)]
    depth += 1
  return value


def _children(item, allow_nan):
  """Returns what an item holds; raises ValueError for an impossible scalar."""
  if isinstance(item, dict):
    return (*item, *item.values())
  if isinstance(item, list):
    return item
  if isinstance(item, float) and not (allow_nan or math.isfinite(item)):
    raise ValueError(f"it holds the number {item}")
  if isinstance(item, str) and not item.isascii():
    try:
      item.encode()
    except UnicodeEncodeError:
      raise ValueError("it holds half a surrogate pair") from None
  return ()


def _bounded(raw, max_bytes):
  if len(raw) > max_bytes:
    raise ValueError(f"it is larger than {max_bytes:,} bytes")
  return raw


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
  """Writes a file as a whole: it has its old content or all of the new one.

  Raises:
    OSError: it cannot be written; `filename` is the path.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}")
  with naming(path):
    try:
      with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
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


def remove_scratch() -> None:
  """Removes all scratch folders, as this process ends without unwinding."""
  for folder in tuple(_SCRATCH):
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike):
  """Gives an OSError of writing a file the path that the user knows."""
  try:
    yield
  except OSError as e:
    e.filename = str(path)
    raise
