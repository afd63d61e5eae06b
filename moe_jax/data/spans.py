"""Span corruption (T5, 1910.10683, 3.1.4): spans of a text to be filled in.

A window of text is cut into runs of tokens that are kept and runs that are not,
in turn. The inputs are the window with one sentinel in place of each run that is
not kept, a noise span. The targets are these spans, each behind its sentinel. An
end token follows on both sides. The sentinels of a row are the tokens after the
vocabulary of the corpus, in ascending order, unless others are named.

  window   a b c d e f g h     noise: c d and h
  inputs   a b V e f g V+1 end
  targets  V c d V+1 h end

Row r of step s depends on the seed, s and r alone, as in `batches`.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.data import batches, draws
from moe_jax.data.text import corpora

_OF_VALIDATION = 2**63  # The seed of validation's noise; no run has this seed.
_SHORTEST = 3  # Inputs of two tokens: one kept, a sentinel, and the end.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption:
  """The numbers by which spans move from a text to its targets (T5).

  inputs_length: tokens of a row of inputs.
  noise_density: share of the tokens that are noise, above 0 and below 1.
  mean_span: mean tokens of a noise span, >= 1.
  targets_length: tokens of a row of targets; None: as many as the noise needs.
  separate_documents: tokens carry the number of their document in the row. A
    target span, with its sentinels, is of the document of its first token, and
    the end token is of the last span's. Otherwise all are of document 0.
  sentinels: (the first sentinel, 1 or -1): they ascend or descend from there,
    such as (32099, -1), the <extra_id_...> of T5; None: the tokens after the
    vocabulary.
  end: the token that ends a document, and both sides; None: that of the corpus.
  start: the token before the first target; None: `end`.

  Raises:
    ConfigError: values that do not go together.
  """

  inputs_length: int
  noise_density: float = 0.15
  mean_span: float = 3.0
  targets_length: int | None = None
  separate_documents: bool = False
  sentinels: tuple[int, int] | None = None
  end: int | None = None
  start: int | None = None

  def __post_init__(self):
    share = self.noise_density, self.mean_span
    needed, given = lengths(self.inputs_length, *share)[1], self.targets_length
    if given is not None and given < needed:
      raise ConfigError(
        f"task.targets_length = {given} is less than the {needed} tokens of the"
        f" targets for data.seq_len = {self.inputs_length}; give {needed} or"
        " more, or None"
      )
    first, step = self.sentinels or (0, 1)
    if abs(step) != 1 or first + step * (self.num_sentinels - 1) < 0:
      raise ConfigError(
        f"task.sentinels = {self.sentinels} must be the first sentinel, and 1 or -1 for"
        f" the direction of the next ones; a row here needs {self.num_sentinels} of them,"
        " and no token is below 0"
      )

  @property
  def lengths(self) -> tuple[int, int]:
    """Tokens of a window, and of a row of targets."""
    window, targets = lengths(
      self.inputs_length, self.noise_density, self.mean_span
    )
    return window, self.targets_length or targets

  @property
  def num_sentinels(self) -> int:
    """The largest number of noise spans in a row."""
    return counts(self.lengths[0], self.noise_density, self.mean_span)[1]

  def of_spans(self, vocab_size: int) -> np.ndarray:
    """The sentinels of a row's spans, for a corpus of `vocab_size` tokens."""
    first, step = self.sentinels or (vocab_size, 1)
    return first + step * np.arange(self.num_sentinels)


def lengths(
  inputs_length: int, noise_density: float = 0.15, mean_span: float = 3.0
) -> tuple[int, int]:
  """Returns the tokens of a window, and of its targets, as in T5.

  The window is the longest one whose inputs have at most `inputs_length`
  tokens. They have exactly as many, except where almost every second token
  would be a sentinel. At a density of a half, targets may be longer than
  inputs; T5 takes a token off both there.

  Args:
    inputs_length, noise_density, mean_span: see `Corruption`.

  Raises:
    ConfigError: values that do not go together.
  """
  if inputs_length < _SHORTEST:
    raise ConfigError(
      f"data.seq_len = {inputs_length} has no room for a token, a sentinel and an"
      f" end; give {_SHORTEST} or more"
    )
  if noise_density / mean_span > 1 - noise_density:
    raise ConfigError(
      f"task.noise_density = {noise_density} with task.mean_span = {mean_span}"
      " asks for more noise spans than there are tokens between them; give a"
      " smaller density or longer spans"
    )

  def both(window):
    num_noise, num_spans = counts(window, noise_density, mean_span)
    return window - num_noise + num_spans + 1, num_noise + num_spans + 1

  longest = math.ceil((inputs_length + 2) / (1 - noise_density)) + 2
  windows = range(2, longest)
  place = bisect.bisect_right(windows, inputs_length, key=lambda n: both(n)[0])
  return windows[place - 1], both(windows[place - 1])[1]


def counts(
  length: int, noise_density: float, mean_span: float
) -> tuple[int, int]:
  """Returns the numbers of noise tokens and of noise spans in a window.

  Args:
    length: tokens of the window, >= 2.
    noise_density, mean_span: see `Corruption`.
  """
  num_noise = min(max(round(length * noise_density), 1), length - 1)
  num_spans = max(round(num_noise / mean_span), 1)
  return num_noise, min(num_spans, length - num_noise)


def noise(
  seed: int, place_R: np.ndarray, length: int, corruption: Corruption
) -> np.ndarray:
  """Draws the tokens of windows that are noise, bool [R, length].

  The noise spans of a row divide its noise tokens at random, all divisions
  being equally likely, and so do the runs between them with the other tokens.
  The row begins with a token that is kept and ends with noise.

  Args:
    seed: of the noise.
    place_R: indices of the rows; a row's noise depends on its own index alone.
    length: tokens of each window, >= 2.
    corruption: see `Corruption`.
  """
  share = corruption.noise_density, corruption.mean_span
  num_noise, num_spans = counts(length, *share)
  random_RN = draws.bits(place_R, length, seed)
  taken_RS = _divided(random_RN[:, :num_noise], num_spans)
  kept_RS = _divided(random_RN[:, num_noise:], num_spans)
  runs = np.stack([kept_RS, taken_RS], axis=2).ravel()
  is_noise = np.tile([False, True], runs.size // 2)
  return np.repeat(is_noise, runs).reshape(-1, length)


def _divided(random_RN, num_runs):
  """Sizes >= 1, [R, num_runs], of random runs that make up N items."""
  random_RN[:, 0] = 0  # The first item begins a run.
  first = np.argpartition(random_RN, num_runs - 1, axis=1)[:, :num_runs]
  return np.diff(np.sort(first, axis=1), append=random_RN.shape[1])


def corrupt(
  token_RN: np.ndarray,
  noise_RN: np.ndarray,
  document_RN: np.ndarray,
  *,
  sentinels: np.ndarray,
  end: int,
) -> batches.Batch:
  """Returns the inputs and the targets of windows.

  Args:
    token_RN: the windows.
    noise_RN: from `noise`: equally many tokens and spans in every row.
    document_RN: number of the document of every token in its row.
    sentinels: of the first span, the second, ...
    end: the token at the end of both sides.

  Returns:
    "inputs" and "targets", int32, and "inputs_document", "targets_document",
    which are those of `Corruption.separate_documents`.
  """
  first_RN = _first(noise_RN)
  of_span_RS = document_RN[first_RN].reshape(len(token_RN), -1)
  inputs, stay_RN = _shortened(token_RN, noise_RN, sentinels)
  documents = document_RN[stay_RN].reshape(inputs.shape)
  targets, stay_RN = _shortened(token_RN, ~noise_RN, sentinels)
  is_sentinel_RL = ~noise_RN[stay_RN].reshape(targets.shape)
  span_RL = np.cumsum(is_sentinel_RL, axis=1) - 1
  ends = np.full((len(token_RN), 1), end), of_span_RS[:, -1:]
  sides = {
    "inputs": (inputs, ends[0]),
    "inputs_document": (documents, ends[1]),
    "targets": (targets, ends[0]),
    "targets_document": (np.take_along_axis(of_span_RS, span_RL, 1), ends[1]),
  }
  return {k: np.hstack(v).astype(np.int32) for k, v in sides.items()}


def _first(noise_RN):
  """Whether a token is the first of a span."""
  first_RN = noise_RN.copy()
  first_RN[:, 1:] &= ~noise_RN[:, :-1]
  return first_RN


def _shortened(token_RN, gone_RN, sentinels):
  """Rows with a sentinel in place of each run of tokens in `gone_RN`.

  Returns:
    The rows, and the places, bool [R, N], that have a token or a sentinel.
  """
  first_RN = _first(gone_RN)
  number_RN = np.cumsum(first_RN, axis=1) - 1
  stay_RN = ~gone_RN | first_RN
  rows = np.where(first_RN, sentinels[number_RN], token_RN)[stay_RN]
  return rows.reshape(len(token_RN), -1), stay_RN


def train_batches(
  corpus: corpora.Corpus,
  seed: int,
  rows: np.ndarray | None = None,
  *,
  corruption: Corruption,
  batch_size: int,
  accumulation: int | None = None,
) -> batches.ByStep:
  """Returns the training batches, indexed by step.

  A window is of one domain, and the next one begins after its last token, so
  that every token is in one window an epoch. Fewer tokens than a window at the
  end of a domain are left out. A window has other noise in every epoch.

  Args:
    corpus, seed, rows, batch_size, accumulation: see `batches.train_batches`.
    corruption: of the windows.

  Returns:
    Batches by step, with arrays [B, L] of each side: "inputs" and "targets"
    int32, "inputs_mask" and "targets_mask" bool, False for padding at the end,
    which is 0, "inputs_document" and "targets_document" int32; "decoder_inputs"
    int32 [B, L], see `batches.with_decoder_inputs`; "domain" int32 [B], the
    index of the row's domain. [A, B/A, ...] with accumulation.

  Raises:
    ConfigError: the corpus is shorter than one window.
  """
  size = corruption.lengths[0]
  of_rows = (size, size, corruption.inputs_length)
  windows = batches.windows(corpus, seed, *of_rows)

  def read(places):
    domains, tokens = windows(places)
    return _batch(corpus, corruption, seed, places, tokens, domains)

  return batches.by_step(read, batch_size, accumulation, rows)


def validation_batches(
  corpus: corpora.Corpus,
  rows: np.ndarray | None = None,
  *,
  corruption: Corruption,
  batch_size: int,
  batches_per_domain: int | None = None,
) -> Iterator[tuple[str, batches.Batch]]:
  """Returns the validation batches of every domain, always the same ones.

  The last window of a domain may be shorter than the others, and the last batch
  is padded with rows. Domains without text are left out.

  Args:
    corpus, rows, batch_size, batches_per_domain: see
      `batches.validation_batches`.
    corruption: of the windows.

  Returns:
    Pairs of a domain's name and a batch as in `train_batches`, of one domain.

  Raises:
    ConfigError: no text.
  """
  size, counts = corruption.lengths[0], {}
  tokens = {
    d: np.asarray(corpus.tokens("validation", d)) for d in corpus.domains
  }
  for domain, own in tokens.items():
    has_text = (own != corpus.end_of_document).any()
    # A window has two tokens or more: at least one is kept, and one is noise.
    counts[domain] = (own.size // size + (own.size % size > 1)) * has_text
  batches.check_validation(corpus, counts)
  return _validation(
    *(corpus, corruption, tokens, counts, batch_size, batches_per_domain, rows)
  )


def _validation(corpus, corruption, tokens, counts, *reading):
  size = corruption.lengths[0]
  firsts = dict(zip(counts, np.cumsum([0, *counts.values()])))
  for domain, domains, numbers in batches.validation_rows(counts, *reading):
    own = [tokens[domain][n * size : (n + 1) * size] for n in numbers]
    places = firsts[domain] + numbers
    of_batch = _OF_VALIDATION, places, own, domains
    yield domain, _batch(corpus, corruption, *of_batch)


def _batch(corpus, corruption, seed, places, windows, domains):
  """Returns a batch of rows that are padded.

  Args:
    corpus, corruption, seed: see `train_batches`.
    places: indices of the first rows in their stream.
    windows: the tokens of these rows.
    domains: index of the domain of every row.
  """
  end = corpus.end_of_document if corruption.end is None else corruption.end
  start = end if corruption.start is None else corruption.start
  sentinels = corruption.of_spans(corpus.vocab_size)
  sides = {"inputs": corruption.inputs_length}
  sides["targets"] = corruption.lengths[1]
  batch = {"domain": domains.astype(np.int32)}
  for side, length in sides.items():
    for name in (side, f"{side}_document"):
      batch[name] = np.zeros((len(domains), length), np.int32)
    batch[f"{side}_mask"] = np.zeros((len(domains), length), np.bool_)
  sizes = np.array([window.size for window in windows], int)
  for size in np.unique(sizes):
    rows = np.flatnonzero(sizes == size)
    token_RN = np.stack([windows[row] for row in rows]).astype(np.int32)
    noise_RN = noise(seed, places[rows], size, corruption)
    ends_RN = token_RN == corpus.end_of_document
    token_RN[ends_RN] = end
    ends_RN &= corruption.separate_documents
    documents = np.cumsum(ends_RN, axis=1) - ends_RN
    tokens = {"sentinels": sentinels, "end": end}
    for name, own in corrupt(token_RN, noise_RN, documents, **tokens).items():
      batch[name][rows, : own.shape[1]] = own
      if name in sides:
        batch[f"{name}_mask"][rows, : own.shape[1]] = True
  return batches.with_decoder_inputs(batch, start)
