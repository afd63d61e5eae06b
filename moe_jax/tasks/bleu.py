"""BLEU of the texts that an encoder-decoder writes for the sources of its task."""

import collections
import importlib.util
import itertools
from collections.abc import Sequence

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.models.generation import beam, decoding

_AT_ONCE = 16  # Sources of a search.


def check(config) -> None:
  """Raises ConfigError for another task than translation, or no sacrebleu."""
  if config.task.name != "translation":
    raise ConfigError(
      f"--bleu is for the task translation, and this run has {config.task.name};"
      " leave it out"
    )
  if importlib.util.find_spec("sacrebleu") is None:
    raise ConfigError(
      "--bleu needs the extra bleu: pip install 'moe_jax[bleu]'"
    )


def of_run(
  loaded, task, number: int, num_beams: int, begin: Sequence[int] = ()
) -> tuple[dict[str, float], str]:
  """Returns the BLEU of a model's translations, and sacrebleu's signature.

  The reference of a pair is the text of the target's tokens.

  Args:
    loaded: a `trained.Trained`, which generation takes.
    task: translation, with batches; see `check`.
    number: of the validation pairs that are translated, the first ones of all
      domains in turn.
    num_beams: see `beam.Beams`; 1: the most probable tokens.
    begin: tokens that every target begins with, which are given.

  Returns:
    {"bleu": of the corpus, "bleu_pairs": number of its pairs}; and the
    signature.
  """
  from sacrebleu.metrics import BLEU

  pairs = [*itertools.islice(_in_turn(_pairs(task, number)), number)]
  beams = None
  if num_beams > 1:
    beams = beam.Beams(num_beams, length_before=len(begin))
  ends = loaded.ends if task.end is None else (task.end,)
  start = loaded.start if task.start is None else (task.start,)
  start = *start, *begin
  written = []
  for first in range(0, len(pairs), _AT_ONCE):
    group = pairs[first : first + _AT_ONCE]
    made = decoding.generate(
      loaded.model,
      loaded.variables,
      [source.tolist() for source, _ in group],
      task.lengths["targets"],
      ends=ends,
      start=start,
      beams=beams,
      length=task.lengths["inputs"],
    )
    written += [_text(loaded, row, ends) for row in made.tokens_BN]
  wanted = [_text(loaded, target[len(begin) :], ends) for _, target in pairs]
  metric = BLEU()
  score = metric.corpus_score(written, [wanted]).score
  values = {"bleu": score, "bleu_pairs": float(len(pairs))}
  return values, str(metric.get_signature())


def _in_turn(pairs):
  """The first pair of every domain, then the second ones, ..."""
  for several in itertools.zip_longest(*pairs.values()):
    yield from filter(None, several)


def _pairs(task, most):
  """{domain: its first (source, target)}, tokens with their ends."""
  found = collections.defaultdict(list)
  for domain, batch in task.validation(None):
    if len(found[domain]) < most:
      found[domain] += _of_batch(batch)
  return found


def _of_batch(batch):
  """Yields (source, target) of the pairs of its rows."""
  for row in range(len(batch["inputs"])):
    sides = []
    for side in ("inputs", "targets"):
      real = batch[f"{side}_mask"][row]
      document = batch[f"{side}_document"][row][real]
      tokens = batch[side][row][real]
      cuts = np.flatnonzero(np.diff(document)) + 1
      sides.append(np.split(tokens, cuts) if tokens.size else [])
    yield from zip(*sides, strict=True)


def _text(loaded, tokens, ends) -> str:
  kept = [t for t in tokens.tolist() if t >= 0 and t not in ends]
  return loaded.tokenizer.decode(kept)
