"""Folders of text of one's own, read as datasets of TFDS.

  prose and source code (.txt, .md, .py, ...)   a file is a document; a long one
  is
                                                several, which end at line ends
  .jsonl, .jsonl.gz                             an object on each line is a
  document
  .parquet                                      a row is a document

Folders at any depth are read, except hidden ones. The domain of a document is
the one that its object or row names, or else the first folder that its file is
in, or "text". Where the folders `train` and `validation` are both there, they
are the splits, and domains are the folders in these.
"""

import codecs
import gzip
import json
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from moe_jax.core.errors import ConfigError
from moe_jax.data import sources

_PROSE = ".txt .text .md .rst .tex .html .xml .org"
_CODE = ".py .pyi .c .cc .cpp .cu .h .hpp .java .js .ts .go .rs .rb .sh .scala .swift .kt"
PLAIN = (*_PROSE.split(), *_CODE.split(), ".lua", ".jl", ".r", ".sql")
OBJECTS = (".jsonl", ".jsonl.gz", ".parquet")
_SHOWN = 3  # Names in a message.
_LONG = 2**14  # A file with more bytes is cut into several documents.
_PIECE = 2**12  # The least bytes of these documents, except the last.
_AT_ONCE = 2**23  # Bytes of a file that are read together.
_ROWS = 1024  # Rows of a parquet file that are read together.
_LONGEST = 2**20  # The most bytes of these documents, where lines are longer.


class File(NamedTuple):
  """A file to read, and the domain of documents that name none themselves."""

  path: pathlib.Path
  domain: str

  @property
  def suffix(self) -> str:
    """The file's suffix, of `PLAIN` or `OBJECTS`, or "" if it is not read."""
    name = self.path.name.lower()
    return next((s for s in (*OBJECTS, *PLAIN) if name.endswith(s)), "")


def find(place: str, splits: Sequence[str]) -> dict[str, list[File]]:
  """Returns {split: its files}; {} if there are none.

  Args:
    place: a file, a folder, or a pattern such as texts/*.md.
    splits: the names of folders that are splits where all of them are there.
  """
  place = pathlib.Path(place)
  patterns = [i for i, part in enumerate(place.parts) if {*part} & {*"*?["}]
  if patterns and not place.exists():
    root = pathlib.Path(*place.parts[: patterns[0]])
    paths = sorted(root.glob("/".join(place.parts[patterns[0] :])))
    return _split(splits[0], [p for p in paths if not p.is_dir()], root)
  if not place.is_dir():
    return _split(splits[0], [place] if place.exists() else [], place.parent)
  if all((place / split).is_dir() for split in splits):
    found = {}
    for split in splits:
      found |= _split(split, _inside(place / split), place / split)
    return found if splits[0] in found else {}
  return _split(splits[0], _inside(place), place)


def _split(split, paths, root):
  """{split: files that are read}, or {} if there are none."""
  files = []
  for path in paths:
    folders = path.relative_to(root).parts[:-1]
    files.append(File(path, folders[0] if folders else "text"))
  read = [file for file in files if file.suffix]
  if read and len(read) < len(files):
    other = next(file.path for file in files if not file.suffix)
    logging.warning(
      "%d of %d files in %s are not read, such as %s; text is in files such as"
      " .txt, .md, .py, .jsonl and .parquet, and not behind links to folders",
      *(len(files) - len(read), len(files), root, other),
    )
  return {split: read} if read else {}


def _inside(folder):
  """The files in a folder at any depth, in order, without hidden ones."""
  paths = (
    path
    for path in sorted(folder.rglob("*"))
    if not any(part[0] == "." for part in path.relative_to(folder).parts)
  )
  # A link to a folder is not followed, and counts as a file that is not read.
  return [path for path in paths if path.is_symlink() or not path.is_dir()]


class Builder:
  """The attributes of a TFDS builder that reading needs.

  info: with `features` and `splits`, as in TFDS. A split has the number and the
    bytes of its files.
  """

  def __init__(
    self,
    files: dict[str, list[File]],
    texts: Mapping[str, str],
    domain: str,
    skip_not_utf8: bool = False,
  ):
    """Takes the files of a dataset.

    Args:
      files: from `find`.
      texts: {key of the config: the field of objects and rows that is read};
        the text of a prose file counts as the first one.
      domain: the field that names the domain.
      skip_not_utf8: leave out documents that are not UTF-8, with a warning.

    Raises:
      ConfigError: the first object or row cannot be read.
    """
    import tensorflow_datasets as tfds

    self._files, self._texts, self._domain = files, texts, domain
    self._skip = skip_not_utf8
    splits = {
      split: types.SimpleNamespace(
        num_examples=len(own),
        num_bytes=sum(file.path.stat().st_size for file in own),
      )
      for split, own in files.items()
    }
    features = {name: tfds.features.Text() for name in self._names()}
    self.info = types.SimpleNamespace(features=features, splits=splits)

  def _names(self):
    """The fields of the first object or row, or of prose if there are none."""
    for file in sum(self._files.values(), []):
      if file.suffix in OBJECTS:
        for where, fields in _objects(file):
          _check_texts(fields, self._texts, where)
          return [k for k, v in fields.items() if isinstance(v, str | bytes)]
    return [*self._texts.values()][:1]

  def examples(self, split: str) -> Iterator[dict]:
    """Yields the documents of a split, one after the other.

    Raises:
      ConfigError: an object or row without a text, or documents that are not UTF-8.
    """
    broken = []
    names = [*self._texts.values()]
    for file in self._files[split]:
      for where, fields in _documents(file, names, self._domain):
        _check_texts(fields, self._texts, where)
        if all(_is_utf8(fields[name]) for name in names):
          known = {k: v for k, v in fields.items() if v is not None}
          yield {self._domain: file.domain} | known
        else:
          broken.append(where)
    if broken:
      several = (
        "1 document is" if len(broken) == 1 else f"{len(broken)} documents are"
      )
      several += f" not UTF-8: {', '.join(broken[:_SHOWN])}"
      several += ", ..." if len(broken) > _SHOWN else ""
      if not self._skip:
        them = "it" if len(broken) == 1 else "them"
        raise ConfigError(
          f"{several}; convert {them} (from Latin-1 with iconv -f latin1 -t utf-8), or"
          f" leave {them} out with --config.data.skip_not_utf8=True"
        )
      logging.warning("Left out: %s", several)


def _check_texts(fields, texts, where):
  """Raises ConfigError for an object or row that lacks a text."""
  for key, name in texts.items():
    if not isinstance(fields.get(name), str | bytes):
      kinds = (f"{k} ({_kind(v)})" for k, v in fields.items())
      others = ", ".join(kinds)
      raise ConfigError(
        f'{where} has no text field "{name}"; it has'
        f" {f'the fields {others}' if others else 'no fields'}; set"
        f" --config.{key} to a field that is text in all of them"
      )


def _kind(value):
  """A word for the type of a field."""
  if value is None or isinstance(value, bool):
    return {None: "null"}.get(value, "true or false")
  words = {str: "text", bytes: "text", int: "number", float: "number"}
  words |= {list: "list", dict: "object"}
  return words.get(type(value), type(value).__name__)


def _is_utf8(text):
  try:
    text.decode() if isinstance(text, bytes) else text.encode()
  except UnicodeError:
    return False
  return True


def _documents(file, names, domain):
  """Yields (words for its place, fields) of each document of a file."""
  if file.suffix in OBJECTS:
    yield from _objects(file, {*names, domain})
    return
  with _readable(file), file.path.open("rb") as raw:
    for number, piece in enumerate(_pieces(raw), 1):
      yield f"part {number} of {file.path}", {names[0]: piece}


def _readable(file):
  """Turns the errors of reading a file into one sentence with its path."""
  return sources.in_a_sentence(
    f"the file {file.path} cannot be read", "mend it or take it away"
  )


def _pieces(raw):
  """The documents of an open file; a long one is cut at empty lines or line ends."""
  mark = codecs.BOM_UTF8  # Some editors begin files with it; it is no text.
  begin, content = 0, raw.read(_AT_ONCE).removeprefix(mark)
  while True:
    if len(content) - begin <= _LONGEST:
      begin, content = 0, content[begin:] + raw.read(_AT_ONCE)
    if len(content) - begin <= _LONG:
      break
    end = _end(content, begin)
    yield content[begin:end]
    begin = end
  if begin < len(content):
    yield content[begin:]


def _end(content, begin):
  """The end of the document that begins at `begin`; up to `_LONGEST` is there of it."""
  least, most = begin + _PIECE, begin + _LONG
  for mark, last in ((b"\n\n", most), (b"\n", most), (b"\n", begin + _LONGEST)):
    end = content.find(mark, least, last) + len(mark)
    if end > least:
      return end
  last = begin + _LONGEST
  if last >= len(content):
    return len(content)
  starts = (last - i for i in range(4) if content[last - i] & 0xC0 != 0x80)
  return next(starts, last)  # A character of UTF-8 stays whole.


def _objects(file, wanted=None):
  """Yields (words for its place, fields) of each object or row of a file.

  Only the wanted columns of a parquet file are read. Others may be large.
  """
  with _readable(file), file.path.open("rb") as raw:
    if file.suffix == ".parquet":
      import pyarrow.parquet

      number = 0
      table = pyarrow.parquet.ParquetFile(raw)
      names = [k for k in table.schema_arrow.names if not wanted or k in wanted]
      size = _ROWS if wanted else 1
      for batch in table.iter_batches(size, columns=names):
        for row in batch.to_pylist():
          number += 1
          yield f"row {number} of {file.path}", row
      return
    zipped = file.suffix == ".jsonl.gz"
    lines = gzip.GzipFile(fileobj=raw) if zipped else raw
    for number, line in enumerate(lines, 1):
      where = f"line {number} of {file.path}"
      if not line.strip():
        continue
      try:
        line = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
        fields = json.loads(line.decode(errors="surrogateescape"))
        if not isinstance(fields, dict):
          raise ValueError("it is no JSON object")
      except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: {e}; mend it") from None
      yield where, fields
