"""Corpora: the tokens of a dataset in memory-mapped files, made once.

The last token of the vocabulary ends a document. A token cache is a folder with
one flat file of integers for each split and domain, and an index.json that says
what is in it and where it came from. It appears as a whole or not at all.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, did_you_mean, first_line
from moe_jax.data import documents, tokenizers

SPLITS = documents.SPLITS
Table = Mapping[str, Mapping[str, Any]]  # {split: {domain: value}}

_FORMAT = 3  # Raise it when the files mean something else than before.
_KEY_LENGTH = 16
_MOST_DOMAINS = 256
_MOST_LOST = 0.01  # Of a text's bytes, in its tokens.
# Fields that a corpus and its index have in common.
_FIELDS = ("name", "fingerprint", "num_tokens", "num_documents", "sources")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The tokens of a prepared dataset, or of several.

  Attributes:
    name: name of the dataset, or of several, joined by "+".
    fingerprint: sha256 of every token, by split and domain. Equal for equal
      content, wherever it was prepared.
    num_bytes_V: bytes of text that each token of the vocabulary stands for; its
      last token ends a document and stands for none.
    parts: (weight, names of its domains) of each dataset; a dataset's share of
      the training rows is its weight over the sum of all.
    files: file of the tokens by split, then domain.
    num_tokens: tokens by split, then domain.
    num_documents: documents by split, then domain.
    sources: names and versions of what the text was made from.
    directory: the cache's folder; a built-in dataset's documents lie there too,
      as a TFDS dataset. None for several datasets.
  """

  name: str
  fingerprint: str
  num_bytes_V: tuple[int, ...] = dataclasses.field(repr=False)
  parts: tuple[tuple[float, tuple[str, ...]], ...]
  files: Table = dataclasses.field(repr=False)
  num_tokens: Table
  num_documents: Table
  sources: Mapping
  directory: pathlib.Path | None = None

  @property
  def domains(self) -> tuple[str, ...]:
    """Names of the domains; a domain's number is its place here."""
    return tuple(domain for _, domains in self.parts for domain in domains)

  @property
  def vocab_size(self) -> int:
    """Number of different tokens."""
    return len(self.num_bytes_V)

  @property
  def end_of_document(self) -> int:
    """The token that ends a document."""
    return self.vocab_size - 1

  def tokens(self, split: str, domain: str) -> np.ndarray:
    """Returns the tokens of a domain, one document after the other.

    Args:
      split: "train" or "validation".
      domain: one of `domains`.

    Returns:
      Read-only integers [N], mapped from the file: only what is read is
      loaded.

    Raises:
      ConfigError: no such split or domain.
    """
    for word, known in ((split, SPLITS), (domain, self.domains)):
      if word not in known:
        near = did_you_mean(word, known)
        raise ConfigError(f'dataset {self.name} has no "{word}"{near}')
    size, dtype = self.num_tokens[split][domain], _dtype(self.vocab_size)
    if not size:  # An empty file cannot be mapped.
      return np.zeros(0, dtype)
    return np.memmap(self.files[split][domain], dtype, "r", shape=(size,))


def prepare(
  name: str,
  *,
  data_dir: str | os.PathLike | None = None,
  text_feature: str = "text",
  domain_feature: str = "domain",
  tokenizer: str = "bytes",
  cache_dir: str | os.PathLike | None = None,
  plugins: tuple[str, ...] = (),
  fingerprint: str | None = None,
) -> Corpus:
  """Returns the corpus of a dataset; makes its cache where there is none yet.

  Args:
    name: a dataset of `registry.names("datasets")`, or any that TFDS knows, as
      "ag_news_subset" or "wikipedia/20230601.en"; with `data_dir`, any word to
      call it by.
    data_dir: folder of a prepared TFDS dataset (the one with dataset_info.json)
      in array_record or parquet format. It has a split `train`; documents are
      held out of it by their hash if there is no split `validation`.
    text_feature: the feature that is read.
    domain_feature: a feature (text or class label) that names a document's
      domain; "none", or "domain" where there is no such feature: one domain
      called "text".
    tokenizer: see `tokenizers.load`.
    cache_dir: where the caches lie; $XDG_CACHE_HOME/moe_jax or
      ~/.cache/moe_jax by default.
    plugins: folders with datasets of your own, see registry.load.
    fingerprint: only this content will do. A run that resumes passes the one
      that it recorded, and so keeps its data when a dependency has changed.

  Raises:
    ConfigError: no such dataset, folder, feature, split or content, or no space.
  """
  for corpus in cached(name, cache_dir, fingerprint) if fingerprint else ():
    return corpus
  tokenizer = tokenizers.load(tokenizer)
  features = documents.Features(text_feature, domain_feature)
  source = documents.find(name, data_dir, plugins, features)
  key = _sha256([_FORMAT, source.versions, features, tokenizer.key])
  entry = _entry(name, cache_dir, key[:_KEY_LENGTH])
  corpus = _open(entry) or _make(name, source, features, tokenizer, entry)
  if fingerprint not in (None, corpus.fingerprint):
    raise ConfigError(
      f"dataset {name} has fingerprint {corpus.fingerprint}, but {fingerprint} "
      f"was asked for and is not in {entry.parent}; install the versions that it"
      " was made from (run.json has them), or start a new run"
    )
  return corpus


def cached(
  name: str, cache_dir: str | os.PathLike | None, fingerprint: str | None = None
) -> Iterator[Corpus]:
  """Yields the whole caches of a dataset's name, whatever they were made from.

  Args:
    name, cache_dir: see `prepare`.
    fingerprint: only those with this content; None: all.
  """
  pattern = _entry(name, cache_dir, "[0-9a-f]" * _KEY_LENGTH)
  entries = sorted(pattern.parent.glob(pattern.name))
  yield from filter(None, (_open(entry, fingerprint) for entry in entries))


def _entry(name, cache_dir, key):
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  root = pathlib.Path(cache_dir or f"{home}/moe_jax").expanduser().absolute()
  word = re.sub(r"[^\w.-]", "_", name)
  return root / f"{word}-{key}"


def _open(entry, fingerprint=None):
  """Returns the corpus in a cache folder; None if there is no whole one.

  Args:
    entry: the folder.
    fingerprint: None is returned for a corpus with another one.
  """
  with contextlib.suppress(ConfigError, OSError):
    index = files.read_json(
      entry / "index.json", "the index of a token cache", "remove its folder"
    )
    digest = index.pop("digest", None)
    wanted = fingerprint in (None, index.get("fingerprint"))
    if index.get("format") != _FORMAT or not wanted:
      return None
    if digest == _sha256(index):
      fields = {k: index[k] for k in _FIELDS}
      corpus = Corpus(
        num_bytes_V=tuple(index["num_bytes_V"]),
        parts=((1.0, tuple(index["domains"])),),
        files=_files(entry, index["domains"]),
        directory=entry,
        **fields,
      )
      # All of it is read: a run's fingerprint stands for what it trains on.
      if corpus.fingerprint == _fingerprint(
        corpus.files, corpus.num_tokens, len(corpus.num_bytes_V)
      ):
        return corpus
  if entry.exists():
    logging.warning("The token cache %s is damaged and not used", entry)
  return None


def _fingerprint(paths, num_tokens, vocab_size):
  """Returns the sha256 of all tokens; files of another size do not count."""

  def digest(split, domain):
    size = num_tokens[split][domain] * _dtype(vocab_size).itemsize
    if not size:  # There is no file.
      return hashlib.sha256().hexdigest()
    with paths[split][domain].open("rb") as file:
      right = os.fstat(file.fileno()).st_size == size
      return hashlib.file_digest(file, "sha256").hexdigest() if right else ""

  return _sha256(_table(paths["train"], digest))


def _files(folder, domains):
  def path(split, domain):
    return folder / f"{split}-{domains.index(domain):03d}.tokens"

  return _table(domains, path)


def _table(domains, value):
  return {split: {d: value(split, d) for d in domains} for split in SPLITS}


def _make(name, source, features, tokenizer, entry):
  """Prepares beside the final place and moves the whole there at the end."""
  logging.info("Preparing dataset %s in %s, once", name, entry)
  start = time.monotonic()
  with _scratch_folder(entry) as scratch:
    new = scratch / "new"
    new.mkdir()
    builder = source.builder(new)
    documents.check(name, builder, features)
    index = _write_tokens(name, builder, features, tokenizer, new)
    index |= {"format": _FORMAT, "name": name, "sources": source.versions}
    index["digest"] = _sha256(index)
    (new / "index.json").write_text(json.dumps(index, indent=2))
    if entry.exists() and _open(entry) is None:
      entry.rename(scratch / "broken")
    try:
      new.rename(entry)
    except OSError:  # Another process was faster: its content is the same.
      if _open(entry) is None:
        raise
  corpus, seconds = _open(entry), time.monotonic() - start
  logging.info("Prepared %s: %s in %.1f s", name, corpus.num_tokens, seconds)
  return corpus


@contextlib.contextmanager
def _scratch_folder(entry):
  """A folder beside the entry, for a while; a full disk is one sentence."""
  folder = None
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-")
    yield pathlib.Path(folder)
  except (OSError, RuntimeError) as e:
    # TFDS raises a RuntimeError where its writers find the disk full.
    full = any(os.strerror(n) in str(e) for n in (errno.ENOSPC, errno.EDQUOT))
    if not full and not isinstance(e, OSError):
      raise
    raise ConfigError(
      f"the token cache {entry} cannot be prepared ({first_line(e)}); free space"
      " there, or set data.cache_dir or XDG_CACHE_HOME to a folder that can be"
      " written"
    ) from e
  finally:
    if folder:
      shutil.rmtree(folder, ignore_errors=True)


def _write_tokens(name, builder, features, tokenizer, folder):
  """Writes the files of tokens; returns what the index says of them."""
  domains = documents.label_names(builder, features)
  opened = {}  # (split, domain) -> its file.
  num_tokens, num_documents = collections.Counter(), collections.Counter()
  text_bytes, token_bytes = collections.Counter(), 0
  dtype = _dtype(tokenizer.vocab_size)
  with contextlib.ExitStack() as stack:
    for split, domain, text in documents.read(name, builder, features):
      if domain not in domains:
        domains.append(domain)
      if len(domains) > _MOST_DOMAINS:
        raise ConfigError(
          f'data.domain_feature "{features.domain}" has more than'
          f" {_MOST_DOMAINS} values, and a domain is a file and a line of"
          ' metrics; name a class label, or "none" for one domain'
        )
      place = split, domain
      if place not in opened:
        path = _files(folder, domains)[split][domain]
        opened[place] = stack.enter_context(path.open("wb"))
      tokens = np.append(tokenizer.encode(text), tokenizer.end)
      opened[place].write(tokens.astype(dtype).tobytes())
      num_tokens[place] += tokens.size
      num_documents[place] += 1
      text_bytes[split] += len(text)
      token_bytes += int(tokenizer.num_bytes_V[tokens].sum())
  _check_bytes(name, tokenizer, text_bytes, token_bytes, num_documents.total())
  counts = _table(domains, lambda *place: num_tokens[place])
  return {
    "tokenizer": tokenizer.key,
    "fingerprint": _fingerprint(
      _files(folder, domains), counts, tokenizer.vocab_size
    ),
    "num_bytes_V": tokenizer.num_bytes_V.tolist(),
    "domains": domains,
    "num_tokens": counts,
    "num_documents": _table(domains, lambda *place: num_documents[place]),
  }


def _check_bytes(name, tokenizer, text_bytes, token_bytes, num_documents):
  """Raises ConfigError for no text, or tokens that stand for other text."""
  if not text_bytes["train"]:
    raise ConfigError(
      f"the training documents of dataset {name} hold no text; set"
      " data.text_feature to the feature that does"
    )
  # Some tokenizers begin each document with a space.
  most = _MOST_LOST * text_bytes.total() + num_documents
  if abs(token_bytes - text_bytes.total()) > most:
    raise ConfigError(
      f"the tokens of data.tokenizer = {tokenizer.name!r} stand for"
      f" {token_bytes} bytes, and the text has {text_bytes.total()}, so that"
      " bits per byte would be wrong; take one that keeps case, spaces and line"
      ' ends, such as a byte-level BPE, or "bytes"'
    )


def _dtype(vocab_size):
  return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def _sha256(value):
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
