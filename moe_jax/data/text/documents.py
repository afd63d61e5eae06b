"""The features of a dataset that are read, and its documents."""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.core.errors import ConfigError
from moe_jax.data import sources
from moe_jax.data.text import folders, lines


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
          f" text: {', '.join(sorted(texts))}"
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
    options = names, self.domain, self.skip_not_utf8
    return (paths, lambda: folders.Builder(found, *options)) if found else None

  @property
  def words(self) -> str:
    """See `sources.Wanted`."""
    names = (f"train.{name}" for name in self.texts.values())
    kinds = f"train.jsonl, train.tsv or {' and '.join(names)}"
    return f"{kinds}, or text in files such as .txt, .md, .jsonl or .parquet"


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

  The hash of an example's first text decides whether it is held out, where
  there is no validation split.

  Args:
    name: of the dataset, for errors.
    builder: as in `label_names`.
    features: the features that are read.

  Raises:
    ConfigError: a file of the dataset is damaged.
  """
  names = label_names(builder, features)
  held_out = "validation" in builder.info.splits
  for split in sources.SPLITS if held_out else ("train",):
    for example in sources.examples(name, builder, split):
      texts = [_as_bytes(example[name]) for name in features.texts.values()]
      domain = example.get(features.domain, "text")
      if names:  # TFDS has -1 for a document without a label.
        domain = names[domain] if domain >= 0 else "unlabelled"
      else:
        domain = _as_bytes(domain).decode("utf-8", "replace")
      own_split = split if held_out else sources.split_of(texts[0])
      texts[0] = texts[0] and features.prefix.encode() + texts[0]
      for text, begin in zip(texts, features.begins):
        yield own_split, domain, text, begin if text else ()


def _as_bytes(value):
  return value if isinstance(value, bytes) else str(value).encode()
