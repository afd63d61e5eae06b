"""Corpora: the tokens of a dataset in memory-mapped files, made once.

The last token of the vocabulary ends a document. A token cache is a folder with
one flat file of integers for each split and domain, and an index.json with
their content and sources. It appears as a whole or not at all.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from moe_jax.core.errors import ConfigError
from moe_jax.core.progress import Progress
from moe_jax.data import caches, sources
from moe_jax.data.text import documents, tokenizers

SPLITS = sources.SPLITS
Table = Mapping[str, Mapping[str, Any]]  # {split: {domain: value}}

_FORMAT = 3  # Add one when the meaning of the files changes.
_MOST_DOMAINS = 256
_SHOWN = 5  # Names of domains in a sentence.
_AT_ONCE = 2**23  # Bytes of text that are made tokens together.
_QUICK = 3.0  # Seconds in which no progress is shown.
_MOST_LOST = 0.01  # Share of a text's bytes that its tokens may lose.
# Fields that a corpus and its index have in common.
_FIELDS = ("name", "fingerprint", "num_tokens", "num_documents", "sources")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The tokens of a prepared dataset, or of several.

  Without `parts` it has no text, and says only which tokens there may be.

  Attributes:
    name: name of the dataset, or of several, joined by "+".
    num_bytes_V: bytes of text that each token of the vocabulary stands for; its
      last token ends a document and stands for none.
    fingerprint: sha256 of every token, by split and domain. Equal for equal
      content, wherever it was prepared.
    parts: (weight, names of its domains) of each dataset; a dataset's share of
      the training rows is its weight over the sum of all.
    arrays: the tokens by split, then domain; see `tokens`.
    num_tokens: tokens by split, then domain.
    num_documents: documents by split, then domain.
    sources: {name: version} of everything that the text was made from.
    directory: the cache's folder; a built-in dataset's documents lie there too,
      as a TFDS dataset. None for several datasets.
  """

  name: str
  num_bytes_V: Sequence[int] = dataclasses.field(repr=False)
  fingerprint: str = ""
  parts: tuple[tuple[float, tuple[str, ...]], ...] = ()
  arrays: Table = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )
  num_tokens: Table = dataclasses.field(default_factory=dict)
  num_documents: Table = dataclasses.field(default_factory=dict)
  sources: Mapping = dataclasses.field(default_factory=dict)
  directory: pathlib.Path | None = None

  @property
  def domains(self) -> tuple[str, ...]:
    """Names of the domains; a domain's index is its place here."""
    return tuple(domain for _, domains in self.parts for domain in domains)

  @property
  def vocab_size(self) -> int:
    """Number of different tokens."""
    return len(self.num_bytes_V)

  @property
  def end_of_document(self) -> int:
    """The token that ends a document."""
    return self.vocab_size - 1

  @property
  def about(self) -> str:
    """The numbers of its documents, and its domains, in words."""
    train, held_out = (
      sum(self.num_documents.get(split, {}).values()) for split in SPLITS
    )
    names = ", ".join(self.domains[:_SHOWN])
    names += ", ..." if len(self.domains) > _SHOWN else ""
    return f"{train:,} documents to train on, {held_out:,} held out, of {names}"

  def tokens(self, split: str, domain: str) -> np.ndarray:
    """Returns the tokens of a domain, one document after the other.

    Args:
      split: "train" or "validation".
      domain: one of `domains`.

    Returns:
      Read-only integers [N], mapped from the file: only what is read is
      loaded.
    """
    return self.arrays[split][domain]


def prepare(
  name: str,
  *,
  data_dir: str | os.PathLike | None = None,
  text_feature: str | tuple[str, str] = "text",
  domain_feature: str = "domain",
  prefix: str = "",
  begins: tuple[tuple[int, ...], ...] = ((), ()),
  tokenizer: str = "bytes",
  cache_dir: str | os.PathLike | None = None,
  plugins: tuple[str, ...] = (),
  fingerprint: str | None = None,
  whole: bool = True,
  skip_not_utf8: bool = False,
) -> Corpus:
  """Returns the corpus of a dataset; makes its cache where there is none yet.

  Args:
    name: a dataset of `registry.names("datasets")`, or any of TFDS, such as
      "wikipedia/20230601.en"; with `data_dir`, any word to call it by.
    data_dir: folder of a prepared TFDS dataset (the one with dataset_info.json) in
      array_record or parquet format, or texts, see `folders` and `lines`. Documents
      of its split `train` are held out by their hash if there is no `validation`.
    text_feature: the feature that is read; two make two documents, see `pairs`.
    domain_feature: a feature (text or class label) that names a document's
      domain; "none", or "domain" where there is no such feature: one domain
      called "text".
    prefix: text before the first of two, such as "translate English to German: " (T5).
    begins: tokens before each of two, such as those of their languages (NLLB).
    tokenizer: see `tokenizers.load`.
    cache_dir: of the caches; None: $XDG_CACHE_HOME/moe_jax or ~/.cache/moe_jax.
    plugins: folders with datasets of your own, see registry.load.
    fingerprint: only this content will do. A run that resumes passes the one that it
      recorded, and keeps its data. A warning says that files have changed.
    skip_not_utf8: leave out documents of `folders` that are not UTF-8.
    whole: whether tokens must stand for all bytes of the text, for bits per byte.

  Raises:
    ConfigError: no such dataset, folder, feature, split or content, or no space.
  """
  features = documents.Features(
    text_feature, domain_feature, prefix, skip_not_utf8=skip_not_utf8
  )
  if fingerprint and (made := [*cached(name, cache_dir, fingerprint)]):
    sources.tell_changed(made, data_dir, features)
    return made[0]
  tokenizer = tokenizers.load(tokenizer)
  source = sources.find(name, data_dir, plugins, features)
  more = [] if whole or tokenizer.name == "bytes" else ["lossy"]
  more += ["skip_not_utf8"] * skip_not_utf8
  if any(begins):
    _check_begins(begins, tokenizer)
    features, more = features._replace(begins=begins), [*more, begins]
  made_of = [_FORMAT, source[0], features[:3], tokenizer.key, *more]
  entry = caches.entry(name, cache_dir, made_of)

  def write(folder):
    _prepare_in(folder, name, source, features, tokenizer, whole)

  return wanted(caches.get(name, entry, write, _open), fingerprint)


def _check_begins(begins, tokenizer):
  most = tokenizer.vocab_size - 2  # The last token is our end of a document.
  for side, tokens in zip(("source", "target"), begins):
    if tokens and max(tokens) > most:
      raise ConfigError(
        f"task.{side}_begin = {tuple(tokens)} has a token beyond {most}, the last one"
        f" of data.tokenizer = {tokenizer.name!r}; give ids of that tokenizer"
      )


def wanted(corpus: Corpus, fingerprint: str | None) -> Corpus:
  """Returns the corpus.

  Args:
    corpus: any.
    fingerprint: the one that it must have; None: any.

  Raises:
    ConfigError: it has another fingerprint.
  """
  if fingerprint not in (None, corpus.fingerprint):
    raise ConfigError(
      f"{corpus.name} has fingerprint {corpus.fingerprint}, but {fingerprint}"
      " was asked for and is not in data.cache_dir; install the versions that it"
      " was made from (run.json has them), or start a new run"
    )
  return corpus


def cached(
  name: str, cache_dir: str | os.PathLike | None, fingerprint: str | None = None
) -> Iterator[Corpus]:
  """Yields the whole caches of a dataset's name, for any sources.

  Args:
    name, cache_dir: see `prepare`.
    fingerprint: of the corpora that are wanted; None: all.
  """
  entries = caches.entries(name, cache_dir)
  yield from filter(None, (_open(entry, fingerprint) for entry in entries))


def _open(entry, fingerprint=None):
  """Returns the corpus in a cache folder; None if the cache is not whole.

  Args:
    entry: the folder.
    fingerprint: of the corpus that is wanted; for another one, None is
      returned.
  """

  def made(index):
    if fingerprint not in (None, index.get("fingerprint")):
      return None
    arrays = _map_tokens(entry, index)
    # A run records the fingerprint in place of its data.
    caches.check_content(entry, index, lambda: _fingerprint(arrays))
    return Corpus(
      num_bytes_V=tuple(index["num_bytes_V"]),
      parts=((1.0, tuple(index["domains"])),),
      arrays=arrays,
      directory=entry,
      **{k: index[k] for k in _FIELDS},
    )

  return caches.read(entry, _FORMAT, made)


def _map_tokens(folder, index):
  """Returns `Corpus.arrays` of a cache folder."""
  dtype = _dtype(len(index["num_bytes_V"]))

  def array(split, domain):
    size = index["num_tokens"][split][domain]
    if not size:  # A domain without tokens has no file.
      return np.zeros(0, dtype)
    path = _file(folder, split, index["domains"].index(domain))
    return np.memmap(path, dtype, "r", shape=(size,))

  return _table(index["domains"], array)


def _fingerprint(arrays):
  def digest(split, domain):
    return hashlib.sha256(arrays[split][domain]).hexdigest()

  return caches.sha256(_table(arrays["train"], digest))


def _file(folder, split, number):
  return folder / f"{split}-{number:03d}.tokens"


def _table(domains, value):
  return {split: {d: value(split, d) for d in domains} for split in SPLITS}


def _prepare_in(folder, name, source, features, tokenizer, whole):
  """Writes all files of a cache."""
  versions, prepared = source
  builder = prepared(folder)
  features.check(name, builder)
  index = {"format": _FORMAT, "name": name, "sources": versions}
  index |= _write_tokens(name, builder, features, tokenizer, folder, whole)
  index["fingerprint"] = _fingerprint(_map_tokens(folder, index))
  caches.write_index(folder, index)


def _write_tokens(name, builder, features, tokenizer, folder, whole):
  """Writes the files of tokens; returns their entries of the index."""
  domains = documents.label_names(builder, features)
  # (split, domain) -> tokens, documents, bytes of text, bytes of the tokens.
  counts = collections.defaultdict(lambda: np.zeros(4, np.int64))
  dtype = _dtype(tokenizer.vocab_size)
  end = np.array([tokenizer.end])
  for batch in _batches(name, builder, features):
    encoded = tokenizer.encode_all([text for _, _, text, _ in batch])
    pieces = collections.defaultdict(list)
    for (split, domain, text, begin), tokens in zip(batch, encoded):
      if domain not in domains:
        domains.append(domain)
      _check_number(domains, features)
      # An empty text stays empty, and is refused.
      before = np.array(begin if tokens.size else (), tokens.dtype)
      pieces[split, domain] += before, tokens, end
      num_tokens = before.size + tokens.size + 1
      num_bytes = tokenizer.num_bytes_V[tokens].sum()
      counts[split, domain] += num_tokens, 1, len(text), num_bytes
    for (split, domain), arrays in pieces.items():
      with _file(folder, split, domains.index(domain)).open("ab") as file:
        file.write(np.concatenate(arrays, dtype=dtype, casting="unsafe").data)
  _check_bytes(name, features, tokenizer, counts, whole)
  _tell_held_out(name, domains, counts)
  return {
    "tokenizer": tokenizer.key,
    "num_bytes_V": tokenizer.num_bytes_V.tolist(),
    "domains": domains,
    "num_tokens": _table(domains, lambda *place: int(counts[place][0])),
    "num_documents": _table(domains, lambda *place: int(counts[place][1])),
  }


def _batches(name, builder, features):
  """Yields lists of documents that are some megabytes, and shows the progress."""
  splits = builder.info.splits.values()
  total = sum(getattr(split, "num_bytes", 0) or 0 for split in splits)
  with Progress(total or None, "B", unit_scale=True, delay=_QUICK) as progress:
    batch, size = [], 0
    for document in documents.read(name, builder, features):
      batch.append(document)
      size += len(document[2]) + 1
      if size >= _AT_ONCE:
        yield batch
        progress.update(size)
        batch, size = [], 0
    yield batch


def _check_number(domains, features):
  if len(domains) > _MOST_DOMAINS:
    raise ConfigError(
      f'data.domain_feature "{features.domain}" has more than {_MOST_DOMAINS}'
      " values, and a domain is a file and a line of metrics; name a class"
      ' label, or "none" for one domain'
    )


def _tell_held_out(name, domains, counts):
  """Warns of domains that have no document in the validation split."""
  bare = [d for d in domains if not counts["validation", d][1]]
  if bare:
    logging.warning(
      "No document of %d of the %d domains of %s is held out for validation: %s",
      *(len(bare), len(domains), name, ", ".join(bare[:_SHOWN])),
    )


def _check_bytes(name, features, tokenizer, counts, whole):
  """Raises ConfigError for no text, or for tokens that stand for other text."""
  if not any(x[2] for (split, _), x in counts.items() if split == "train"):
    raise ConfigError(
      f"the training documents of dataset {name} hold no text; set"
      f" {' and '.join(features.texts)} to what does"
    )
  _, num_documents, text_bytes, token_bytes = sum(counts.values())
  # Some tokenizers begin each document with a space.
  lost = abs(token_bytes - text_bytes)
  if whole and lost > _MOST_LOST * text_bytes + num_documents:
    raise ConfigError(
      f"the tokens of data.tokenizer = {tokenizer.name!r} stand for {token_bytes}"
      f" bytes, and the text has {text_bytes}; for bits per byte, take one that"
      ' keeps case, spaces and line ends, such as a byte-level BPE, or "bytes"'
    )


def _dtype(vocab_size):
  return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
