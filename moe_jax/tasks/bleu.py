"""BLEU of the texts that an encoder-decoder writes for the sources of its task."""

import itertools
from collections.abc import Iterator

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.models import beam, decoding

_AT_ONCE = 16  # Sources of a search.


def of_run(
  loaded, config, task, number: int, num_beams: int
) -> dict[str, float]:
  """{"bleu": of the corpus, "bleu_pairs": how many pairs it is of}.

  Args:
    loaded: a `trained.Trained`.
    config: of the task.
    task: translation, with batches.
    number: of the first validation pairs that are translated.
    num_beams: see `beam.Beams`; 1: the most probable tokens.

  Raises:
    ConfigError: another task, or sacrebleu is not installed.
  """
  if config.task.name != "translation":
    raise ConfigError(
      f"--bleu is for the task translation, and this run has {config.task.name};"
      " leave it out"
    )
  try:
    import sacrebleu
  except ImportError:
    raise ConfigError(
      "--bleu needs the extra bleu: pip install 'moe_jax[bleu]'"
    ) from None
  pairs = [*itertools.islice(_pairs(task), number)]
  beams = beam.Beams(num_beams) if num_beams > 1 else None
  ends, written = loaded.ends, []
  for first in range(0, len(pairs), _AT_ONCE):
    group = pairs[first : first + _AT_ONCE]
    made = decoding.generate(
      loaded.model,
      loaded.variables,
      [source.tolist() for source, _ in group],
      task.lengths["targets"],
      ends=ends,
      start=loaded.start,
      beams=beams,
    )
    written += [_text(loaded, row) for row in made.tokens_BN]
  wanted = [_text(loaded, target) for _, target in pairs]
  score = sacrebleu.corpus_bleu(written, [wanted]).score
  return {"bleu": score, "bleu_pairs": float(len(pairs))}


def _pairs(task) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(source, target) of the validation pairs, tokens with their ends."""
  for _, batch in task.validation(None):
    for row in range(len(batch["inputs"])):
      sides = []
      for side in ("inputs", "targets"):
        real = batch[f"{side}_mask"][row]
        document = batch[f"{side}_document"][row][real]
        tokens = batch[side][row][real]
        cuts = np.flatnonzero(np.diff(document)) + 1
        sides.append(np.split(tokens, cuts) if tokens.size else [])
      yield from zip(*sides, strict=True)


def _text(loaded, tokens) -> str:
  kept = [t for t in tokens.tolist() if t >= 0 and t not in loaded.ends]
  return loaded.tokenizer.decode(kept)
