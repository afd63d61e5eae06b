"""Pairs of texts, a source and its target, several of them in a row.

A corpus of pairs has as documents a source, its target, the next source and so
on, see `mixed.prepare`. Each row has pairs of one domain. The pair of a token
is its document, so that a model keeps pairs apart. Both sides of a pair end
with the token that ends a document.

A packing is the pairs in a random order, cut into rows: a row ends before the
first pair whose source or target has no more room. An epoch has every pair
once; it is one of a few packings, whose rows stand in a new random order. Row r
of step s depends on the seed, s and r alone.

In names of arrays P are the pairs of a split, K those of a batch, and 2 the
sides.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import word
from moe_jax.data import batches, draws
from moe_jax.data.text import corpora

TOO_LONG = word("error", "drop", "truncate")
# Epochs take turns among these, so that rows before a step are soon counted.
_PACKINGS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
  """The lengths of rows, and the rules by which pairs are put into them.

  inputs_length, targets_length: tokens of a row of sources, and of targets.
  several: whether a row may have several pairs; otherwise each has one.
  too_long: the rule for a pair that is longer than a row, or has an empty side.
    "error" refuses both, "drop" leaves both out; "truncate" cuts a side that is
    too long to the row, with its end, and refuses empty sides.
  end: the token that ends both sides of a pair; None: the token that ends a
    document.
  start: the token before the first of each target; None: `end`.
  """

  inputs_length: int
  targets_length: int
  several: bool = True
  too_long: str = "error"
  end: int | None = None
  start: int | None = None

  @property
  def limits(self) -> dict[str, int]:
    """{side: tokens of a row}."""
    return {"inputs": self.inputs_length, "targets": self.targets_length}


class Pairs(NamedTuple):
  """The pairs of a split, numbered from its first domain to its last.

  tokens: of each domain.
  first_D: the first pair of each domain, and after them the number of all
    pairs.
  start_P2, size_P2: where the source and the target of a pair begin in the
    tokens of its domain, and how many of their tokens are read, with an end.
  """

  tokens: list[np.ndarray]
  first_D: np.ndarray
  start_P2: np.ndarray
  size_P2: np.ndarray

  def domain(self, pairs: np.ndarray) -> np.ndarray:
    """The indices of the domains of pairs, in the shape of `pairs`."""
    return np.searchsorted(self.first_D, pairs, side="right") - 1


def train_batches(
  corpus: corpora.Corpus,
  seed: int,
  rows: np.ndarray | None = None,
  *,
  packing: Packing,
  batch_size: int,
  accumulation: int | None = None,
) -> batches.ByStep:
  """Returns the training batches, indexed by step.

  Args:
    corpus: of pairs.
    seed, rows, batch_size, accumulation: see `batches.train_batches`. A part of
      a mixture has its share of the rows.
    packing: how pairs become rows.

  Returns:
    Batches by step as those of `spans.train_batches`; "inputs_document" and
    "targets_document" are the number of the pair in its row.

  Raises:
    ConfigError: `packing` refuses a pair, or no pair is left.
  """
  pairs = _of_split(corpus, "train", packing)
  parts, first = [], 0
  for part, (_, names) in enumerate(corpus.parts):
    domains = range(first, first + len(names))
    if pairs.first_D[domains.start] == pairs.first_D[domains.stop]:
      raise ConfigError(
        f"dataset {corpus.name} has no pair for training in {names} that fits;"
        ' set longer rows, or task.too_long to "truncate"'
      )
    parts.append(_stream(pairs, domains, packing, (seed, part)))
    first = domains.stop
  part_of = batches.shares([weight for weight, _ in corpus.parts])

  def read(places):
    of_parts = [part_of(place) for place in places.tolist()]
    pairs_of_rows = [parts[part](row) for part, row in of_parts]
    domains = pairs.domain(np.array([own[0] for own in pairs_of_rows], int))
    return _batch(corpus, packing, pairs, pairs_of_rows, domains)

  return batches.by_step(read, batch_size, accumulation, rows)


def validation_batches(
  corpus: corpora.Corpus,
  rows: np.ndarray | None = None,
  *,
  packing: Packing,
  batch_size: int,
  batches_per_domain: int | None = None,
) -> Iterator[tuple[str, batches.Batch]]:
  """Returns the validation batches of every domain, always the same ones.

  Every pair is there once, in the order of the dataset. The last batch of a
  domain is padded with rows.

  Args:
    corpus, packing: as in `train_batches`.
    rows, batch_size, batches_per_domain: see `batches.validation_batches`.

  Returns:
    Pairs of a domain's name and a batch as in `train_batches`, of one domain.

  Raises:
    ConfigError: `packing` refuses a pair, or no pair is left.
  """
  pairs, cuts = _of_split(corpus, "validation", packing), {}
  for number, domain in enumerate(corpus.domains):
    first, stop = pairs.first_D[number : number + 2]
    cuts[domain] = first + _cut(pairs.size_P2[first:stop], packing)
  counts = {domain: len(cut) - 1 for domain, cut in cuts.items()}
  batches.check_validation(corpus, counts)
  return _validation(
    *(corpus, packing, pairs, cuts),
    batches.validation_rows(counts, batch_size, batches_per_domain, rows),
  )


def _validation(corpus, packing, pairs, cuts, read):
  for domain, domains, chosen in read:
    cut = cuts[domain]
    rows = [np.arange(cut[row], cut[row + 1]) for row in chosen]
    yield domain, _batch(corpus, packing, pairs, rows, domains)


def _of_split(corpus, split, packing) -> Pairs:
  """The pairs of a split that are read."""
  limits = [*packing.limits.values()]
  # Plain arrays: a slice of a np.memmap costs several times as much.
  tokens = [np.asarray(corpus.tokens(split, d)) for d in corpus.domains]
  starts, sizes = [], []
  for own, domain in zip(tokens, corpus.domains):
    ends = np.flatnonzero(own == corpus.end_of_document)
    size_P2 = np.diff(ends, prepend=-1).reshape(-1, 2)
    start_P2 = ends.reshape(-1, 2) + 1 - size_P2
    empty_P, long_P = (size_P2 == 1).any(1), (size_P2 > limits).any(1)
    changed, number = empty_P | long_P, len(size_P2)
    if packing.too_long == "drop":
      start_P2, size_P2 = start_P2[~changed], size_P2[~changed]
    elif empty_P.any():
      _refuse_empty(corpus, f"{split}, domain {domain},", size_P2)
    if packing.too_long != "error" and changed.any():
      words = "left out" if packing.too_long == "drop" else "cut"
      logging.warning(
        "%s, split %s, domain %s: %d of %d pairs are %s (task.too_long = %s)",
        *(corpus.name, split, domain, changed.sum(), number, words),
        packing.too_long,
      )
    starts.append(start_P2)
    sizes.append(size_P2)
  first_D = np.cumsum([0, *map(len, sizes)])
  start_P2, size_P2 = np.concatenate(starts), np.concatenate(sizes)
  if packing.too_long == "error":
    _refuse_long(corpus, split, packing, size_P2)
  return Pairs(tokens, first_D, start_P2, np.minimum(size_P2, limits))


def _refuse_empty(corpus, where, size_P2):
  number = np.flatnonzero((size_P2 == 1).any(1))[0]
  side = ("source", "target")[(size_P2[number] == 1).argmax()]
  raise ConfigError(
    f"pair {number} (from 0) of the split {where} of dataset {corpus.name} has an"
    f' empty {side}; mend it, or set task.too_long to "drop", which leaves such'
    " pairs out"
  )


def _refuse_long(corpus, split, packing, size_P2):
  long_P = (size_P2 > [*packing.limits.values()]).any(1)
  if long_P.any():
    source, target = size_P2.max(axis=0)
    raise ConfigError(
      f"dataset {corpus.name} has {long_P.sum()} pairs in its split {split} that are"
      f" longer than data.seq_len = {packing.inputs_length} or task.targets_length ="
      f" {packing.targets_length}: the longest source has {source} tokens, and the"
      f' longest target {target}; set longer ones, or task.too_long to "drop" or'
      ' "truncate"'
    )


def _cut(size_P2, packing):
  """The first pair of each row that pairs are packed into, and their number."""
  number = len(size_P2)
  if not packing.several:
    return np.arange(number + 1)
  stop_P2 = np.cumsum(size_P2, axis=0)
  # For each pair p, the first pair that no longer fits into a row from p on.
  next_P = np.full(number, number)
  for side, limit in enumerate(packing.limits.values()):
    room_P = stop_P2[:, side] - size_P2[:, side] + limit
    fits_P = np.searchsorted(stop_P2[:, side], room_P, side="right")
    next_P = np.minimum(next_P, fits_P)
  following, firsts = next_P.tolist(), [0]
  while firsts[-1] < number:
    firsts.append(following[firsts[-1]])
  return np.array(firsts)


def _stream(pairs, domains, packing, key) -> Callable[[int], np.ndarray]:
  """Returns a function from the index of a row to the indices of its pairs.

  Args:
    pairs: see `Pairs`.
    domains: indices of the domains in the stream.
    packing: see `Packing`.
    key: of its random numbers.
  """

  @functools.lru_cache(maxsize=2)
  def packed(number):
    return _packed(pairs, domains, packing, (*key, 0, number))

  @functools.cache
  def count(number):
    return len(packed(number)[1]) - 1

  @functools.lru_cache(maxsize=2)
  def order(epoch):
    return draws.permutation(count(epoch % _PACKINGS), *key, 1, epoch)

  def place(row):
    """(epoch, number in it)."""
    first = 0
    for number in range(_PACKINGS):
      if row < first + count(number):
        return number, row - first
      first += count(number)
    rounds, row = divmod(row, first)
    epoch, row = place(row)
    return rounds * _PACKINGS + epoch, row

  def read(row):
    epoch, row = place(row)
    (pair_P, cut_R), row = packed(epoch % _PACKINGS), order(epoch)[row]
    return pair_P[cut_R[row] : cut_R[row + 1]]

  return read


def _packed(pairs, domains, packing, key):
  """Packs the pairs of some domains into rows.

  Returns:
    Pairs in the order of the rows; and where each row begins, and the last one
    ends.
  """
  orders, cuts, before = [], [np.zeros(1, int)], 0
  for domain in domains:
    first, stop = pairs.first_D[domain : domain + 2]
    order = first + draws.permutation(stop - first, *key, domain)
    cuts.append(before + _cut(pairs.size_P2[order], packing)[1:])
    orders.append(order)
    before += len(order)
  return np.concatenate(orders), np.concatenate(cuts)


def _batch(corpus, packing, pairs, rows, domains):
  """Returns a batch of rows that are padded.

  Args:
    corpus, packing: see `train_batches`.
    pairs: see `Pairs`.
    rows: the indices of the pairs in each of the first rows.
    domains: index of the domain of every row.
  """
  end = corpus.end_of_document if packing.end is None else packing.end
  start = end if packing.start is None else packing.start
  counts = np.array([len(row) for row in rows], int)
  row_K = np.repeat(np.arange(len(rows)), counts)
  of_pairs = {
    "pair_K": np.concatenate([np.zeros(0, int), *rows]),
    "row_K": row_K,
    "first_K": np.searchsorted(row_K, row_K),
  }
  batch = {"domain": domains.astype(np.int32)}
  for side, (name, length) in enumerate(packing.limits.items()):
    shape = len(domains), length
    batch |= _side(pairs, side, name, shape, end, **of_pairs)
  return batches.with_decoder_inputs(batch, start)


def _side(pairs, side, name, shape, end, *, pair_K, row_K, first_K):
  """Returns the three arrays of a side of a batch.

  Args:
    pairs: see `Pairs`.
    side: 0 for sources, 1 for targets.
    name: the beginning of the arrays' names.
    shape: of the arrays.
    end: the token that ends a text.
    pair_K, row_K: indices of the pairs of the batch, and of their rows.
    first_K: for each pair, the place among them of the first pair of its row.
  """
  size_K, read_K = pairs.size_P2[pair_K, side], pairs.start_P2[pair_K, side]
  begin_K, domain_K = np.cumsum(size_K) - size_K, pairs.domain(pair_K)
  write_K = row_K * shape[1] + begin_K - begin_K[first_K]
  tokens, written = np.zeros(shape, np.int32), _ragged(write_K, size_K)
  documents, mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
  for domain in np.unique(domain_K):
    own_K = domain_K == domain
    read = _ragged(read_K[own_K], size_K[own_K])
    place = _ragged(write_K[own_K], size_K[own_K])
    tokens.ravel()[place] = pairs.tokens[domain][read]
  tokens.ravel()[write_K + size_K - 1] = end  # Truncated texts have no end yet.
  number_K = np.arange(len(pair_K)) - first_K
  documents.ravel()[written] = np.repeat(number_K, size_K)
  mask.ravel()[written] = True
  return {name: tokens, f"{name}_document": documents, f"{name}_mask": mask}


def _ragged(begin_K, size_K):
  """The ranges [begin, begin + size) of all pairs, concatenated."""
  before_K = np.cumsum(size_K) - size_K
  return np.repeat(begin_K - before_K, size_K) + np.arange(size_K.sum())
