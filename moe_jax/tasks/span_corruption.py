"""Span corruption: an encoder-decoder fills in spans of a text (T5, 1910.10683)."""

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, optional
from moe_jax.data import spans
from moe_jax.data.text import mixed
from moe_jax.tasks import Task, sequence_to_sequence


def build(
  config,
  mesh=None,
  fingerprint: str | None = None,
  prepare: bool = True,
  noise_density: number(above=0, below=1) = 0.15,
  mean_span: number(low=1) = 3.0,
  targets_length: optional(integer(1)) = None,
  sentinels: optional(items((integer(0), integer(-1, 1)))) = None,
  end: optional(integer(0)) = None,
  start: optional(integer(0)) = None,
  z_loss: number(low=0) = 0.0,
  label_smoothing: number(0, below=1) = 0.0,
) -> Task:
  """Returns the task of a config, with its text prepared.

  Args:
    config: a whole config, of which `data`, `train.accumulation`, `eval` and
      `plugins` are read. `data.seq_len` is the length of the inputs.
    mesh, fingerprint, prepare: as in `next_token.build`.
    noise_density: share of the tokens that are taken out of the inputs.
    mean_span: mean tokens of a span that is taken out.
    targets_length: tokens of a row of targets; None: as many as the noise
      needs.
    sentinels, end, start: tokens that a published model knows, see
      `spans.Corruption`; None: new ones, after the vocabulary.
    z_loss, label_smoothing: see `sequence_to_sequence.scoring`.

  Raises:
    ConfigError: no such data, or impossible numbers.
  """
  data = config.data
  corruption = spans.Corruption(
    inputs_length=data.seq_len,
    noise_density=noise_density,
    mean_span=mean_span,
    targets_length=targets_length,
    separate_documents=data.separate_documents,
    **{"sentinels": sentinels, "end": end, "start": start},
  )
  # The task reports no bits per byte, and T5's tokens lack some characters.
  corpus = mixed.of_config(config, fingerprint, prepare, whole=False)
  _check_sentinels(corpus, corruption)
  more = {"z_loss": z_loss, "label_smoothing": label_smoothing}
  return of_corpus(config, corpus, corruption, mesh, **more)


def _check_sentinels(corpus, corruption):
  """Raises ConfigError for a sentinel that may also be a token of a text."""
  num_bytes_V = np.asarray(corpus.num_bytes_V)
  for token in map(int, corruption.of_spans(corpus.vocab_size)):
    if num_bytes_V[token : token + 1].any():
      raise ConfigError(
        f"task.sentinels = {corruption.sentinels} has the token {token}, which stands"
        " for text in data.tokenizer; give tokens that no text has, or None"
      )


def of_corpus(
  config, corpus, corruption: spans.Corruption, mesh=None, **losses
) -> Task:
  """Returns the task of a config on text that is prepared already.

  Args:
    config, mesh: as in `build`.
    corpus: from `mixed.prepare`; without text, the task has no batches.
    corruption: what is done to the text.
    **losses: z_loss and label_smoothing.
  """
  _, targets = corruption.lengths
  return sequence_to_sequence.scoring(
    {"inputs": corruption.inputs_length, "targets": targets},
    sequence_to_sequence.vocab_size(
      corpus, corruption, corruption.of_spans(corpus.vocab_size)
    ),
    mesh=mesh,
    **losses,
    **sequence_to_sequence.of_corpus(
      config, corpus, spans, corruption=corruption
    ),
  )
