"""Text to tokens, once: a memory-mapped cache of a prepared TFDS dataset.

The last token of the vocabulary ends a document. The cache is a folder with one
flat file of integers for each split and domain, and an index.json that says
what is in it and where it came from. It appears as a whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from moe_jax.core.errors import ConfigError, did_you_mean, naming
from moe_jax.data import sources, tokenizers

SPLITS = sources.SPLITS

_FORMAT = 2  # Raise it when the files mean something else than before.
_KEY_LENGTH = 16
_MOST_DOMAINS = 256
_MOST_LOST = 0.01  # Of a text's bytes, in its tokens.


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A prepared cache.

  Attributes:
    name: name of the dataset.
    directory: the cache's folder; a built-in dataset's documents lie there too,
      as a TFDS dataset.
    fingerprint: sha256 of every token, by split and domain. Equal for equal
      content, wherever it was prepared.
    num_bytes_V: how many bytes of text each token of the vocabulary stands for;
      its last token ends a document and stands for none.
    domains: names of the domains; a domain's number is its place here.
    num_tokens: tokens by split, then domain.
    num_documents: documents by split, then domain.
    sources: what the text was made of: name to version.
  """

  name: str
  directory: pathlib.Path
  fingerprint: str
  num_bytes_V: tuple[int, ...] = dataclasses.field(compare=False, repr=False)
  domains: tuple[str, ...]
  num_tokens: Mapping[str, Mapping[str, int]] = dataclasses.field(compare=False)
  num_documents: Mapping[str, Mapping[str, int]] = dataclasses.field(
    compare=False
  )
  sources: Mapping[str, str] = dataclasses.field(compare=False)

  @property
  def vocab_size(self) -> int:
    """Number of different tokens."""
    return len(self.num_bytes_V)

  @property
  def end_of_document(self) -> int:
    """The token that ends a document."""
    return self.vocab_size - 1

  @property
  def parts(self) -> tuple[tuple[float, tuple[str, ...]], ...]:
    """(weight, domains) of each part of a mixture; here one part."""
    return ((1.0, self.domains),)

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
        raise ConfigError(
          f'dataset {self.name} has no "{word}"' + did_you_mean(word, known)
        )
    size = self.num_tokens[split][domain]
    if not size:  # An empty file cannot be mapped.
      return np.zeros(0, _dtype(self.vocab_size))
    path = self.directory / _file_name(split, self.domains.index(domain))
    return np.memmap(path, _dtype(self.vocab_size), "r", shape=(size,))


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
  """Returns the tokens of a dataset; makes its cache where there is none yet.

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

  Returns:
    The corpus.

  Raises:
    ConfigError: no such dataset, folder, feature, split or content.
  """
  root = _cache_root(cache_dir)
  if fingerprint is not None:
    for entry in _entries(name, cache_dir):
      corpus = _open(entry, fingerprint)
      if corpus is not None:
        return corpus
  tokenizer = tokenizers.load(tokenizer)
  features = sources.Features(text_feature, domain_feature)
  source = sources.find(name, data_dir, plugins, features)
  key = [source.versions, features, tokenizer.key]
  entry = root / f"{_prefix(name)}-{_key(key)}"
  corpus = _open(entry)
  if corpus is None:
    corpus = _make(name, source, features, tokenizer, entry)
  if fingerprint not in (None, corpus.fingerprint):
    raise ConfigError(
      f"dataset {name} has fingerprint {corpus.fingerprint}, but {fingerprint} "
      f"was asked for and is not in {root}; install the versions that it was "
      "made from (run.json has them), or start a new run"
    )
  return corpus


def cached(name: str, cache_dir: str | os.PathLike | None) -> list[Corpus]:
  """All whole caches of a name, whatever they were made from."""
  found = map(_open, _entries(name, cache_dir))
  return [c for c in found if c is not None]


def _entries(name, cache_dir):
  key = "[0-9a-f]" * _KEY_LENGTH
  return sorted(_cache_root(cache_dir).glob(f"{_prefix(name)}-{key}"))


def _prefix(name):
  return re.sub(r"[^\w.-]", "_", name)


def _make(name, source, features, tokenizer, entry):
  """Prepares beside the final place and moves the whole there at the end."""
  logging.info("Preparing dataset %s in %s, once", name, entry)
  start = time.monotonic()
  with _scratch_folder(entry) as scratch:
    new = scratch / "new"
    new.mkdir()
    builder = source.builder(new)
    sources.check(name, builder, features)
    index = _write_tokens(builder, features, tokenizer, new)
    index |= {
      "format": _FORMAT,
      "name": name,
      "sources": source.versions,
      "tokenizer": tokenizer.key,
    }
    (new / "index.json").write_text(json.dumps(index, indent=2) + "\n")
    if entry.exists() and _open(entry) is None:
      entry.rename(scratch / "broken")
    try:
      new.rename(entry)
    except OSError:  # Another process was faster: its content is the same.
      if _open(entry) is None:
        raise
  corpus = _open(entry)
  logging.info(
    "Prepared dataset %s: tokens %s in %.1f s",
    name,
    corpus.num_tokens,
    time.monotonic() - start,
  )
  return corpus


@contextlib.contextmanager
def _scratch_folder(entry):
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-")
  except OSError as error:
    raise ConfigError(
      f"cannot write the token cache {entry}: {error}; set data.cache_dir or "
      "XDG_CACHE_HOME to a folder that can be written"
    ) from error
  try:
    yield pathlib.Path(folder)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _write_tokens(builder, features, tokenizer, folder):
  """Writes a file for each split and domain; returns what the index says."""
  domains = sources.label_names(builder, features)
  shards = {}  # (split, domain) -> its _Shard.
  with contextlib.ExitStack() as stack:
    for split, domain, text in sources.documents(builder, features):
      if domain not in domains:
        domains.append(domain)
      if len(domains) > _MOST_DOMAINS:
        raise ConfigError(
          f'data.domain_feature "{features.domain}" has more than'
          f" {_MOST_DOMAINS} values, and a domain is a file and a line of"
          ' metrics; name a class label, or "none" for one domain'
        )
      shard = shards.get((split, domain))
      if shard is None:
        path = folder / _file_name(split, domains.index(domain))
        shard = shards[split, domain] = _Shard(
          stack.enter_context(path.open("wb")), tokenizer
        )
      with naming(folder):
        shard.write(text)
  _check_bytes(shards.values(), tokenizer)
  empty = _Shard(None, tokenizer)
  table = {
    split: {domain: shards.get((split, domain), empty) for domain in domains}
    for split in SPLITS
  }
  return {
    "fingerprint": _sha256(_by_shard(table, lambda s: s.digest.hexdigest())),
    "num_bytes_V": tokenizer.num_bytes_V.tolist(),
    "domains": domains,
    "num_tokens": _by_shard(table, lambda s: s.num_tokens),
    "num_documents": _by_shard(table, lambda s: s.num_documents),
  }


def _check_bytes(shards, tokenizer):
  """Raises ConfigError where tokens stand for other bytes than the text has.

  One byte a document is let off: some tokenizers begin each with a space.
  """
  real = sum(s.num_bytes for s in shards)
  counted = sum(s.counted for s in shards)
  most = _MOST_LOST * real + sum(s.num_documents for s in shards)
  if abs(counted - real) > most:
    raise ConfigError(
      f"the tokens of data.tokenizer = {tokenizer.name!r} stand for {counted}"
      f" bytes, and the text has {real}, so that bits per byte would be wrong;"
      " take one that keeps case, spaces and line ends, such as a byte-level"
      ' BPE, or "bytes"'
    )


@dataclasses.dataclass
class _Shard:
  """A file of tokens that grows."""

  file: Any
  tokenizer: tokenizers.Tokenizer
  digest: Any = dataclasses.field(default_factory=hashlib.sha256)
  num_tokens: int = 0
  num_documents: int = 0
  num_bytes: int = 0  # Of the text, and below as the tokens count them.
  counted: int = 0

  def write(self, text):
    tokens = self.tokenizer.encode(text)
    self.num_bytes += len(text)
    self.counted += int(self.tokenizer.num_bytes_V[tokens].sum())
    tokens = np.append(tokens, self.tokenizer.end)
    tokens = tokens.astype(_dtype(self.tokenizer.vocab_size))
    content = tokens.tobytes()
    self.file.write(content)
    self.digest.update(content)
    self.num_tokens += tokens.size
    self.num_documents += 1


def _by_shard(table, get):
  return {
    split: {domain: get(shard) for domain, shard in row.items()}
    for split, row in table.items()
  }


def _open(entry, fingerprint=None):
  """The corpus of a cache folder; None if it is not there or not whole.

  Also if it is of another fingerprint than the one that is wanted.

  Raises:
    ConfigError: it cannot be read, for want of permission for instance.
  """
  try:
    index = json.loads((entry / "index.json").read_text())
    if fingerprint not in (None, index["fingerprint"]):
      return None
    corpus = Corpus(
      name=index["name"],
      directory=entry,
      fingerprint=index["fingerprint"],
      num_bytes_V=tuple(index["num_bytes_V"]),
      domains=tuple(index["domains"]),
      num_tokens=index["num_tokens"],
      num_documents=index["num_documents"],
      sources=index["sources"],
    )
    whole = index["format"] == _FORMAT and _content_is_right(corpus)
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
    whole = False
  except OSError as e:
    raise ConfigError(
      f"the token cache {entry} cannot be read ({e}); make it readable, or set"
      " data.cache_dir to another folder"
    ) from e
  except (ValueError, KeyError, TypeError):  # Not the index that we write.
    whole = False
  if whole:
    return corpus
  if entry.exists():
    logging.warning("The token cache %s is damaged and not used", entry)
  return None


def _content_is_right(corpus):
  """Reads it all: what a run's fingerprint stands for has been looked at."""
  return corpus.fingerprint == _sha256(
    {
      split: {
        domain: _digest(corpus.directory / _file_name(split, number))
        if corpus.num_tokens[split][domain]
        else hashlib.sha256().hexdigest()
        for number, domain in enumerate(corpus.domains)
      }
      for split in SPLITS
    }
  )


def _digest(path):
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_root(cache_dir):
  if cache_dir is not None:
    return pathlib.Path(cache_dir).expanduser().absolute()
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(home).expanduser().absolute() / "moe_jax"


def _dtype(vocab_size):
  return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def _file_name(split, domain_number):
  return f"{split}-{domain_number:03d}.tokens"


def _key(versions):
  return _sha256([_FORMAT, versions])[:_KEY_LENGTH]


def _sha256(value):
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
