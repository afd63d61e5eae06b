"""Beam search: the texts whose tokens together have the highest probability.

Each prompt has W beams, texts that go on. In a step every beam is continued
with every token, and the most probable continuations are candidates. Those that
end are finished texts, of which the W best are kept; the W best of the others
are the next beams. A finished text is worth log p(text) / length^penalty. The
rules, and hence the results, are those of transformers 5.

Here B are prompts, W beams, J candidates, N tokens of a text, V the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import arguments, either, integer, number, word
from moe_jax.moe.types import Array


class Beams(NamedTuple):
  """Options of a beam search.

  num_beams: W, texts that are followed at a time.
  length_penalty: power of the length by which log-probabilities are divided;
    above 0 longer texts are favoured, below 0 shorter ones. The length counts
    all tokens after the prompt, also the one that ends the text.
  early_stopping: whether a prompt is done when it has W finished texts. False:
    it goes on while the best beam, if it ended now, would be better than the
    worst of these texts. "never": while the best beam could become better,
    which is an exact bound for a penalty of 0 or more.
  num_returned: how many of the best texts of a prompt are returned.
  length_before: tokens before the continuation that the length counts too: the
    last ones of the prompt, or of `start`, such as the token of a language that
    transformers calls forced_bos_token_id.
  """

  num_beams: integer(1)
  length_penalty: number(-8, 8) = 1.0
  early_stopping: either(bool, word("never")) = False
  num_returned: integer(1) = 1
  length_before: integer(0) = 0

  def check(self, num_continuing: int) -> None:
    """Raises ConfigError for impossible values.

    Args:
      num_continuing: tokens of the vocabulary that do not end a text.
    """
    arguments(Beams).check(self._asdict(), "beams")
    integer(1, max(num_continuing, 1)).check(self.num_beams, "beams.num_beams")
    if self.num_returned > self.num_beams:
      raise ConfigError(
        f"beams.num_returned = {self.num_returned} is more than beams.num_beams ="
        f" {self.num_beams}, and a prompt has no more texts; raise num_beams"
      )


class Texts(NamedTuple):
  """W texts of each prompt, in descending order of their scores.

  token_BWN: -1 after the last token.
  beam_BWN: the beam from which each token came, counted before its step.
  score_BW: see `State`.
  """

  token_BWN: Array
  beam_BWN: Array
  score_BW: Array

  def take(self, index_BJ: Array) -> "Texts":
    """Returns the texts with these indices, of each prompt."""
    wide = index_BJ[..., None]
    return Texts(
      jnp.take_along_axis(self.token_BWN, wide, axis=1),
      jnp.take_along_axis(self.beam_BWN, wide, axis=1),
      jnp.take_along_axis(self.score_BW, index_BJ, axis=1),
    )

  def best(self, number: int) -> "Texts":
    """Returns the `number` texts of the highest scores, in descending order."""
    return self.take(jax.lax.top_k(self.score_BW, number)[1])


class State(NamedTuple):
  """The state of a search between two steps.

  running: the beams; their scores are log-probabilities.
  finished: the best texts that have ended; their scores are divided by the length's
    power. -inf: there is none yet.
  open_B: whether a prompt may still get better texts.
  """

  running: Texts
  finished: Texts
  open_B: Array


class StepNumbers(NamedTuple):
  """Numbers of one step of a search; other numbers need no other program.

  place: index of the new token in its text.
  ends: tokens that end a text.
  is_last: whether all texts end here.
  divisor: of the scores of texts that end here.
  bound: divisor of the score that the best beam may reach; 0: that score does
    not matter.
  """

  place: np.int32
  ends: np.ndarray
  is_last: np.bool_
  divisor: np.float32
  bound: np.float32


def numbers_of_step(
  beams: Beams, place: int, num_tokens: int, ends
) -> StepNumbers:
  """Returns the numbers of the step that adds the token at a place.

  Args:
    beams: of the search.
    place: index of the token in its text.
    num_tokens: N.
    ends: tokens that end a text.
  """
  length, longest = (beams.length_before + n for n in (place + 1, num_tokens))
  far = beams.early_stopping == "never" and beams.length_penalty > 0
  divisor, bound = (
    float(n) ** beams.length_penalty
    for n in (length, longest if far else length)
  )
  return StepNumbers(
    np.int32(place),
    np.asarray(ends, np.int32),
    np.bool_(place + 1 == num_tokens),
    np.float32(divisor),
    np.float32(0 if beams.early_stopping is True else bound),
  )


def begin(batch: int, num_beams: int, num_tokens: int, dtype) -> State:
  """Returns the state before the first token, with one possible beam a prompt.

  Args:
    batch: B.
    num_beams: W.
    num_tokens: N.
    dtype: of the logits.
  """
  shape = batch, num_beams
  none_BWN = jnp.full((*shape, num_tokens), -1, jnp.int32)
  no_BW = jnp.full(shape, -jnp.inf, jnp.promote_types(dtype, jnp.float32))
  finished = Texts(none_BWN, none_BWN, no_BW)
  running = finished._replace(score_BW=no_BW.at[:, 0].set(0))
  return State(running, finished, jnp.ones(batch, bool))


def advance(
  state: State, logits_BWV: Array, now: StepNumbers
) -> tuple[State, Array]:
  """Adds a token to every beam.

  Args:
    state: before the token.
    logits_BWV: of the next token of each beam.
    now: from `numbers_of_step`.

  Returns:
    The state; and parent_BW, the beam that each of the new beams continues.
  """
  candidates, ended_BJ = _candidates(state.running, logits_BWV, now)
  score_BJ, num_beams = candidates.score_BW, logits_BWV.shape[1]
  going_on = candidates._replace(
    score_BW=jnp.where(ended_BJ, -jnp.inf, score_BJ)
  )
  running = going_on.best(num_beams)
  # Candidates behind the first W may go on, but not end.
  counts_BJ = ended_BJ & (jnp.arange(score_BJ.shape[1]) < num_beams)[None]
  counts_BJ &= state.open_B[:, None]
  worth_BJ = jnp.where(counts_BJ, score_BJ / now.divisor, -jnp.inf)
  ending = candidates._replace(score_BW=worth_BJ)
  both = zip(state.finished, ending)
  both = Texts(*(jnp.concatenate(pair, axis=1) for pair in both))
  finished = both.best(num_beams)
  worst_B = finished.score_BW[:, -1]
  reached_B = running.score_BW[:, 0] / jnp.where(now.bound, now.bound, 1)
  better_B = (reached_B > worst_B) & (now.bound > 0)
  open_B = state.open_B & ~now.is_last & (better_B | (worst_B == -jnp.inf))
  return State(running, finished, open_B), running.beam_BWN[:, :, now.place]


def _candidates(running, logits_BWV, now):
  """The most probable continuations [B, J], and whether each ends there."""
  batch, num_beams, vocab_size = logits_BWV.shape
  score_BWV = jax.nn.log_softmax(logits_BWV.astype(running.score_BW.dtype))
  score_BWV += running.score_BW[..., None]
  # Enough that W of them go on, even if every beam ends in all possible ways.
  number = min(max(2, 1 + now.ends.size), vocab_size) * num_beams
  score_BJ, index_BJ = jax.lax.top_k(
    score_BWV.reshape(batch, num_beams * vocab_size), number
  )
  beam_BJ, token_BJ = index_BJ // vocab_size, index_BJ % vocab_size
  texts = running.take(beam_BJ)
  made = Texts(
    texts.token_BWN.at[:, :, now.place].set(token_BJ),
    texts.beam_BWN.at[:, :, now.place].set(beam_BJ),
    score_BJ,
  )
  return made, jnp.isin(token_BJ, now.ends) | now.is_last


# The collections of a cache, "cache" and "memory", are trees of arrays with a row for
# each text. The arrays of layers have an axis of repeats before the rows. An array
# with a single row is for all of them, and so are numbers.


def repeated(cache, batch: int, num_beams: int):
  """Returns a cache in which the row of each prompt stands once for every beam.

  Args:
    cache: of the prompts.
    batch: B.
    num_beams: W.
  """

  def repeat(path, x):
    axis = _row_axis(path)
    if x.ndim <= axis or x.shape[axis] != batch:
      return x
    return jnp.repeat(x, num_beams, axis=axis)

  return jax.tree_util.tree_map_with_path(repeat, cache)


def reordered(cache, parent_BW: Array):
  """Returns a cache in which every beam has the row of its parent.

  Args:
    cache: of B * W rows. Its "memory" is the same for all beams of a prompt.
    parent_BW: the beam of the same prompt, in [0, W), that each beam continues.
  """
  batch, num_beams = parent_BW.shape

  def reorder(path, x):
    axis = _row_axis(path)
    if x.ndim <= axis:
      return x
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    rows = x.reshape(*before, batch, num_beams, *after)
    index = parent_BW.reshape(
      *(1,) * axis, batch, num_beams, *(1,) * len(after)
    )
    return jnp.take_along_axis(rows, index, axis=axis + 1).reshape(x.shape)

  own = jax.tree_util.tree_map_with_path(reorder, {"cache": cache["cache"]})
  return cache | own


def _row_axis(path):
  """The axis of the rows in an array of a cache; `path` has its names."""
  return 0 if len(path) == 2 else 1
