"""Datasets in plain files with an example on each line, read as those of TFDS.

A folder has the files of each split in one of these forms:

  train.jsonl     a JSON object with the features on each line
  train.tsv       the features that are read, in their order, between tabs
  train.FEATURE   a file for each feature; line n of each belongs to example n
"""

import dataclasses
import json
import pathlib
import types
from collections.abc import Mapping, Sequence

import numpy as np

# {split: its files}, a single file or a file for each feature.
Files = Mapping[str, tuple[pathlib.Path, ...]]


def find(
  folder: pathlib.Path, features: Sequence[str], splits: Sequence[str]
) -> Files:
  """Returns the files of a folder; {} where it has none for the first split.

  Args:
    folder: a path, whether it is there or not.
    features: the texts that are read.
    splits: names of the splits that are looked for.
  """
  found = {}
  for split in splits:
    of_features = [f"{split}.{feature}" for feature in features]
    for names in ([f"{split}.jsonl"], [f"{split}.tsv"], of_features):
      paths = tuple(folder / name for name in names)
      if split not in found and all(path.is_file() for path in paths):
        found[split] = paths
  return found if splits[0] in found else {}


class Builder:
  """The attributes of a TFDS builder that reading needs.

  info: with `features` and `splits`, as in TFDS.
  """

  def __init__(self, files: Files, features: Sequence[str]):
    """Opens the files.

    Args:
      files: from `find`.
      features: the texts that are read.

    Raises:
      ValueError: files of a split have unequal numbers of lines, or the first
        line is no example.
    """
    import tensorflow_datasets as tfds

    self._sources = {
      split: _Source(tuple(map(_Lines, paths)), tuple(features))
      for split, paths in files.items()
    }
    sizes = {
      split: types.SimpleNamespace(num_examples=len(source))
      for split, source in self._sources.items()
    }
    names = [*self._sources.values()][0].names_there()
    self.info = types.SimpleNamespace(
      features={name: tfds.features.Text() for name in names}, splits=sizes
    )

  def as_data_source(self, split: str):
    """Returns the examples of a split, by index.

    Reading them raises ValueError for a line that is no example.
    """
    return self._sources[split]


class _Lines:
  """Lines of a file, by index."""

  def __init__(self, path):
    self.path = path
    with path.open("rb") as file:
      self._ends = np.cumsum(np.fromiter(map(len, file), np.int64))

  def __len__(self):
    return len(self._ends)

  def read(self, numbers: range) -> list[bytes]:
    """Returns the lines of consecutive `numbers`, without line ends."""
    begin = int(self._ends[numbers[0] - 1]) if numbers[0] else 0
    with self.path.open("rb") as file:
      file.seek(begin)
      content = file.read(int(self._ends[numbers[-1]]) - begin)
    lines = content.removesuffix(b"\n").split(b"\n")
    return [line.removesuffix(b"\r") for line in lines]


@dataclasses.dataclass
class _Source:
  """Examples of a split.

  files: a single file, or a file for each feature.
  names: of the features that are read.
  """

  files: tuple[_Lines, ...]
  names: tuple[str, ...]

  def __post_init__(self):
    sizes = {str(file.path): len(file) for file in self.files}
    if len(set(sizes.values())) > 1:
      raise ValueError(
        f"files of a split have unequal numbers of lines: {sizes}"
      )

  def __len__(self):
    return len(self.files[0])

  def __getitems__(self, numbers: range) -> list[dict]:
    path = self.files[0].path
    parse = {".jsonl": _object, ".tsv": _row}.get(path.suffix, _columns)
    examples = []
    for number, texts in zip(
      numbers, zip(*(f.read(numbers) for f in self.files))
    ):
      try:
        examples.append(parse(texts, self.names))
      except (ValueError, RecursionError) as e:
        raise ValueError(f"line {number + 1} of {path}: {e}") from None
    return examples

  def names_there(self):
    """The features in the file: those of the first object, if it is JSON."""
    if self.files[0].path.suffix != ".jsonl":
      return self.names
    first = self.files[0].read(range(1)) if len(self) else [b"{}"]
    return [k for k, v in _object(first, ()).items() if isinstance(v, str)]


def _object(texts, names):
  example = json.loads(texts[0])
  if not isinstance(example, dict):
    raise ValueError("it is no JSON object")
  for name in names:
    if not isinstance(example.get(name), str):
      raise ValueError(f'it has no text "{name}"')
    example[name].encode()  # Refuses halves of surrogate pairs.
  return example


def _row(texts, names):
  columns = texts[0].split(b"\t")
  if len(columns) != len(names):
    raise ValueError(f"it has {len(columns)} columns, not {len(names)}")
  return dict(zip(names, columns))


def _columns(texts, names):
  return dict(zip(names, texts))
