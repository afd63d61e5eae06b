"""Translation: an encoder-decoder turns a source into its target."""

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, optional, text, word
from moe_jax.data import pairs
from moe_jax.data.text import mixed
from moe_jax.tasks import Task, sequence_to_sequence


def build(
  config,
  mesh=None,
  fingerprint: str | None = None,
  prepare: bool = True,
  source: text() = "source",
  target: text() = "target",
  prefix: str = "",
  source_begin: items(integer(0)) = (),
  target_begin: items(integer(0)) = (),
  targets_length: optional(integer(1)) = None,
  packing: bool = True,
  too_long: pairs.TOO_LONG = "error",
  end: optional(integer(0)) = None,
  start: optional(integer(0)) = None,
  z_loss: number(low=0) = 0.0,
  label_smoothing: number(0, below=1) = 0.0,
) -> Task:
  """Returns the task of a config, with its pairs prepared.

  Args:
    config: a whole config, of which `data`, `train.accumulation`, `eval` and
      `plugins` are read. `data.seq_len` is the length of the inputs, and
      `data.text_feature` is not read.
    mesh, fingerprint, prepare: as in `next_token.build`.
    source, target, prefix: features such as "de" and "en", and text before every
      source.
    source_begin, target_begin: tokens before every source and target, such as those
      of their languages (NLLB, 2207.04672). Parts of `data.mixture` may have others
      of these five.
    targets_length: tokens of a row of targets; None: those of inputs.
    packing: whether a row has several pairs, which do not see each other.
    too_long: "error", "drop" or "truncate", see `pairs.Packing`.
    end, start: tokens that a published model knows, see `pairs.Packing`; None: a
      new one, after the vocabulary.
    z_loss, label_smoothing: see `sequence_to_sequence.scoring`.

  Raises:
    ConfigError: no such data, or a pair that `too_long` refuses.
  """
  data = config.data
  if not data.separate_documents:
    raise ConfigError(
      "data.separate_documents = False is not for the task translation, whose pairs"
      " never see each other; set it to True"
    )
  pair = {"source": source, "target": target, "prefix": prefix}
  pair |= {"source_begin": source_begin, "target_begin": target_begin}
  corpus = mixed.of_config(config, fingerprint, prepare, pair=pair)
  rows = pairs.Packing(
    inputs_length=data.seq_len,
    targets_length=targets_length or data.seq_len,
    several=packing,
    too_long=too_long,
    **{"end": end, "start": start},
  )
  more = {"z_loss": z_loss, "label_smoothing": label_smoothing}
  return of_corpus(config, corpus, rows, mesh, **more)


def begins(config, part: str | None = None) -> tuple[tuple[int, ...], ...]:
  """Returns (tokens at the beginning of all sources, those of all targets).

  Args:
    config: of a run of this task.
    part: the label of a part of `data.mixture`; None: all parts.

  Raises:
    ConfigError: there is no such part, or parts differ.
  """
  parts, task = dict(config.data.mixture), config.task
  if part is not None:
    word(*parts).check(part, "the part of data.mixture")
    parts = {part: parts[part]}
  keys = "source_begin", "target_begin"
  found = {
    tuple(tuple(own.get(key, task.get(key, ()))) for key in keys)
    for own in parts.values() or [{}]
  }
  if len(found) > 1:
    raise ConfigError(
      f"the parts of data.mixture have {len(found)} different pairs of source_begin"
      f" and target_begin; choose one of the parts {', '.join(parts)}"
    )
  return found.pop()


def of_corpus(
  config, corpus, packing: pairs.Packing, mesh=None, **losses
) -> Task:
  """Returns the task of a config on pairs that are prepared already.

  Args:
    config, mesh: as in `build`.
    corpus: of pairs; without text, the task has no batches.
    packing: how pairs become rows.
    **losses: z_loss and label_smoothing.
  """
  return sequence_to_sequence.scoring(
    packing.limits,
    sequence_to_sequence.vocab_size(corpus, packing),
    num_bytes_V=np.asarray(corpus.num_bytes_V, np.int32),
    mesh=mesh,
    **losses,
    **sequence_to_sequence.of_corpus(config, corpus, pairs, packing=packing),
  )
