"""Batches by step: the same ones whatever was read before, and nothing lost."""

import collections
import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest

from moe_jax.core.errors import ConfigError
from moe_jax.data import batches
from moe_jax.data.text import corpora

SEQ_LEN = 7
DOMAINS = ("code", "empty", "tiny", "prose")
SIZES = {
  "train": {"code": 502, "empty": 0, "tiny": 5, "prose": 141},
  "validation": {"code": 100, "empty": 0, "tiny": 1, "prose": 8},
}


@pytest.fixture(scope="module")
def corpus():
  """Random tokens, so that no two windows are equal."""
  rng = np.random.default_rng(0)
  return corpora.Corpus(
    "random",
    (1,) * 256 + (0,),
    parts=((1.0, DOMAINS),),
    arrays={
      split: {
        d: rng.integers(0, 257, n).astype("<u2") for d, n in sizes.items()
      }
      for split, sizes in SIZES.items()
    },
    num_tokens=SIZES,
  )


def train(corpus, **kwargs):
  kwargs = {"seq_len": SEQ_LEN, "batch_size": 8, "seed": 3, **kwargs}
  return batches.train_batches(corpus, **kwargs)


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key, strict=True)


def rows(stream, number):
  """The first rows of a stream: a list of (domain, tokens read)."""
  found = []
  for step in range(number):
    batch = stream[step]
    read = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
    found += [
      (d, *row) for d, row in zip(batch["domain"].tolist(), read.tolist())
    ]
    if len(found) >= number:
      return [tuple(row) for row in found[:number]]


def expected_windows(corpus):
  """Every training window, by a plain loop."""
  windows = []
  for number, domain in enumerate(DOMAINS):
    text = corpus.tokens("train", domain).tolist()
    start = 0
    while start + SEQ_LEN + 1 <= len(text):
      windows.append((number, *text[start : start + SEQ_LEN + 1]))
      start += SEQ_LEN
  return windows


def test_a_batch_is_what_it_says(corpus):
  batch = train(corpus)[0]
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  assert shapes == {
    "inputs": ((8, SEQ_LEN), "int32"),
    "targets": ((8, SEQ_LEN), "int32"),
    "mask": ((8, SEQ_LEN), "bool"),
    "domain": ((8,), "int32"),
  }
  assert batch["mask"].all()


def test_targets_are_the_next_tokens(corpus):
  text = corpus.tokens("train", "code").tolist()
  batch = train(corpus, batch_size=64)[0]
  np.testing.assert_array_equal(
    batch["inputs"][:, 1:], batch["targets"][:, :-1]
  )
  for i in np.flatnonzero(batch["domain"] == 0):
    window = [*batch["inputs"][i].tolist(), int(batch["targets"][i, -1])]
    starts = range(0, len(text), SEQ_LEN)
    assert any(text[s : s + SEQ_LEN + 1] == window for s in starts)


def test_every_epoch_is_another_permutation_of_all_windows(corpus):
  windows = expected_windows(corpus)
  n = len(windows)
  assert n == 71 + 20 and len(set(windows)) == n
  read = rows(train(corpus), 3 * n)
  epochs = [read[i * n : (i + 1) * n] for i in range(3)]
  for epoch in epochs:
    assert collections.Counter(epoch) == collections.Counter(windows)
    assert epoch != windows
  assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_does_not_depend_on_what_was_read_before(corpus):
  stream = train(corpus)
  in_order = [stream[step] for step in range(30)]
  for step in (29, 4, 4, 17):
    assert_equal(train(corpus)[step], in_order[step])
    assert_equal(stream[step], in_order[step])
    assert_equal(stream[np.int64(step)], in_order[step])


def test_a_row_depends_on_its_place_in_the_stream_alone(corpus):
  """A pod of any size, or any accumulation, reads the same rows."""
  assert rows(train(corpus), 96) == rows(train(corpus, batch_size=3), 96)
  whole, halves = train(corpus)[5], train(corpus, batch_size=4)
  for key, value in whole.items():
    two = np.concatenate([halves[10][key], halves[11][key]])
    np.testing.assert_array_equal(value, two)


def test_accumulation_only_adds_an_axis(corpus):
  whole, split = train(corpus)[5], train(corpus, accumulation=2)[5]
  assert split["inputs"].shape == (2, 4, SEQ_LEN)
  assert split["domain"].shape == (2, 4)
  assert_equal(whole, {k: np.concatenate(v) for k, v in split.items()})
  one = train(corpus, accumulation=1)[5]
  assert_equal({k: v[None] for k, v in whole.items()}, one)


def test_seeds_give_unrelated_orders(corpus):
  """Not the next epoch of the neighbour, either."""
  n = len(expected_windows(corpus))
  orders = [rows(train(corpus, seed=seed), 2 * n) for seed in (3, 4)]
  epochs = [tuple(o[i : i + n]) for o in orders for i in (0, n)]
  assert len(set(epochs)) == 4
  assert orders[0] == rows(train(corpus), 2 * n)


def test_inputs_and_targets_share_no_memory(corpus):
  batch = train(corpus)[0]
  assert not np.shares_memory(batch["inputs"], batch["targets"])


def validate(corpus, **kwargs):
  kwargs = {"seq_len": SEQ_LEN, "batch_size": 4, **kwargs}
  return list(batches.validation_batches(corpus, **kwargs))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_validation_loses_no_token_and_repeats_none(corpus, batch_size):
  inputs, targets = collections.defaultdict(list), collections.defaultdict(list)
  for domain, batch in validate(corpus, batch_size=batch_size):
    assert batch["inputs"].shape == (batch_size, SEQ_LEN)
    assert (batch["domain"] == DOMAINS.index(domain)).all()
    inputs[domain] += batch["inputs"][batch["mask"]].tolist()
    targets[domain] += batch["targets"][batch["mask"]].tolist()
  assert list(targets) == ["code", "prose"]
  for domain in targets:
    text = corpus.tokens("validation", domain).tolist()
    assert inputs[domain] == text[:-1]
    assert targets[domain] == text[1:]


def test_validation_pads_the_last_row_and_the_last_batch(corpus):
  found = [(domain, batch["mask"].sum(1)) for domain, batch in validate(corpus)]
  # 99 targets of code: 14 rows of 7 and one of 1; 7 of prose: one row.
  full = [7, 7, 7, 7]
  expected = [("code", full)] * 3 + [("code", [7, 7, 1, 0])]
  expected += [("prose", [7, 0, 0, 0])]
  assert [(d, m.tolist()) for d, m in found] == expected
  mask = validate(corpus)[3][1]["mask"]
  assert mask[2].tolist() == [True] + [False] * 6


def test_validation_is_the_same_every_time_and_can_be_cut(corpus):
  whole = validate(corpus)
  for (domain, batch), (other, again) in zip(whole, validate(corpus)):
    assert domain == other
    assert_equal(batch, again)
  cut = validate(corpus, batches_per_domain=2)
  assert [domain for domain, _ in cut] == ["code", "code", "prose"]
  assert_equal(cut[2][1], whole[4][1])  # All that there is.
  # The others are spread over the whole domain, from its first row to its last.
  rows = np.concatenate([b["inputs"] for d, b in whole if d == "code"])
  mask = np.concatenate([b["mask"] for d, b in whole if d == "code"])
  rows = rows[mask.any(1)]
  chosen = np.concatenate([b["inputs"] for d, b in cut if d == "code"])
  numbers = np.linspace(0, len(rows) - 1, len(chosen)).astype(int)
  np.testing.assert_array_equal(chosen, rows[numbers])


@pytest.mark.parametrize(
  ("kwargs", "match"),
  [
    ({"seq_len": 502}, "has the 503 training tokens.*use a shorter seq_len"),
  ],
)
def test_impossible_training_batches_are_refused(corpus, kwargs, match):
  with pytest.raises(ConfigError, match=match):
    train(corpus, **kwargs)


def test_the_longest_possible_row_is_allowed(corpus):
  (inputs,) = train(corpus, seq_len=501, batch_size=1)[0]["inputs"]
  np.testing.assert_array_equal(inputs, corpus.tokens("train", "code")[:501])


def test_there_is_no_step_before_the_first(corpus):
  with pytest.raises(IndexError, match="step -1"):
    train(corpus)[-1]


def test_impossible_validation_batches_are_refused_at_the_call(corpus):
  none = {d: tokens[:1] for d, tokens in corpus.arrays["validation"].items()}
  short = dataclasses.replace(corpus, arrays={"validation": none})
  with pytest.raises(
    ConfigError, match=r"no validation text to predict in \('code'"
  ):
    batches.validation_batches(short, seq_len=4, batch_size=1)
  with pytest.raises(ConfigError, match="begins with 4 tokens, and has no"):
    batches.validation_batches(
      corpus, seq_len=4, batch_size=1, begin=(1, 2, 3, 4)
    )


# Shares of a mixture.


class Parts:
  """Some thousand tokens in each of several parts."""

  name, end_of_document = "parts", 10**6

  def __init__(self, *weights):
    self.domains = tuple(f"d{i}" for i in range(len(weights)))
    self.parts = tuple((w, (d,)) for w, d in zip(weights, self.domains))
    self.num_tokens = {"train": dict.fromkeys(self.domains, 1001)}

  def tokens(self, split, domain):
    return np.arange(1001) + 2000 * self.domains.index(domain)


def parts_of_rows(weights, number):
  """The part of each of the first rows of a stream."""
  stream = batches.train_batches(
    Parts(*weights), seq_len=5, batch_size=number, seed=0
  )
  return stream[0]["domain"]


@pytest.mark.parametrize(
  "weights",
  [(1.0, 1.0099), (1, 3), (0.1, 0.3), (1e-3, 2.0), (2 / 3, 1 / 3), (7, 1e6)],
)
def test_a_part_has_its_exact_share_of_any_first_rows(weights):
  part = parts_of_rows(weights, 4000)
  share = Fraction(str(weights[1])) / sum(Fraction(str(w)) for w in weights)
  for n in range(4001):
    assert abs((part[:n] == 1).sum() - n * share) < 1


@pytest.mark.parametrize("weights", [(5, 3, 2), (0.1, 0.7, 0.2), (1, 1, 1, 1)])
def test_several_parts_have_their_exact_shares(weights):
  part = parts_of_rows(weights, 3000)
  for number, weight in enumerate(weights):
    for n in (1, 10, 999, 3000):
      want = n * weight / sum(weights)
      assert abs((part[:n] == number).sum() - want) < len(weights)


@pytest.mark.parametrize("weights", [(1,), (1, 1), (3.0, 1.0), (1.0, 0.5, 4.0)])
def test_the_rows_are_those_of_grain_where_it_is_exact(weights):
  """Runs that began with grain's rows go on with the same rows."""
  import grain

  sources = [
    grain.MapDataset.range(200 * i, 200 * (i + 1))
    .seed(7 + 1000 * i)
    .shuffle()
    .repeat()
    for i in range(len(weights))
  ]
  mixed = grain.MapDataset.mix(sources, weights) if weights[1:] else sources[0]
  stream = batches.train_batches(
    Parts(*weights), seq_len=5, batch_size=16, seed=7
  )
  for step in (0, 1, 50, 10**6):
    part, place = np.divmod([mixed[16 * step + i] for i in range(16)], 200)
    first = stream[step]["inputs"][:, 0]
    np.testing.assert_array_equal(first, 2000 * part + 5 * place)


# Domains without text, and tokens that a model begins with.


class Texts:
  """Documents given as lists of tokens, by domain."""

  name, end_of_document = "texts", 9

  def __init__(self, **documents):
    self.domains = tuple(documents)
    self.parts = ((1.0, self.domains),)
    self._tokens = {
      domain: np.array([t for d in texts for t in [*d, 9]], np.uint16)
      for domain, texts in documents.items()
    }
    sizes = {k: len(v) for k, v in self._tokens.items()}
    self.num_tokens = {"validation": sizes, "train": sizes}

  def tokens(self, split, domain):
    return self._tokens[domain]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("most", [None, 1])
def test_no_domain_is_without_text_to_predict(separate, most):
  corpus = Texts(
    text=[[1, 2, 3]] * 4, empty=[[]] * 20, letter=[[1]], none=[], last=[[1, 2]]
  )
  found = validate(corpus, separate_documents=separate, batches_per_domain=most)
  assert [domain for domain, _ in found] == ["text", "last"]
  assert [b["domain"].tolist() for _, b in found] == [[0] * 4, [4] * 4]
  for _, batch in found:
    assert (batch["targets"][batch["mask"]] != 9).any()


def test_rows_without_a_target_are_left_out():
  """The end of a document may be no input, so some rows have no targets."""
  corpus = Texts(a=[[1, 2], *[[]] * 30, [3, 4]])
  whole = validate(corpus, seq_len=4, batch_size=1)
  assert len(whole) == 9
  apart = validate(corpus, seq_len=4, batch_size=1, separate_documents=True)
  assert len(apart) == 2 and all(b["mask"].any() for _, b in apart)
  read = [t for _, b in apart for t in b["targets"][b["mask"]].tolist()]
  assert read == [2, 9, 4, 9]


def test_a_corpus_of_empty_documents_is_refused():
  with pytest.raises(
    ConfigError, match="no validation text .* {'a': 9} tokens"
  ):
    validate(Texts(a=[[]] * 9))


LENGTHS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 20, 0, 0, 1, 29]


@pytest.mark.parametrize("begin", [(7,), (7, 8)])
@pytest.mark.parametrize("seq_len", [3, 7, 64])
@pytest.mark.parametrize("separate", [True, False])
def test_rows_begin_as_the_model_wants_and_no_token_is_lost(
  begin, seq_len, separate
):
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 7, n).tolist() for n in LENGTHS]
  found = validate(
    Texts(a=texts, b=[[]], c=texts[::-1]),
    seq_len=seq_len,
    batch_size=3,
    begin=begin,
    separate_documents=separate,
  )
  assert {domain for domain, _ in found} == {"a", "c"}
  want = {"a": texts, "c": texts[::-1]}
  for domain, rows in itertools.groupby(found, key=lambda pair: pair[0]):
    targets = []
    for _, batch in rows:
      real = batch["mask"].any(1)
      for inputs, target, mask in zip(
        batch["inputs"][real], batch["targets"][real], batch["mask"][real]
      ):
        assert tuple(inputs[: len(begin)]) == begin
        targets += target[mask].tolist()
        # All before a target is of its document.
        last = np.flatnonzero(mask)[-1]
        assert 9 not in inputs[: last + 1]
        assert not set(begin) & set(inputs[len(begin) :])
    assert targets == [t for text in want[domain] for t in [*text, 9]]


def test_a_row_repeats_the_token_before_its_first_target():
  (_, first), (_, second) = validate(
    Texts(a=[[1, 2, 3, 4, 5]]), seq_len=4, batch_size=1, begin=(7,)
  )
  assert first["inputs"].tolist() == [[7, 1, 2, 3]]
  assert first["targets"].tolist() == [[1, 2, 3, 4]]
  assert first["mask"].all()
  assert second["inputs"].tolist() == [[7, 4, 5, 9]]
  assert second["targets"].tolist() == [[4, 5, 9, 0]]
  assert second["mask"].tolist() == [[False, True, True, False]]
