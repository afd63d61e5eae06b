"""Caches of prepared data: folders that appear as a whole or not at all.

A cache is a folder of arrays with an index.json, which has their sizes, names
and sources.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from absl import logging

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, first_line

_KEY_LENGTH = 16
_CHECKED = ".checked"  # A file with the digest of files known to be right.
_FULL_DISK = re.compile("No space left on device|Disk quota exceeded")


def entry(
  name: str, cache_dir: str | os.PathLike | None, made_of: Any
) -> pathlib.Path:
  """Returns the folder of a cache.

  Args:
    name: of the dataset.
    cache_dir: where caches lie; None: $XDG_CACHE_HOME/moe_jax or
      ~/.cache/moe_jax.
    made_of: all that the content depends on, a value that JSON can hold.
  """
  return _folder(name, cache_dir, sha256(made_of)[:_KEY_LENGTH])


def entries(
  name: str, cache_dir: str | os.PathLike | None
) -> list[pathlib.Path]:
  """Returns the folders of all caches of a dataset's name, sorted.

  Args:
    name, cache_dir: as in `entry`.
  """
  pattern = _folder(name, cache_dir, "[0-9a-f]" * _KEY_LENGTH)
  return sorted(pattern.parent.glob(pattern.name))


def _folder(name, cache_dir, key):
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  root = pathlib.Path(cache_dir or f"{home}/moe_jax").expanduser().absolute()
  word = re.sub(r"[^\w.-]", "_", name)
  return root / f"{word}-{key}"


def read(
  folder: pathlib.Path, form: int, made: Callable[[dict], Any]
) -> Any | None:
  """Opens a cache; None if the cache is not whole.

  Args:
    folder: of the cache.
    form: version of the files' form; a cache of another one counts as not
      whole.
    made: index -> the result. It raises ValueError or OSError for damaged
      files.

  Returns:
    The result of `made`, or None.
  """
  # Files that are too short cannot be mapped, which is a ValueError.
  with contextlib.suppress(ValueError, OSError):
    index = files.read_json(
      folder / "index.json", "the index of a cache", "remove its folder"
    )
    digest = index.pop("digest", None)
    if index.get("format") != form:
      return None
    if digest == sha256(index):
      return made(index)
  if folder.exists():
    logging.warning("The cache %s is damaged and not used", folder)
  return None


def check_content(
  folder: pathlib.Path, index: dict, fingerprint: Callable[[], str]
) -> None:
  """Raises ValueError for arrays with another fingerprint than the index has.

  All bytes are read the first time, and again only after a file has changed its
  size or time.

  Args:
    folder: of the cache.
    index: of the cache.
    fingerprint: () -> the fingerprint of the arrays; it reads all of them.
  """
  stats = {
    file.name: [file.stat().st_size, file.stat().st_mtime_ns]
    for file in folder.iterdir()
    if file.is_file() and file.name != _CHECKED
  }
  mark = folder / _CHECKED
  wanted = sha256([index["fingerprint"], stats])
  with contextlib.suppress(OSError):
    if mark.read_text() == wanted:
      return
  if index["fingerprint"] != fingerprint():
    raise ValueError("the arrays are not those of the index")
  with contextlib.suppress(OSError):  # Without the right to write: read again.
    mark.write_text(wanted)


def write_index(folder: pathlib.Path, index: dict) -> None:
  """Writes the index of a cache, with its digest.

  Args:
    folder: of the cache.
    index: its content, that JSON can hold.
  """
  text = json.dumps({**index, "digest": sha256(index)}, indent=2)
  (folder / "index.json").write_text(text)


def get(name: str, folder: pathlib.Path, write, opened) -> Any:
  """Opens a cache, and prepares it first where it is not whole.

  It is prepared beside its place, and moves there at the end.

  Args:
    name: of the dataset.
    folder: of the cache.
    write: folder -> None, writes all files.
    opened: folder -> the result of `read`.

  Returns:
    The result of `opened`.

  Raises:
    ConfigError: there is no space, or no right to write.
  """
  made = opened(folder)
  if made is not None:
    return made
  logging.info("Preparing dataset %s in %s, once", name, folder)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch_folder(folder.parent, f".{folder.name}-") as scratch:
      (scratch / "new").mkdir()
      write(scratch / "new")
      if folder.exists() and opened(folder) is None:
        folder.rename(scratch / "broken")
      try:
        (scratch / "new").rename(folder)
      except OSError:  # Another process was faster: its content is the same.
        if opened(folder) is None:
          raise
  except (OSError, RuntimeError) as e:
    # TFDS raises a RuntimeError where its writers find the disk full.
    if isinstance(e, RuntimeError) and not _FULL_DISK.search(str(e)):
      raise
    raise ConfigError(
      f"the cache {folder} cannot be prepared ({first_line(e)}); free space"
      " there, or set data.cache_dir or XDG_CACHE_HOME to another folder"
    ) from e
  return opened(folder)


def sha256(value: Any) -> str:
  """Returns the digest of a value that JSON can hold."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
