"""Span corruption: T5's lengths, sides that give the text back, and batches."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.core.errors import ConfigError
from moe_jax.data import spans
from moe_jax.data.text import corpora

V = 50  # Its last token, 49, ends a document; the first sentinel is 50.
END = V - 1
SIZES = {
  "train": {"code": 1502, "empty": 0, "tiny": 9, "prose": 341},
  "validation": {"code": 205, "empty": 0, "tiny": 1, "prose": 38},
}
SIDES = ("inputs", "targets")


@pytest.fixture(scope="module")
def corpus():
  """Random tokens, every tenth of which ends a document."""
  rng = np.random.default_rng(0)

  def tokens(size):
    ends = rng.random(size) < 0.1
    return np.where(ends, END, rng.integers(0, END, size)).astype("<u2")

  return corpora.Corpus(
    "random",
    (1,) * (V - 1) + (0,),
    parts=((1.0, tuple(SIZES["train"])),),
    arrays={s: {d: tokens(n) for d, n in t.items()} for s, t in SIZES.items()},
    num_tokens=SIZES,
  )


T5 = {"noise_density": 0.15, "mean_span": 3.0}
SHARE = {"noise_density": 0.3, "mean_span": 2.0}  # Several spans in 24 tokens.


def corruption(inputs_length=24, **options):
  return spans.Corruption(inputs_length=inputs_length, **SHARE | options)


def train(
  corpus, seed=3, rows=None, batch_size=8, accumulation=None, **options
):
  return spans.train_batches(
    corpus,
    seed,
    rows,
    corruption=corruption(**options),
    batch_size=batch_size,
    accumulation=accumulation,
  )


def validate(
  corpus, batch_size=4, batches_per_domain=None, rows=None, **options
):
  found = spans.validation_batches(
    corpus,
    rows,
    corruption=corruption(**options),
    batch_size=batch_size,
    batches_per_domain=batches_per_domain,
  )
  return list(found)


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key, strict=True)


# The oracle: the paper's algorithm, and T5's code for its lengths, in loops.


def t5_lengths(inputs_length, density, mean_span):
  """`random_spans_helper` of t5/data/preprocessors.py."""

  def sides(length):
    num_noise = int(round(length * density))
    num_spans = int(round(num_noise / mean_span))
    return length - num_noise + num_spans + 1, num_noise + num_spans + 1

  length = inputs_length
  while sides(length + 1)[0] <= inputs_length:
    length += 1
  return length, *sides(length)


def corrupted(tokens, noise, separate):
  """Both sides of a window, as lists of (token, its document)."""
  documents, number = [], 0
  for token in tokens:
    documents.append(number if separate else 0)
    number += token == END
  inputs, targets, sentinel, before = [], [], V - 1, False
  for token, document, is_noise in zip(tokens, documents, noise):
    if is_noise and not before:
      sentinel, of_span = sentinel + 1, document
      inputs.append((sentinel, of_span))
      targets.append((sentinel, of_span))
    if is_noise:
      targets.append((token, of_span))
    else:
      inputs.append((token, document))
    before = is_noise
  return [*inputs, (END, of_span)], [*targets, (END, of_span)]


def decoder_inputs(targets):
  """The tokens that the decoder reads before each of (token, document)."""
  read, last = [], None
  for token, document in targets:
    read.append(last[0] if last and last[1] == document else END)
    last = token, document
  return read


def uncorrupted(inputs, targets):
  """The window of two sides without padding."""
  assert inputs[-1] == targets[-1] == END
  taken, window = {}, []
  for token in targets[:-1]:
    if token >= V:
      assert token not in taken
      taken[token] = last = []
    else:
      last.append(token)
  for token in inputs[:-1]:
    window += taken.pop(token) if token >= V else [token]
  assert not taken
  return window


def rows_of(batch):
  """The tokens of each row that is not padding, as two lists."""
  for row in range(len(batch["domain"])):
    sides = [batch[s][row][batch[f"{s}_mask"][row]].tolist() for s in SIDES]
    if sides[0]:
      yield sides


# Lengths.


def test_the_lengths_are_those_of_t5():
  assert spans.lengths(512) == (568, 114)
  # Shorter inputs have no span in T5's count, and in its noise one.
  for share in ((0.15, 3.0), (0.15, 8.0), (0.3, 3.0), (0.5, 3.0), (0.1, 2.0)):
    for inputs_length in (*range(30, 130), 512, 1000, 1024):
      window, inputs, targets = t5_lengths(inputs_length, *share)
      assert inputs == inputs_length
      assert spans.lengths(inputs_length, *share) == (window, targets)


@given(
  st.integers(3, 600),
  st.floats(1e-3, 0.9),
  st.floats(1, 60).map(lambda x: round(x, 1)),
)
def test_no_longer_window_fits(inputs_length, density, mean_span):
  if density / mean_span > 1 - density:
    return

  def inputs(window):
    num_noise, num_spans = spans.counts(window, density, mean_span)
    assert 1 <= num_spans <= num_noise < window
    assert num_spans <= window - num_noise
    return window - num_noise + num_spans + 1

  window, targets = spans.lengths(inputs_length, density, mean_span)
  assert inputs(window) <= inputs_length < inputs(window + 1)
  num_noise, num_spans = spans.counts(window, density, mean_span)
  assert targets == num_noise + num_spans + 1


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"inputs_length": 2}, "data.seq_len = 2 has no room .*; give 3 or more"),
    (
      {"noise_density": 0.7, "mean_span": 2.0},
      "task.noise_density = 0.7 with task.mean_span = 2.0 .* longer spans",
    ),
    (
      {**T5, "inputs_length": 512, "targets_length": 113},
      "task.targets_length = 113 is less than the 114 .*give 114 or more",
    ),
  ],
)
def test_impossible_lengths_are_refused(options, match):
  with pytest.raises(ConfigError, match=match):
    corruption(**options)


# Noise and sides.


@given(
  st.integers(2, 90),
  st.integers(0, 2**31 - 1),
  st.sampled_from([(0.15, 3.0), (0.5, 1.0), (0.01, 3.0), (0.9, 30.0)]),
  st.booleans(),
)
def test_sides_are_those_of_the_oracle(length, seed, share, separate):
  own = corruption(noise_density=share[0], mean_span=share[1])
  rng = np.random.default_rng(seed)
  token_RN = np.minimum(rng.integers(0, V + 5, (3, length)), END)
  place_R = rng.integers(0, 10**6, 3)
  noise_RN = spans.noise(seed, place_R, length, own)
  num_noise, num_spans = spans.counts(length, *share)
  assert (noise_RN.sum(axis=1) == num_noise).all()
  firsts = np.diff(noise_RN.astype(int), axis=1) == 1
  assert (firsts.sum(axis=1) == num_spans).all()
  assert not noise_RN[:, 0].any() and noise_RN[:, -1].all()
  is_end = (token_RN == END) & separate
  tokens = {"sentinels": np.arange(V, V + num_spans), "end": END}
  document_RN = is_end.cumsum(axis=1) - is_end
  found = spans.corrupt(token_RN, noise_RN, document_RN, **tokens)
  for row, (tokens, noise) in enumerate(zip(token_RN.tolist(), noise_RN)):
    for side, want in zip(SIDES, corrupted(tokens, noise, separate)):
      got = zip(
        found[side][row].tolist(), found[f"{side}_document"][row].tolist()
      )
      assert list(got) == want
    sides = [found[side][row].tolist() for side in SIDES]
    assert uncorrupted(*sides) == tokens
    for side in sides:
      numbers = [token for token in side if token >= V]
      assert numbers == list(range(V, V + num_spans))


def test_all_divisions_are_equally_likely():
  """9 tokens with 4 of noise in 2 spans have 3 times 4 divisions."""
  own = corruption(noise_density=0.45, mean_span=2.0)
  noise_RN = spans.noise(0, np.arange(12_000), 9, own)
  counts = collections.Counter(map(tuple, noise_RN.tolist()))
  assert len(counts) == 12
  assert max(abs(n - 1000) for n in counts.values()) < 5 * 1000**0.5


def test_the_noise_of_a_row_is_its_own():
  own, places = corruption(512, **T5), np.array([7, 10**12, 3])
  noise_RN = spans.noise(1, places, 568, own)
  for row, place in enumerate(places):
    alone = spans.noise(1, np.array([place]), 568, own)
    np.testing.assert_array_equal(noise_RN[row], alone[0])
    assert (alone != spans.noise(2, np.array([place]), 568, own)).any()
  assert (noise_RN[0] != noise_RN[2]).any()


# Batches.


def test_a_batch_is_what_it_says(corpus):
  batch = train(corpus, targets_length=20)[0]
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  assert shapes == {
    "inputs": ((8, 24), "int32"),
    "inputs_mask": ((8, 24), "bool"),
    "inputs_document": ((8, 24), "int32"),
    "targets": ((8, 20), "int32"),
    "targets_mask": ((8, 20), "bool"),
    "targets_document": ((8, 20), "int32"),
    "decoder_inputs": ((8, 20), "int32"),
    "domain": ((8,), "int32"),
  }
  real = corruption().lengths[1]
  assert real < 20 and batch["inputs_mask"].all()
  assert (batch["targets_mask"] == (np.arange(20) < real)).all()
  for name in ("targets", "targets_document", "decoder_inputs"):
    assert not batch[name][:, real:].any()


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("start", [None, 0])
def test_every_array_of_a_batch_is_that_of_the_oracle(corpus, separate, start):
  own = {"separate_documents": separate, "start": start}
  batch = train(corpus, batch_size=40, **own)[0]
  limit = V + corruption().num_sentinels
  for row, sides in enumerate(rows_of(batch)):
    window = uncorrupted(*sides)
    noise = [False] * len(window)
    for place, token in _places(*sides):
      assert window[place] == token
      noise[place] = True
    want = dict(zip(SIDES, corrupted(window, noise, separate)))
    for side, pairs in want.items():
      assert sides[SIDES.index(side)] == [token for token, _ in pairs]
      documents = batch[f"{side}_document"][row].tolist()
      assert documents == [document for _, document in pairs]
      assert all(0 <= token < limit for token, _ in pairs)
    before = decoder_inputs(want["targets"])
    got = batch["decoder_inputs"][row].tolist()
    if start is None:
      assert got == before
    assert got[0] == (END if start is None else start)
  assert separate == bool(batch["targets_document"].any())


def _places(inputs, targets):
  """(place in the window, token) of the noise."""
  sizes, place, last = collections.Counter(), 0, None
  for token in targets[:-1]:
    last = token if token >= V else last
    sizes[last] += token < V
  tokens = iter(token for token in targets[:-1] if token < V)
  for token in inputs[:-1]:
    for _ in range(sizes.get(token, 0) if token >= V else 0):
      yield place, next(tokens)
      place += 1
    place += token < V


def test_an_epoch_has_every_window_once_and_other_noise(corpus):
  size = corruption().lengths[0]
  windows = []
  for number, domain in enumerate(corpus.domains):
    text = corpus.tokens("train", domain).tolist()
    for start in range(0, len(text) - size + 1, size):
      windows.append((number, *text[start : start + size]))
  batch = train(corpus, batch_size=3 * len(windows))[0]
  read = [tuple(uncorrupted(*sides)) for sides in rows_of(batch)]
  read = [(d, *row) for d, row in zip(batch["domain"].tolist(), read)]
  n = len(windows)
  epochs = [read[i * n : (i + 1) * n] for i in range(3)]
  for epoch in epochs:
    assert collections.Counter(epoch) == collections.Counter(windows)
  assert epochs[0] != epochs[1] != epochs[2]
  places = [read.index(windows[0], i * n) for i in range(3)]
  inputs = {batch["inputs"][place].tobytes() for place in places}
  assert len(inputs) == 3
  noise = train(corpus)[0]["inputs"] >= V
  other = train(corpus, seed=4)[0]["inputs"] >= V
  assert (noise != other).any(axis=1).mean() > 0.5


def test_a_row_depends_on_seed_step_and_place_alone(corpus):
  stream = train(corpus)
  in_order = [stream[step] for step in range(12)]
  for step in (11, 4, 4):
    assert_equal(train(corpus)[step], in_order[step])
    assert_equal(stream[np.int64(step)], in_order[step])
  whole, split = in_order[5], train(corpus, accumulation=2)[5]
  assert split["inputs"].shape == (2, 4, 24) and split["domain"].shape == (2, 4)
  assert_equal(whole, {k: np.concatenate(v) for k, v in split.items()})
  halves = [train(corpus, batch_size=4)[step] for step in (10, 11)]
  for key, value in whole.items():
    np.testing.assert_array_equal(
      value, np.concatenate([h[key] for h in halves])
    )
  some = train(corpus, rows=np.array([1, 3]), accumulation=2)[5]
  assert_equal(some, {k: v[:, [1, 3]] for k, v in split.items()})
  other = train(corpus, seed=4)[5]
  assert (other["inputs"] != whole["inputs"]).any()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_validation_loses_no_token_and_repeats_none(corpus, batch_size):
  texts = collections.defaultdict(list)
  for domain, batch in validate(corpus, batch_size):
    assert batch["inputs"].shape == (batch_size, 24)
    assert (batch["domain"] == corpus.domains.index(domain)).all()
    for sides in rows_of(batch):
      texts[domain] += uncorrupted(*sides)
    for side in SIDES:
      padding = ~batch[f"{side}_mask"]
      assert not batch[side][padding].any()
      # It is at the end.
      assert (np.diff(padding.astype(int), axis=1) >= 0).all()
  assert list(texts) == ["code", "prose"]
  for domain, text in texts.items():
    assert text == corpus.tokens("validation", domain).tolist()


def test_validation_has_always_the_same_noise(corpus):
  whole, again = validate(corpus), validate(corpus)
  for (domain, batch), (other, same) in zip(whole, again, strict=True):
    assert domain == other
    assert_equal(batch, same)
  # Whatever the batch size, and however many rows are read.
  one = [batch["inputs"][0].tolist() for _, batch in validate(corpus, 1)]
  rows = [
    r for _, b in whole for r in b["inputs"][b["inputs_mask"].any(1)].tolist()
  ]
  assert rows == one
  cut = validate(corpus, 1, batches_per_domain=2)
  assert [domain for domain, _ in cut] == ["code", "code", "prose", "prose"]
  assert all(batch["inputs"][0].tolist() in one for _, batch in cut)
  some = validate(corpus, rows=np.array([2, 3]))
  for (_, batch), (_, part) in zip(whole, some, strict=True):
    assert_equal({k: v[2:] for k, v in batch.items()}, part)


def test_too_little_text_is_refused_at_the_call(corpus):
  with pytest.raises(
    ConfigError, match="has the 1800 training tokens that a row of seq_len 1531"
  ):
    train(corpus, inputs_length=1531)
  ends = {
    d: np.full_like(t, END) for d, t in corpus.arrays["validation"].items()
  }
  no_text = dataclasses.replace(corpus, arrays={"validation": ends})
  with pytest.raises(ConfigError, match=r"no validation text .* \('code'"):
    spans.validation_batches(no_text, corruption=corruption(), batch_size=1)


def test_a_part_of_a_mixture_has_its_share(corpus):
  parts = ((3.0, ("code", "empty", "tiny")), (1.0, ("prose",)))
  mixed = dataclasses.replace(corpus, parts=parts)
  domains = itertools.chain(*(train(mixed)[s]["domain"] for s in range(50)))
  assert collections.Counter(domains)[3] == 100
