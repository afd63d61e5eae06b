"""Beam search: against plain loops over texts, all texts, and whole passes."""

import functools
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.models.encoder_decoder import Text
from moe_jax.models.generation import beam, decoding
from moe_jax.models.generation.beam import Beams
from moe_jax.models.generation.decoding import Sampling
from tests import encoder_decoder_test

V, N = 9, 6
advance = jax.jit(beam.advance)


def tables(batch, seed, vocab=V):
  """log p of a token after two others, which differ from prompt to prompt."""
  rng = np.random.default_rng(seed)
  logits = 1.5 * rng.normal(size=(batch, vocab, vocab, vocab))
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def after(table, tokens):
  """log p [V] of the next token of a text."""
  last = (0, 0, *tokens)[-2:]
  return table[last]


def found_by_loops(table, beams: Beams, ends, num_tokens=N):
  """[(tokens, score)] of one prompt, the best first."""
  width, penalty = beams.num_beams, beams.length_penalty
  running, finished = [((), 0.0)], []
  for length in range(1, num_tokens + 1):
    texts = []
    for tokens, total in running:
      for token, log_p in enumerate(after(table, tokens)):
        texts.append(((*tokens, token), total + log_p))
    texts.sort(key=lambda text: -text[1])
    for tokens, total in texts[:width]:
      if tokens[-1] in ends or length == num_tokens:
        worth = total / (length + beams.length_before) ** penalty
        finished.append((tokens, worth))
    finished = sorted(finished, key=lambda text: -text[1])[:width]
    running = [text for text in texts if text[0][-1] not in ends][:width]
    if len(finished) < width:
      continue
    if beams.early_stopping is True:
      break
    never = beams.early_stopping == "never" and penalty > 0
    then = beams.length_before + (num_tokens if never else length)
    if running[0][1] / then**penalty <= finished[-1][1]:
      break
  return finished


def found_by_ours(tables_B, beams, ends, num_tokens=N):
  """The same of several prompts at once, without a model."""
  batch, vocab = len(tables_B), tables_B.shape[-1]
  sizes = batch, beams.num_beams
  state = beam.begin(*sizes, num_tokens, np.float32)
  for place in range(num_tokens):
    running = np.asarray(state.running.token_BWN)[:, :, :place]
    logits = [
      [after(table, tokens) for tokens in rows]
      for table, rows in zip(tables_B, running)
    ]
    now = beam.numbers_of_step(beams, place, num_tokens, ends)
    logits = np.array(logits, np.float32).reshape(*sizes, vocab)
    state, parent_BW = advance(state, logits, now)
    kept = np.take_along_axis(running, np.asarray(parent_BW)[..., None], 1)
    np.testing.assert_array_equal(kept, state.running.token_BWN[:, :, :place])
    if not state.open_B.any():
      break
  return [
    [
      (tuple(x for x in tokens if x >= 0), score)
      for tokens, score in zip(rows.tolist(), scores)
    ]
    for rows, scores in zip(
      np.asarray(state.finished.token_BWN), np.asarray(state.finished.score_BW)
    )
  ]


def assert_same(found, wanted):
  assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
  np.testing.assert_allclose(
    [score for _, score in found], [score for _, score in wanted], rtol=1e-5
  )


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("num_beams,ends", [(1, (2,)), (3, (2,)), (4, (5, 1))])
def test_against_plain_loops(num_beams, ends, early):
  """Every prompt of a batch as if it were alone."""
  some = False
  penalties = (-1.0, 0.0, 0.5, 1.0, 2.0)
  for seed, penalty in enumerate(penalties):
    beams = Beams(num_beams, penalty, early, length_before=seed % 2)
    tables_B = tables(16, seed)
    found = found_by_ours(tables_B, beams, ends)
    for table, own in zip(tables_B, found):
      wanted = found_by_loops(table, beams, ends)
      assert len(wanted) == num_beams
      assert_same(own, wanted)
      some |= len({len(tokens) for tokens, _ in own}) > 1
  assert some or num_beams == 1


def test_as_many_beams_as_texts_find_the_best_of_all():
  """With every text in a beam, nothing is lost and the bound is exact."""
  vocab, length, end = 3, 4, 2
  for seed, penalty in enumerate((0.0, 1.0, 3.0)):
    table = tables(1, seed, vocab)
    beams = Beams(vocab**length, penalty, "never")
    worth = {}
    for size in range(1, length + 1):
      for tokens in itertools.product(range(vocab), repeat=size):
        is_whole = tokens[-1] == end or size == length
        if is_whole and end not in tokens[:-1]:
          parts = (after(table[0], tokens[:i])[t] for i, t in enumerate(tokens))
          worth[tokens] = sum(parts) / size**penalty
    wanted = sorted(worth.items(), key=lambda text: -text[1])
    (own,) = found_by_ours(table, beams, (end,), length)
    assert_same(own[: len(wanted)], wanted)


def decoder():
  c = tiny.get_config().model
  c.update(dtype="float64", d_model=16, head_dim=8)
  model = models.build(models.dropless(c.to_dict()), vocab_size=20)
  return model, random_variables(model)


def encoder_decoder(dtype="float64"):
  section = encoder_decoder_test.section(dtype=dtype)
  model = models.build(section, vocab_size=encoder_decoder_test.V)
  return model, random_variables(model)


def random_variables(model):
  """Larger than at the start of training, so that texts differ."""
  rng, shapes = np.random.default_rng(1), nn.unbox(models.variables(model))
  params = jax.tree.map(lambda x: rng.normal(size=x.shape) / 2, shapes)
  return {"params": params["params"]}


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]
STARTS = [[0, 7], [0], [0, 2, 2]]
ENDS = (4, 8, 11, 31)


def texts_of(made):
  return [[t for t in row if t >= 0] for row in made.tokens_BN.tolist()]


def padded_after(rows):
  size_B = np.array([*map(len, rows)])
  tokens = [np.pad(row, (0, size_B.max() - len(row))) for row in rows]
  return np.stack(tokens), np.arange(size_B.max()) < size_B[:, None]


def whole_pass(model, variables, prompts, starts, texts, **options):
  """(logits, aux) of all texts, in one pass without a cache."""
  if starts is None:
    whole = padded_after([[*a, *b] for a, b in zip(prompts, texts)])
  else:
    answers = [[*a, *b] for a, b in zip(starts, texts)]
    whole = [Text(*padded_after(x)) for x in (prompts, answers)]
  return jax.jit(functools.partial(model.apply, **options))(variables, *whole)


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_texts_and_experts_are_those_of_whole_passes(make):
  """So every beam goes on with the cache of its own tokens."""
  with jax.enable_x64(True):
    model, variables = make()
    beams, starts = Beams(4, 0.7, num_returned=3), None
    options = {"ends": ENDS, "beams": beams, "experts": True}
    if make is encoder_decoder:
      starts = options["start"] = STARTS
    made = decoding.generate(model, variables, PROMPTS, 7, **options)
    texts, prompts = texts_of(made), [p for p in PROMPTS for _ in range(3)]
    assert (np.diff(made.score_B.reshape(3, 3)) < 0).all()
    assert len({*map(len, texts)}) > 1
    starts = starts and [s for s in starts for _ in range(3)]
    whole = model, variables, prompts, starts, texts
    logits_BLV, aux = whole_pass(*whole, collect="routing")
    log_p_BLV = np.asarray(jax.nn.log_softmax(logits_BLV))
  longest = max(map(len, starts or prompts))
  for row, tokens in enumerate(texts):
    assert len(tokens) == 7 or tokens[-1] in ENDS
    assert not set(ENDS).intersection(tokens[:-1])
    first = len((starts or prompts)[row])
    places = np.arange(first - 1, first - 1 + len(tokens))
    log_p = log_p_BLV[row, places, tokens]
    worth = log_p.sum() / len(tokens) ** 0.7
    np.testing.assert_allclose(made.score_B[row], worth, rtol=1e-6)
    for path, parts in model.sublayers.items():
      expert_RBLK = models.at(aux, path)["choice"].expert_TK
      shape = len(parts.numbers), len(texts), -1, expert_RBLK.shape[-1]
      for number, own in zip(parts.numbers, expert_RBLK.reshape(shape)):
        begin, size = longest - first, first + len(tokens) - 1
        if starts and parts.sequence == "inputs":
          begin, size = 0, len(prompts[row])
        np.testing.assert_array_equal(
          np.sort(made.experts[f"{number:02d}"][row, begin : begin + size]),
          np.sort(own[row, :size]),
        )


@pytest.fixture(scope="module")
def small():
  """A decoder without parameters: nothing here gets as far as to use them."""
  return models.build(
    models.dropless(tiny.get_config().model.to_dict()), vocab_size=20
  )


@pytest.mark.parametrize(
  "beams,words",
  [
    (Beams(0), "beams.num_beams = 0 is not a whole number from 1"),
    (Beams(19), "beams.num_beams = 19 is not a whole number from 1 to 18"),
    (Beams(2, float("nan")), "beams.length_penalty = nan"),
    (Beams(2, 9.0), "beams.length_penalty = 9.0 is not .* at most 8"),
    (
      Beams(2, early_stopping="yes"),
      "early_stopping = 'yes' is not True .*\"never\"",
    ),
    (Beams(2, num_returned=0), "beams.num_returned = 0"),
    (
      Beams(2, num_returned=3),
      "= 3 is more than beams.num_beams = 2.*raise num",
    ),
    (Beams(2, length_before=-1), "beams.length_before = -1"),
  ],
)
def test_impossible_beams(small, beams, words):
  with pytest.raises(ConfigError, match=words):
    decoding.generate(small, {}, [[1]], 4, beams=beams, ends=(3, 4, 20))


def test_a_search_draws_nothing(small):
  for sampling in (Sampling(0.5), Sampling(top_k=2), Sampling(top_p=0.5)):
    with pytest.raises(ConfigError, match="a search draws nothing; leave out"):
      decoding.generate(small, {}, [[1]], 4, sampling, beams=Beams(2))
