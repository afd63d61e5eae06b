"""The features of a dataset that are read, and its documents."""

import collections
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.core.errors import ConfigError
from moe_jax.data import sources
from moe_jax.data.text import folders, lines

_PART = 16  # One byte in 16 is held out where the hash holds nothing out.


class Features(NamedTuple):
  """The names of the features that are read, and how they are read.

  text: the feature that is a document; or two, a source and a target, which are
    two documents, one after the other.
  domain: the feature that names the domain.
  prefix: text before every source that is not empty.
  begins: tokens before the sources, and before the targets, that are not empty.
  skip_not_utf8: leave out documents that are not UTF-8 in a folder of text.
  """

  text: str | tuple[str, str]
  domain: str
  prefix: str = ""
  begins: tuple[tuple[int, ...], ...] = ((), ())
  skip_not_utf8: bool = False

  @property
  def texts(self) -> dict[str, str]:
    """{key of the config: feature} of `text`."""
    if isinstance(self.text, str):
      return {"data.text_feature": self.text}
    return dict(zip(("task.source", "task.target"), self.text))

  def check(self, name: str, builder) -> None:
    """Raises ConfigError for a dataset that lacks a feature.

    The sizes of its splits are not known, and not checked, before it is
    prepared.

    Args:
      name: of the dataset, for the message.
      builder: of TFDS.
    """
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    # Shape and dtype of a text; a nested dataset of texts has them too.
    text = ((), object)
    texts = [
      k
      for k, f in features.items()
      if isinstance(f, tfds.features.Tensor) and (f.shape, f.np_dtype) == text
    ]
    for key, text in self.texts.items():
      if text not in texts:
        what = "is not there"
        if text in features:
          what = f"is not text but a {type(features[text]).__name__}"
        raise ConfigError(
          f'the feature "{text}" of dataset {name} {what}; set {key} to a feature of'
          f" text: {', '.join(sorted(texts)) or 'it has none'}"
        )
    # The default feature of the domain need not be there.
    if self.domain not in ("domain", "none", *features):
      raise ConfigError(
        f'dataset {name} has no feature "{self.domain}", but {sorted(features)};'
        ' set data.domain_feature to one of them, or to "none" for one domain'
      )
    sizes = {k: v.num_examples for k, v in builder.info.splits.items()}
    if sizes and not (sizes.get("train") and sizes.get("validation", 1)):
      raise ConfigError(
        f"dataset {name} has no documents in the split train, or an empty split"
        f" validation: {sizes}; prepare a copy of it that has documents there"
      )

  def plain(self, folder: pathlib.Path):
    """See `sources.Wanted`."""
    names = tuple(self.texts.values())
    found = lines.find(folder, names, sources.SPLITS)
    if found:
      paths = sorted(sum(found.values(), ()))
      return paths, lambda: lines.Builder(found, names)
    if (folder / "dataset_info.json").exists():
      return None  # TFDS has datasets in parquet too.
    found = folders.find(str(folder), sources.SPLITS)
    paths = [file.path for own in found.values() for file in own]
    options = self.texts, self.domain, self.skip_not_utf8
    return (paths, lambda: folders.Builder(found, *options)) if found else None

  @property
  def words(self) -> str:
    """See `sources.Wanted`."""
    if isinstance(self.text, str):
      return "text in files such as .txt, .md, .jsonl or .parquet"
    names = " and ".join(f"train.{name}" for name in self.text)
    return f"pairs in train.jsonl, train.tsv or {names}, or in .parquet files"


def label_names(builder, features: Features) -> list[str]:
  """Returns the domains that the dataset declares, in its order.

  Args:
    builder: of TFDS, or of `folders` or `lines`.
    features: names the feature of the domain.
  """
  feature = dict(builder.info.features.items()).get(features.domain)
  return list(getattr(feature, "names", None) or ())


def read(
  name: str, builder, features: Features
) -> Iterator[tuple[str, str, bytes, tuple[int, ...]]]:
  """Yields (split, domain, text as bytes, tokens before it) of every document.

  Where there is no validation split, the hash of an example's first text decides
  whether it is held out. In files of one's own no domain stays without such an
  example by chance, see `_both_splits`.

  Args:
    name: of the dataset, for errors.
    builder: as in `label_names`.
    features: the features that are read.

  Raises:
    ConfigError: a file of the dataset is damaged.
  """
  held_out = "validation" in builder.info.splits
  for split in sources.SPLITS if held_out else ("train",):
    pairs = _texts(name, builder, features, split)
    if held_out:
      placed = ((split, *pair) for pair in pairs)
    elif isinstance(builder, folders.Builder):
      placed = _both_splits(pairs)
    else:
      placed = ((sources.split_of(texts[0]), d, texts) for d, texts in pairs)
    for own_split, domain, texts in placed:
      texts[0] = texts[0] and features.prefix.encode() + texts[0]
      for text, begin in zip(texts, features.begins):
        yield own_split, domain, text, begin


def _texts(name, builder, features, split):
  """Yields (domain, texts) of every example of a split."""
  names = label_names(builder, features)
  for example in sources.examples(name, builder, split):
    texts = [_as_bytes(example[name]) for name in features.texts.values()]
    none = features.domain == "none"
    domain = "text" if none else example.get(features.domain, "text")
    if names:  # TFDS has -1 for a document without a label.
      domain = names[domain] if domain >= 0 else "unlabelled"
    else:
      domain = _as_bytes(domain).decode("utf-8", "replace")
    yield domain, texts


def _both_splits(
  pairs: Iterator[tuple[str, list[bytes]]],
) -> Iterator[tuple[str, str, list[bytes]]]:
  """Yields (split, domain, texts); a domain with enough text has both splits.

  The hash decides, except for a domain whose examples all have hashes of one
  split. The end of its last text is held out then: the lines with about a
  sixteenth of the domain's bytes, or the whole text if it has no earlier line.
  A single example per domain is kept in memory.

  Args:
    pairs: (domain, texts) of every example.
  """
  kept, splits = {}, {}  # {domain: its last texts}, {domain: its splits so far}
  sizes = collections.Counter()  # Bytes.
  for domain, texts in pairs:
    split, before = sources.split_of(texts[0]), splits.setdefault(domain, set())
    sizes[domain] += len(texts[0])
    if domain in kept:
      yield *before, domain, kept.pop(domain)
    if before <= {split}:
      kept[domain] = texts
    else:
      yield split, domain, texts
    before.add(split)
  for domain, texts in kept.items():
    yield from _cut(domain, texts, *splits[domain], sizes[domain])


def _cut(domain, texts, split, size):
  """Yields the last example of a domain whose other examples are in `split`."""
  text, *others = texts
  begin = text.rfind(b"\n", 0, max(len(text) - size // _PART, 0)) + 1
  if begin and not others:  # A pair stays whole.
    yield "train", domain, [text[:begin]]
    yield "validation", domain, [text[begin:]]
  elif len(text) < size:
    other = "validation" if split == "train" else "train"
    yield other, domain, texts
  else:  # It is the only text of its domain, and has a single line.
    yield "train", domain, texts


def _as_bytes(value):
  return value if isinstance(value, bytes) else str(value).encode()
