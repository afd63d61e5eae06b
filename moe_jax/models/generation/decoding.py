"""Texts from a model, token by token, with a cache of keys and values.

This file is long because drawing tokens and searching for texts share the steps
of a model, the padding of texts, and the checks of input.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import arguments, integer, number, optional
from moe_jax.models.encoder_decoder import Text
from moe_jax.models.generation import beam
from moe_jax.moe.types import TokenChoice


class Sampling(NamedTuple):
  """Options for drawing the next token.

  temperature: logits are divided by it; 0 takes the most probable token.
  top_k: draw from this many of the most probable tokens only; None: from all.
  top_p: draw from the most probable tokens that together reach this probability
    (nucleus, 1904.09751), in (0, 1]; None: from all.
  seed: of the draws.
  """

  temperature: number(0) = 0.0
  top_k: optional(integer(1)) = None
  top_p: optional(number(above=0, high=1)) = None
  seed: integer(0) = 0


GREEDY = Sampling()  # The most probable tokens.


class Generated(NamedTuple):
  """The tokens after prompts, and the experts that they used.

  tokens_BN: the continuation of each prompt, up to and with the token that ends
    the text; -1 behind it. Of a beam search, the best `num_returned` texts of
    the first prompt, then those of the next.
  experts: {layer: [B, L + N - 1, K]} of all tokens but the last, those of
    padding included; {} if they were not asked for. In an encoder's layers,
    those of the prompt alone, [B, L, K].
  score_B: of the texts of a beam search, see `beam.Beams`; None without one.
  """

  tokens_BN: np.ndarray
  experts: dict[str, np.ndarray]
  score_B: np.ndarray | None = None


def generate(
  model,
  variables,
  prompts: Sequence[Sequence[int]],
  num_tokens: int,
  sampling: Sampling = GREEDY,
  *,
  ends: Sequence[int] = (),
  experts: bool = False,
  start: Sequence[int] | Sequence[Sequence[int]] | None = None,
  beams: beam.Beams | None = None,
  length: int | None = None,
) -> Generated:
  """Continues prompts, or answers them, all at once.

  Args:
    model: dropless, or its capacity is that of a single token; on its mesh.
    variables: {"params": ..., "balance": ...}, the second if the model has it.
    prompts: B of them, each of at least one token: texts that a decoder
      continues, or an encoder's inputs.
    num_tokens: N, the most tokens for each.
    sampling: how tokens are drawn; by default the most probable ones.
    ends: tokens that end a text.
    experts: also return the experts that were chosen.
    start: of an encoder-decoder, the tokens that its decoder begins with, such
      as T5's (0,); or such tokens for each prompt. They are not returned.
    beams: search for the texts of the highest probability; None: tokens are
      drawn one after another.
    length: tokens that prompts are padded to, so that several calls share a
      program; None: those of the longest prompt.

  Raises:
    ConfigError: impossible values.
  """
  starts = _starts(model, prompts, start)
  _check(model, prompts, starts, num_tokens, sampling)
  if experts:
    _check_experts(model)
  shards = parallel.token_shards(model.arch.mesh)
  if starts is None:
    texts = _padded(prompts, shards, length)
  else:
    texts = _padded(starts, shards)
  room = texts[0].shape[1] + num_tokens
  if starts is not None:
    texts = Text(*_padded(prompts, shards, length, after=True)), Text(*texts)
  options = model, room, experts
  asked = len(prompts), num_tokens, tuple(dict.fromkeys(ends))
  if beams is None:
    return _draw(options, variables, texts, sampling, *asked)
  ending = len(set(ends).intersection(range(model.arch.vocab_size)))
  beams.check(model.arch.vocab_size - ending)
  if sampling != GREEDY._replace(seed=sampling.seed):
    raise ConfigError(
      f"beams with sampling.temperature = {sampling.temperature}, top_k ="
      f" {sampling.top_k} and top_p = {sampling.top_p}: a search draws nothing; leave"
      " out the beams or these"
    )
  return _search(options, variables, texts, beams, *asked)


def _draw(options, variables, texts, sampling, rows, num_tokens, ends):
  """`generate` without beams, from padded texts."""
  model, cache, made, routed, over_B = options[0], {}, [], [], False
  for rng in jax.random.split(jax.random.key(sampling.seed), num_tokens):
    cache, logits_BV, chosen = step(*options, variables, cache, *texts)
    token_B = sample(logits_BV, rng, sampling._replace(seed=0))
    made.append(np.where(over_B, -1, np.asarray(token_B)))
    routed.append(chosen)
    over_B = over_B | np.isin(made[-1], ends)
    if over_B.all():
      break
    texts = _next(model, token_B)
  asked = slice(rows)
  chosen = _by_layer(routed, model.sublayers, lambda x, _: x[:, asked])
  return Generated(np.stack(made, axis=1)[asked], chosen)


def _search(options, variables, texts, beams, rows, num_tokens, ends):
  """`generate` with beams, from padded texts."""
  sizes, told = (beams.num_beams, num_tokens), (num_tokens, ends)
  cache, logits_BV, chosen = step(*options, variables, {}, *texts)
  now, routed = beam.numbers_of_step(beams, 0, *told), [chosen]
  cache, state = first_beams(*sizes, cache, logits_BV, now)
  for place in range(1, num_tokens):
    if not np.asarray(state.open_B)[:rows].any():
      break
    now = beam.numbers_of_step(beams, place, *told)
    cache, state, chosen = next_beams(*options, variables, cache, state, now)
    routed.append(chosen)
  found = jax.device_get(state.finished.best(beams.num_returned))
  token_BWN, beam_BWN, score_BW = (x[:rows] for x in found)
  tokens_BN = token_BWN.reshape(-1, num_tokens)
  longest = (tokens_BN >= 0).sum(axis=1).max()

  def of_texts(expert_RBLK, place):
    """The experts that the returned texts chose in the step at a place."""
    if not place:
      return expert_RBLK[:, :rows].repeat(beams.num_returned, axis=1)
    # After the end of a text any row serves: nobody reads it.
    beam_BW = np.maximum(beam_BWN[:, :, place], 0)
    row_BW = beams.num_beams * np.arange(rows)[:, None] + beam_BW
    return expert_RBLK[:, row_BW.ravel()]

  chosen = _by_layer(routed[:longest], options[0].sublayers, of_texts)
  return Generated(tokens_BN[:, :longest], chosen, score_BW.ravel())


def takes_two(model) -> bool:
  """Whether a model has an encoder and a decoder."""
  return len(model.example(1)) == 2


def _starts(model, prompts, start):
  """The first tokens of the decoder for each prompt; None without an encoder."""
  if not takes_two(model):
    if start is not None:
      raise ConfigError(
        f"start = {start} is for an encoder-decoder, and this model has no encoder;"
        " put these tokens at the end of the prompts"
      )
    return None
  if start is None or not len(start):
    raise ConfigError(
      "an encoder-decoder needs a token that its texts begin with; give start, such as"
      " (0,) for T5"
    )
  starts = [start] * len(prompts) if np.ndim(start[0]) == 0 else [*start]
  if len(starts) != len(prompts) or not all(map(len, starts)):
    raise ConfigError(
      f"start has tokens for {sum(map(bool, map(len, starts)))} texts, and there are"
      f" {len(prompts)} prompts; give at least one token for each, or the same for all"
    )
  return starts


def _padded(prompts, shards, length=None, after=False):
  """Tokens and mask, padding first or last, of rows that divide over devices."""
  rows = [*prompts, *[prompts[0]] * (-len(prompts) % shards)]
  length_B = np.array([len(row) for row in rows])
  length = max(length_B.max(), length or 0)
  padding_B = length - length_B
  tokens_BL = np.stack(
    [np.pad(x, (0, n) if after else (n, 0)) for x, n in zip(rows, padding_B)]
  )
  mask_BL = np.arange(length) >= padding_B[:, None]
  mask_BL = mask_BL[:, ::-1] if after else mask_BL
  return tokens_BL.astype(np.int32), mask_BL


def _next(model, token_B):
  """The arguments of a model for one more token of each text."""
  text = token_B[:, None], jnp.ones((len(token_B), 1), bool)
  return (None, Text(*text)) if takes_two(model) else text


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def step(model, length, experts, variables, cache, *texts):
  """Runs prompts, or one more token of each, through a model.

  Args:
    model: a decoder, or an encoder-decoder.
    length: tokens of its decoder that the cache has room for.
    experts: whether to return the experts that were chosen.
    variables: of the model.
    cache: {"cache": ..., "memory": ...} that the last step returned, of the
      tokens so far, and of the encoder's output; {} for prompts. It is donated.
    *texts: tokens_BL and mask_BL as in `Decoder.__call__`, or inputs and
      targets as in `EncoderDecoder.__call__`.

  Returns:
    The cache; logits [B, V] of each row's next token; {path: experts [R, B, L,
    K]} of the layers whose tokens this call has.
  """
  (logits_BLV, aux), changed = model.apply(
    {**variables, **cache},
    *texts,
    collect="routing" if experts else None,
    cache_length=length,
    mutable=["cache", "memory"],
  )
  chosen = {}
  for path in model.sublayers if experts else ():
    if "choice" in (of_path := models.at(aux, path)):
      expert_RGTK = of_path["choice"].expert_TK
      repeats, (*_, top_k) = len(expert_RGTK), expert_RGTK.shape
      shape = repeats, len(logits_BLV), -1, top_k
      chosen[path] = expert_RGTK.reshape(shape)
  return changed, logits_BLV[:, -1], chosen


@functools.partial(jax.jit, static_argnums=(0, 1))
def first_beams(num_beams, num_tokens, cache, logits_BV, now: beam.StepNumbers):
  """Returns (the cache of every beam, the state) after the first token.

  Args:
    num_beams, num_tokens: of the search.
    cache: of the prompts, as `step` returns it.
    logits_BV: of the first tokens.
    now: from `beam.numbers_of_step`.
  """
  batch, vocab_size = logits_BV.shape
  state = beam.begin(batch, num_beams, num_tokens, logits_BV.dtype)
  shape = batch, num_beams, vocab_size
  logits_BWV = jnp.broadcast_to(logits_BV[:, None], shape)
  state, _ = beam.advance(state, logits_BWV, now)
  return beam.repeated(cache, batch, num_beams), state


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def next_beams(model, length, experts, variables, cache, state, now):
  """Returns the beams after a later token, and the experts of the token before.

  Args:
    model, length, experts, variables: as in `step`.
    cache, state: from the last step; they are donated.
    now: from `beam.numbers_of_step`.
  """
  token_BW = state.running.token_BWN[:, :, now.place - 1]
  texts = _next(model, token_BW.ravel())
  options = model, length, experts, variables
  cache, logits_NV, chosen = step(*options, cache, *texts)
  logits_BWV = logits_NV.reshape(*token_BW.shape, -1)
  state, parent_BW = beam.advance(state, logits_BWV, now)
  return beam.reordered(cache, parent_BW), state, chosen


@functools.partial(jax.jit, static_argnames="sampling")
def sample(logits_BV, rng, sampling: Sampling):
  """Draws the next token of each row, int32 [B].

  Args:
    logits_BV: of the next tokens.
    rng: a key.
    sampling: options; its `seed` is not read.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  inside_BV = jnp.ones(sorted_BV.shape, bool)
  if sampling.top_k is not None:
    inside_BV = sorted_BV >= sorted_BV[:, sampling.top_k - 1 : sampling.top_k]
  if sampling.top_p is not None:
    prob_BV = jax.nn.softmax(jnp.where(inside_BV, sorted_BV, -jnp.inf), axis=-1)
    # A token is taken if the more probable ones do not reach top_p yet.
    inside_BV &= jnp.cumsum(prob_BV, axis=-1) - prob_BV < sampling.top_p
  least_B1 = jnp.where(inside_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
  logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return jax.random.categorical(rng, logits_BV).astype(jnp.int32)


def _by_layer(routed, sublayers, of_rows):
  """{layer: experts of all tokens of some rows, one after another}.

  Args:
    routed: {path: experts} of every step.
    sublayers: of the model.
    of_rows: (experts [R, B, L, K] of a step, its index) -> those of the rows.
  """
  layers = {}
  for path in routed[0]:
    parts = [
      of_rows(np.asarray(chosen[path]), i)
      for i, chosen in enumerate(routed)
      if path in chosen
    ]
    expert_RBLK = np.concatenate(parts, axis=2)
    for layer, expert_BLK in zip(sublayers[path].numbers, expert_RBLK):
      layers[f"{layer:02d}"] = expert_BLK
  return dict(sorted(layers.items()))


def _check(model, prompts, starts, num_tokens, sampling):
  if not len(prompts) or not all(len(p) for p in prompts):
    raise ConfigError("a prompt has at least one token")
  vocab_size = of_prompts = model.arch.vocab_size
  if starts is not None:
    of_prompts = model.arch.source_vocab_size or vocab_size
    _check_tokens(starts, vocab_size, "a token of start")
  _check_tokens(prompts, of_prompts, "a prompt's token")
  integer(1).check(num_tokens, "num_tokens")
  arguments(Sampling).check(sampling._asdict(), "sampling")
  optional(integer(1, vocab_size)).check(sampling.top_k, "sampling.top_k")


def _check_tokens(texts, vocab_size, key):
  for token in (min(map(min, texts)), max(map(max, texts))):
    integer(0, vocab_size - 1).check(int(token), key)


def _check_experts(model):
  for parts in model.sublayers.values():
    if parts.recipe.router.form is not TokenChoice:
      raise ConfigError(
        "tokens do not choose experts in this model, so there are none to show;"
        " leave out --experts"
      )
