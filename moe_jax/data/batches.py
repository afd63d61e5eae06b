"""Batches by step: a batch depends on the number of its step alone.

The training stream is an endless row of windows, each epoch a new permutation
of all of them. Row r of the global batch at step s is element
s * batch_size + r of the stream, so that a run resumes at any step with no
state to restore, and every host of a pod sees the same global batch.
"""

import dataclasses
import fractions
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer
from moe_jax.data.text import corpora

OPTIONS = {
  "seq_len": integer(1),
  "batch_size": integer(1),
  "separate_documents": bool,
}
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ByStep:
  """Batches without an end, indexed by step.

  read: step, counted from 0 -> its batch.
  """

  read: Callable[[int], Batch]

  def __getitem__(self, step: int) -> Batch:
    if step < 0:
      raise IndexError(f"step {step} is before the first one, 0")
    return self.read(int(step))


def train_batches(
  corpus: corpora.Corpus,
  seed: int,
  rows: np.ndarray | None = None,
  *,
  seq_len: int,
  batch_size: int,
  accumulation: int | None = None,
  separate_documents: bool = False,
) -> ByStep:
  """Returns the training batches, indexed by step.

  A window is seq_len + 1 tokens of one domain: the next window begins with the
  last token of this one, so every token but a domain's first is a target once
  an epoch. Fewer than seq_len tokens at the end of a domain are left out.

  Args:
    corpus: from `corpora.prepare` or `mixed.prepare`.
    seed: of the order, >= 0.
    rows: the rows of every batch, or micro-batch, that are read; None: all.
    seq_len: L, tokens of a row, >= 1.
    batch_size: B, rows of a step, >= 1.
    accumulation: A, micro-batches of a step, which divides B; adds a leading
      axis. None: no such axis.
    separate_documents: `mask` is False where the input ends a document, since a
      model that sees one document at a time cannot predict the next one.

  Returns:
    Batches by step: `inputs` and `targets` int32 [B, L], `mask` bool [B, L]
    (True: a real token), `domain` int32 [B], the index of the row's domain; [A,
    B/A, ...] with accumulation, the rows in the same order.

  Raises:
    ConfigError: the corpus is shorter than one window.
  """
  read_windows = windows(corpus, seed, seq_len + 1, seq_len, seq_len)
  end = corpus.end_of_document if separate_documents else None

  def read(places):
    domains, tokens = read_windows(places)
    return _batch(((t, 0) for t in tokens), domains, seq_len, end)

  return by_step(read, batch_size, accumulation, rows)


def by_step(
  read: Callable[[np.ndarray], Batch],
  batch_size: int,
  accumulation: int | None = None,
  rows: np.ndarray | None = None,
) -> ByStep:
  """Returns the batches of a stream of rows, indexed by step.

  Args:
    read: indices [R] of rows in the stream -> their arrays [R, ...].
    batch_size, accumulation, rows: as in `train_batches`.
  """
  rows = slice(None) if rows is None else rows

  def read_step(step):
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    places = places.reshape(accumulation or 1, -1)[:, rows]
    shape = places.shape if accumulation else (-1,)
    batch = read(places.ravel())
    return {k: v.reshape(*shape, *v.shape[1:]) for k, v in batch.items()}

  return ByStep(read_step)


def windows(
  corpus: corpora.Corpus, seed: int, size: int, stride: int, seq_len: int
) -> Callable[[np.ndarray], tuple[np.ndarray, list[np.ndarray]]]:
  """Returns a function from rows of the training stream to their windows.

  It takes indices [R] and returns the domains [R] and the tokens [size] of
  each.

  Args:
    corpus, seed: as in `train_batches`.
    size: tokens of a window.
    stride: tokens from the start of a window to the start of the next one.
    seq_len: `data.seq_len`, for errors.

  Raises:
    ConfigError: the corpus is shorter than one window.
  """
  # Plain arrays: a slice of a np.memmap costs several times as much.
  tokens = [np.asarray(corpus.tokens("train", d)) for d in corpus.domains]
  counts = [max(t.size - size + stride, 0) // stride for t in tokens]
  counts, ends = np.array(counts), np.cumsum(counts)
  window = _order(corpus, (size, seq_len), counts, seed)

  def read(places):
    numbers = np.array([window(row) for row in places.tolist()], int)
    domains = np.searchsorted(ends, numbers, side="right")
    starts = (numbers - (ends - counts)[domains]) * stride
    of_rows = zip(domains, starts)
    return domains, [tokens[d][i : i + size] for d, i in of_rows]

  return read


def _order(corpus, lengths, counts, seed):
  """Returns a function from a row of the training stream to its window's index.

  Args:
    lengths: tokens of a window, and seq_len, for errors.
    counts: number of windows in every domain.
  """
  import grain  # Slow to import: only where data is read.

  parts, first, domain = [], 0, 0
  for number, (_, domains) in enumerate(corpus.parts):
    last = first + int(sum(counts[domain : domain + len(domains)]))
    if first == last:
      size, seq_len = lengths
      raise ConfigError(
        f"no domain of dataset {corpus.name} has the {size} training"
        f" tokens that a row of seq_len {seq_len} needs, but"
        f" {corpus.num_tokens['train']}; use a shorter seq_len or more data"
      )
    # Each part has an order of its own.
    windows = grain.MapDataset.range(first, last).seed(seed + 1000 * number)
    parts.append(windows.shuffle().repeat())
    first, domain = last, domain + len(domains)
  part_of = shares([weight for weight, _ in corpus.parts])

  def window(row):
    part, place = part_of(row)
    return parts[part][place]

  return window


def shares(weights: Sequence[float]) -> Callable[[int], tuple[int, int]]:
  """Returns a function from a row of a stream to (its part, its index there).

  The first part has its share of any first n rows, rounded up. The second part
  has its share of the rows that are left, and so on. The shares are exact at
  any step, where Grain's `MapDataset.mix` rounds the weights first.

  Args:
    weights: of the parts, each above 0.
  """
  weights = [fractions.Fraction(str(weight)) for weight in weights]
  scale = math.lcm(*(weight.denominator for weight in weights))
  weights = [int(weight * scale) for weight in weights]

  def part_of(row):
    rows, total = (row, row + 1), sum(weights)
    for part, weight in enumerate(weights):
      later = [n * (total - weight) // total for n in rows]
      place = rows[0] - later[0]
      if place < rows[1] - later[1]:
        return part, place
      rows, total = later, total - weight

  return part_of


def validation_batches(
  corpus: corpora.Corpus,
  rows: np.ndarray | None = None,
  *,
  seq_len: int,
  batch_size: int,
  batches_per_domain: int | None = None,
  separate_documents: bool = False,
  begin: Sequence[int] = (),
) -> Iterator[tuple[str, Batch]]:
  """Returns the validation batches of every domain, always in the same order.

  Every token but a domain's first is a target exactly once: the last row and
  the last batch of a domain are padded, with `mask` False. Rows without a
  target, and domains in which no text is a target, are left out.

  Args:
    corpus, seq_len, separate_documents: as in `train_batches`.
    rows: the rows of every batch that are read; None: all.
    batch_size: B, rows of a batch, >= 1.
    batches_per_domain: how many batches of each domain, spread evenly over its
      documents; None: all.
    begin: fewer than L tokens that every row begins with, for a model that was
      trained with them. Then a row has tokens of one document, and the first
      token of a document is a target too.

  Returns:
    Pairs of a domain's name and a batch as in `train_batches`, of one domain.

  Raises:
    ConfigError: a number is impossible, or there is no text to predict.
  """
  if len(begin) >= seq_len:
    raise ConfigError(
      f"a row of seq_len {seq_len} begins with {len(begin)} tokens, and has no"
      " room for text; use a longer one"
    )
  end = corpus.end_of_document
  masked = end if separate_documents else None
  domains = {}
  for domain in corpus.domains:
    tokens = np.asarray(corpus.tokens("validation", domain))
    domains[domain] = tokens, _spans(tokens, end, masked, seq_len, len(begin))
  check_validation(corpus, {name: len(x[1]) for name, x in domains.items()})
  options = np.array(begin, np.int64), seq_len, masked
  chosen = batch_size, batches_per_domain, rows
  return _validation(domains, *options, *chosen)


def check_validation(corpus: corpora.Corpus, counts: Mapping[str, int]) -> None:
  """Raises ConfigError for a dataset without a validation row.

  Args:
    corpus: as in `validation_batches`.
    counts: {domain: number of its rows}.
  """
  for _, names in corpus.parts:
    if not any(counts[name] for name in names):
      raise ConfigError(
        f"dataset {corpus.name} has no validation text to predict in {names},"
        f" but {corpus.num_tokens['validation']} tokens; use more text, or put files"
        " of your own into the folders train and validation"
      )


def validation_rows(
  counts: Mapping[str, int],
  batch_size: int,
  batches_per_domain: int | None,
  rows: np.ndarray | None,
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """Yields the rows that every validation batch consists of.

  Args:
    counts: {domain: number of its rows}.
    batch_size, batches_per_domain, rows: as in `validation_batches`.

  Yields:
    Name of the domain, its index for every row of the batch, and the indices of
    its rows that are read: fewer than the batch has, at the domain's end.
  """
  most, first = batches_per_domain and batches_per_domain * batch_size, 0
  rows = np.arange(batch_size) if rows is None else rows
  for number, (domain, count) in enumerate(counts.items()):
    chosen = np.arange(count)
    if most and most < count:
      # The rounding of these floats depends on the index of the first row.
      last = first + count - 1
      chosen = np.linspace(first, last, most).astype(int) - first
    first += count
    for start in range(0, len(chosen), batch_size):
      places = start + rows
      read = chosen[places[places < len(chosen)]]
      yield domain, np.full(len(rows), number), read


def _validation(domains, begin, seq_len, masked, *chosen):
  counts = {domain: len(spans) for domain, (_, spans) in domains.items()}
  for domain, numbers, some in validation_rows(counts, *chosen):
    tokens, spans = domains[domain]
    reads = (
      (np.append(begin, tokens[i:j]), skipped) for i, j, skipped in spans[some]
    )
    yield domain, _batch(reads, numbers, seq_len, masked)


def _spans(tokens, end, masked, seq_len, num_begin):
  """Returns the rows of a domain, integers [rows, 3].

  The three are the row's first token, the place after its last token, and how
  many of its first targets do not count.
  """
  text, length = tokens != end, seq_len - num_begin
  if num_begin:
    firsts = np.flatnonzero(np.append(True, ~text[:-1]))[: tokens.size]
    sizes = np.diff(firsts, append=tokens.size)
    places = np.arange(tokens.size) - np.repeat(firsts, sizes)
    starts = np.flatnonzero((places % length == 0) & (text | (places == 0)))
    stops = np.append(starts[1:], tokens.size)[: starts.size]
    stops += tokens[stops - 1] != end  # The next row repeats a token.
    skipped = num_begin - (places[starts] == 0)
    targets = text
  else:
    counted = tokens[:-1] != masked if masked else text[:-1] | True
    starts = np.unique(np.flatnonzero(counted) // length) * length
    stops, skipped = starts + length + 1, np.zeros_like(starts)
    targets = counted & text[1:]
  spans = np.stack([starts, stops, skipped], axis=1)
  return spans if targets.any() else spans[:0]


def with_decoder_inputs(batch: Batch, start: int) -> Batch:
  """Adds the inputs of the decoder to a batch that has an encoder's.

  Args:
    batch: with "targets", "targets_mask" and "targets_document", arrays [R, L].
    start: the token before the first one of every document.

  Returns:
    The batch with "decoder_inputs", [R, L]: at each place the target before it,
    of the same document. It is 0 at padding.
  """
  document, targets = batch["targets_document"], batch["targets"]
  before = np.full_like(targets, start)
  same = document[:, 1:] == document[:, :-1]
  before[:, 1:] = np.where(same, targets[:, :-1], start)
  before *= batch["targets_mask"]
  return batch | {"decoder_inputs": before}


def _batch(reads, domains, seq_len, end):
  """Returns a batch of rows that are padded.

  Args:
    reads: (tokens, number of first targets that do not count) of the first
      rows.
    domains: index of the domain of every row.
    seq_len: tokens of a row.
    end: the token that is masked as an input, or None.
  """
  window = np.zeros((len(domains), seq_len + 1), np.int32)
  mask = np.zeros((len(domains), seq_len), np.bool_)
  for row, (tokens, skipped) in enumerate(reads):
    window[row, : tokens.size] = tokens
    mask[row, skipped : tokens.size - 1] = True
  if end is not None:
    mask &= window[:, :-1] != end
  return {
    # Copies: views would change with each other.
    "inputs": window[:, :-1].copy(),
    "targets": window[:, 1:].copy(),
    "mask": mask,
    "domain": domains.astype(np.int32),
  }
