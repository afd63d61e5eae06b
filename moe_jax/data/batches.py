"""Batches by step: what a step sees depends on its number alone.

The training stream is an endless row of windows, each epoch a new permutation
of all of them. Row r of the global batch at step s is element
s * batch_size + r of the stream, so that a run resumes at any step with no
state to restore, and every host of a pod sees the same global batch.
"""

from collections.abc import Iterator

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.data import tokens

Batch = dict[str, np.ndarray]


def train_batches(
  corpus: tokens.Corpus,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  accumulation: int | None = None,
  separate_documents: bool = False,
  rows: np.ndarray | None = None,
) -> "TrainBatches":
  """Returns the training batches, to be indexed by step.

  A window is seq_len + 1 tokens of one domain: the next window begins with the
  last token of this one, so every token but a domain's first is a target once
  an epoch (fewer than seq_len at the end of a domain are left out).

  Args:
    corpus: from `tokens.prepare`.
    seq_len: L, tokens of a row, >= 1.
    batch_size: B, rows of a step, >= 1.
    seed: of the order, >= 0.
    accumulation: A, micro-batches of a step, which divides B; adds a leading
      axis. None for no such axis.
    separate_documents: where the input is the end of a document, `mask` is
      False: a model that looks at one document at a time has nothing to say
      about the next one's first token.
    rows: only these of every batch, or micro-batch, are read; None: all.

  Returns:
    Batches by step: `inputs` and `targets` int32 [B, L], `mask` bool [B, L]
    (True: a real token), `domain` int32 [B], number of the row's domain;
    [A, B/A, ...] with accumulation, the rows in the same order.

  Raises:
    ConfigError: an impossible number, or a corpus shorter than one window.
  """
  _check(seq_len=seq_len, batch_size=batch_size)
  if accumulation is not None:
    _check(accumulation=accumulation)
    if batch_size % accumulation:
      raise ConfigError(
        f"batch_size {batch_size} is not a multiple of accumulation "
        f"{accumulation}; change one of them"
      )
  if seed < 0:
    raise ConfigError(f"the data seed is {seed}; give one that is 0 or more")
  windows = _Windows(
    corpus, "train", seq_len, whole=True, separate=separate_documents
  )
  for _, first, end in windows.parts():
    if first < end:
      continue
    raise ConfigError(
      f"no domain of dataset {corpus.name} has the {seq_len + 1} training "
      f"tokens that a row of seq_len {seq_len} needs, but "
      f"{corpus.num_tokens['train']}; use a shorter seq_len or more data"
    )
  return TrainBatches(windows, batch_size, seed, accumulation, rows)


class TrainBatches:
  """Batches by step, without an end; see `train_batches`."""

  def __init__(self, windows, batch_size, seed, accumulation, rows):
    import grain  # Slow to import: only for who reads data.

    self.num_windows = len(windows)
    self._windows = windows
    self._accumulation = accumulation
    self._rows = slice(None) if rows is None else rows
    weights, parts = [], []
    for number, (weight, first, end) in enumerate(windows.parts()):
      weights.append(weight)
      windows_of_part = grain.MapDataset.range(first, end)
      # No two parts in the same order.
      parts.append(
        windows_of_part.seed(seed + 1000 * number).shuffle().repeat()
      )
    self._numbers = (
      grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]
    ).batch(batch_size)

  def __getitem__(self, step: int) -> Batch:
    """Returns the batch of a step, counted from 0."""
    if step < 0:
      raise IndexError(f"step {step} is before the first one, 0")
    micro = self._numbers[step].reshape(self._accumulation or 1, -1)
    batch = self._windows.batch(micro[:, self._rows].reshape(-1))
    if self._accumulation is None:
      return batch
    return {
      key: value.reshape(self._accumulation, -1, *value.shape[1:])
      for key, value in batch.items()
    }


def validation_batches(
  corpus: tokens.Corpus,
  *,
  seq_len: int,
  batch_size: int,
  batches_per_domain: int | None = None,
  separate_documents: bool = False,
  rows: np.ndarray | None = None,
) -> Iterator[tuple[str, Batch]]:
  """Returns the validation batches of every domain, always in the same order.

  Every token but a domain's first is a target exactly once: the last row and
  the last batch of a domain are padded, with `mask` False.

  Args:
    corpus: from `tokens.prepare`.
    seq_len: L, tokens of a row, >= 1.
    batch_size: B, rows of a batch, >= 1.
    batches_per_domain: so many of each domain, spread evenly over its
      documents; None for all.
    rows: only these of every batch are read; None: all.

  Returns:
    Pairs of a domain's name and a batch as in `train_batches`; a batch has rows
    of one domain. A domain with fewer than two tokens has none.

  Raises:
    ConfigError: an impossible number, or no validation tokens.
  """
  _check(seq_len=seq_len, batch_size=batch_size)
  if batches_per_domain is not None:
    _check(batches_per_domain=batches_per_domain)
  windows = _Windows(
    corpus, "validation", seq_len, whole=False, separate=separate_documents
  )
  for _, first, end in windows.parts():
    if first < end:
      continue
    raise ConfigError(
      f"dataset {corpus.name} has no two validation tokens in a row, but "
      f"{corpus.num_tokens['validation']}; use more data"
    )
  rows = np.arange(batch_size) if rows is None else rows
  return _validation(windows, batch_size, batches_per_domain, rows)


def _validation(windows, batch_size, max_batches, rows):
  for domain, first, end in windows.ranges():
    chosen = range(first, end)
    most = None if max_batches is None else max_batches * batch_size
    if most is not None and most < len(chosen):
      chosen = np.linspace(first, end - 1, most).astype(int).tolist()
    for start in range(0, len(chosen), batch_size):
      places = start + rows
      numbers = [chosen[i] for i in places if i < len(chosen)]
      batch = windows.batch(numbers, rows=len(rows))
      batch["domain"][:] = windows.corpus.domains.index(domain)
      yield domain, batch


class _Windows:
  """The windows of a split, numbered through all domains.

  Args:
    whole: leave out the shorter window at the end of a domain.
    separate: the end of a document is no input, as nothing follows it.
  """

  def __init__(self, corpus, split, seq_len, *, whole, separate):
    self.corpus = corpus
    self._seq_len, self._separate = seq_len, separate
    # Plain arrays: a slice of a np.memmap costs several times as much.
    self._tokens = [np.asarray(corpus.tokens(split, d)) for d in corpus.domains]
    targets = np.array([max(t.size - 1, 0) for t in self._tokens])
    counts = targets // seq_len if whole else -(-targets // seq_len)
    self._ends = np.cumsum(counts)
    self._firsts = self._ends - counts

  def __len__(self):
    return int(self._ends[-1]) if self._ends.size else 0

  def ranges(self):
    """Yields (domain, number of its first window, number after its last)."""
    yield from zip(
      self.corpus.domains, self._firsts.tolist(), self._ends.tolist()
    )

  def parts(self):
    """Yields (weight, first window, number after the last) of each part."""
    ranges = {domain: (first, end) for domain, first, end in self.ranges()}
    for weight, domains in self.corpus.parts:
      yield weight, ranges[domains[0]][0], ranges[domains[-1]][1]

  def batch(self, numbers, rows=None):
    """Returns the batch of these windows, padded to a number of rows."""
    rows = len(numbers) if rows is None else rows
    window = np.zeros((rows, self._seq_len + 1), np.int32)
    mask = np.zeros((rows, self._seq_len), np.bool_)
    domain = np.zeros(rows, np.int32)
    domain[: len(numbers)] = np.searchsorted(self._ends, numbers, side="right")
    for row, number in enumerate(numbers):
      start = (number - self._firsts[domain[row]]) * self._seq_len
      read = self._tokens[domain[row]][start : start + self._seq_len + 1]
      window[row, : read.size] = read
      mask[row, : read.size - 1] = True
    if self._separate:
      mask &= window[:, :-1] != self.corpus.end_of_document
    return {
      # Copies: a view of one would change with the other.
      "inputs": window[:, :-1].copy(),
      "targets": window[:, 1:].copy(),
      "mask": mask,
      "domain": domain,
    }


def _check(**numbers):
  for name, value in numbers.items():
    if value < 1:
      raise ConfigError(f"{name} is {value}; give 1 or more")
