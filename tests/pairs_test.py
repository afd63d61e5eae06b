"""Pairs of texts: from files and datasets, and packed into rows."""

import collections
import dataclasses
import itertools
import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.data import draws, pairs
from moe_jax.data.text import corpora, mixed, tokenizers
from tests.tokenizers_test import make_tokenizer

END = 256
SIDES = ("inputs", "targets")
TEXTS = [(f"{i} Trauben, süß", f"{i} grapes") for i in range(40)]
PLUGIN = '''
import tensorflow_datasets as tfds

class Fables(tfds.core.GeneratorBasedBuilder):
  """A small dataset."""
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({
        "de": tfds.features.Text(),
        "en": tfds.features.Text(),
        "domain": tfds.features.ClassLabel(names=["fox", "crow"]),
      }),
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(range(7)),
      "validation": self._generate_examples(range(7, 9)),
    }

  def _generate_examples(self, numbers):
    for i in numbers:
      yield i, {"de": f"{i} s\\u00fc\\u00df", "en": f"{i} sweet", "domain": i % 2}

def build():
  return Fables
'''


@pytest.fixture
def prepare(tmp_path):
  def prepare(data_dir, name="mine", pair=("de", "en"), **options):
    return corpora.prepare(
      name,
      data_dir=data_dir,
      text_feature=pair,
      cache_dir=tmp_path / "cache",
      **options,
    )

  return prepare


@pytest.fixture
def folder(tmp_path):
  """Writes a folder of files: {name: content}."""
  counter = itertools.count()

  def folder(**files):
    path = tmp_path / f"data{next(counter)}"
    path.mkdir()
    for name, content in files.items():
      content = content.encode() if isinstance(content, str) else content
      (path / name.replace("_", ".")).write_bytes(content)
    return path

  return folder


def lines(texts):
  return "".join(f"{text}\n" for text in texts)


def texts_of(corpus, split):
  """The pairs of a split, decoded, by domain."""
  found = {}
  for domain in corpus.domains:
    text = bytes(
      np.where(
        corpus.tokens(split, domain) == END, 10, corpus.tokens(split, domain)
      ).tolist()
    )
    sides = text.decode().split("\n")[:-1]
    found[domain] = list(zip(sides[::2], sides[1::2], strict=True))
  return found


# Where pairs come from.


def test_files_of_every_form_are_the_same_pairs(folder, prepare):
  de, en = zip(*TEXTS)
  objects = [{"en": e, "de": d, "more": 1} for d, e in TEXTS]
  corpus = prepare(folder(train_de=lines(de), train_en=lines(en)))
  others = [
    folder(train_de="\r\n".join(de), train_en="\r\n".join(en)),
    folder(train_tsv=lines(f"{d}\t{e}" for d, e in TEXTS)),
    folder(train_jsonl=lines(map(json.dumps, objects))),
  ]
  for other in others:
    assert prepare(other).fingerprint == corpus.fingerprint
  assert corpus.domains == ("text",)
  train, validation = (texts_of(corpus, s)["text"] for s in corpora.SPLITS)
  assert sorted(train + validation) == sorted(TEXTS)
  assert 0 < len(validation) < 8
  assert corpus.num_documents["train"]["text"] == 2 * len(train)
  # A plain text is read from such files, too.
  alone = prepare(others[2], pair="de")
  assert alone.num_documents["train"]["text"] == len(train)


def test_equal_sources_are_in_the_same_split(folder, prepare):
  pairs = [(d, f"{e} {i}") for i in range(3) for d, e in TEXTS]
  corpus = prepare(folder(train_tsv=lines(f"{d}\t{e}" for d, e in pairs)))
  train, validation = (texts_of(corpus, s)["text"] for s in corpora.SPLITS)
  assert validation and not {d for d, _ in train} & {d for d, _ in validation}


def test_a_validation_split_of_files_is_kept(folder, prepare):
  corpus = prepare(
    folder(train_de="a\nb\n", train_en="1\n2\n", validation_tsv="c\t3\n")
  )
  assert texts_of(corpus, "train") == {"text": [("a", "1"), ("b", "2")]}
  assert texts_of(corpus, "validation") == {"text": [("c", "3")]}


def test_a_cache_is_made_once_for_what_the_files_hold(folder, prepare):
  path = folder(train_tsv=lines(f"{d}\t{e}" for d, e in TEXTS))
  corpus = prepare(path)
  before = os.stat(corpus.directory / "index.json")
  assert prepare(path) == corpus
  assert os.stat(corpus.directory / "index.json") == before
  (path / "train.tsv").write_text("a\tb\n")
  changed = prepare(path)
  assert changed.fingerprint != corpus.fingerprint
  assert prepare(path, fingerprint=corpus.fingerprint) == corpus
  assert prepare(path, pair=("en", "de")).directory != changed.directory


@pytest.mark.parametrize(
  ("files", "match"),
  [
    (
      {"train_de": "a\nb\n", "train_en": "a\n"},
      "unequal numbers of lines: .*en': 1",
    ),
    (
      {"train_tsv": "a\tb\na\n"},
      r"line 2 of .*train.tsv: it has 1 columns, not 2",
    ),
    (
      {"train_jsonl": '{"de": "a", "en": "b"}\n{"de": "a"}'},
      'line 2 .* no text "en"',
    ),
    (
      {"train_jsonl": '{"de": "a", "en": "b"}\n[]'},
      "line 2 .* it is no JSON object",
    ),
    ({"train_jsonl": "{"}, "data.dir .* cannot be read .*Expecting"),
    (
      {"train_jsonl": '{"de": "a", "en": 1}'},
      '"en" .* not there; set task.target',
    ),
    ({"train_jsonl": '{"de": "\\ud800", "en": ""}'}, "line 1 .*surrogates"),
    (
      {"train_de": "a\n"},
      "holds nothing that is read, but train.de; .*train.de and train.en",
    ),
    ({"train_tsv": ""}, "no documents in the split train"),
    ({"train_tsv": "\t\n"}, "hold no text; set task.source and task.target"),
  ],
)
def test_files_that_are_no_pairs_say_why(folder, prepare, files, match):
  with pytest.raises(ConfigError, match=match):
    prepare(folder(**files))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
  path = tmp_path_factory.mktemp("plugin")
  (path / "datasets").mkdir()
  (path / "datasets" / "fables.py").write_text(PLUGIN)
  return str(path)


def test_a_dataset_of_tfds_is_pairs_by_domain(plugin, prepare, tmp_path):
  corpus = prepare(None, "fables", plugins=(plugin,))
  want = {
    d: [(f"{i} süß", f"{i} sweet") for i in range(n, 7, 2)]
    for n, d in enumerate(("fox", "crow"))
  }
  assert {d: sorted(t) for d, t in texts_of(corpus, "train").items()} == want
  assert texts_of(corpus, "validation")["crow"] == [("7 süß", "7 sweet")]
  # By its folder, with a tokenizer.
  tokenizer = make_tokenizer("tokenizers", tmp_path)
  folder = corpus.directory / "fables" / "1.0.0"
  other = prepare(folder, tokenizer=str(tokenizer))
  ends = {
    d: (other.tokens("train", d) == other.end_of_document).sum() for d in want
  }
  assert ends == {"fox": 8, "crow": 6}
  with pytest.raises(ConfigError, match='"fr" .* not there; set task.source'):
    prepare(folder, pair=("fr", "en"))


def test_a_mixture_has_pairs_of_every_part(plugin, folder, tmp_path):
  path = folder(
    train_de="a\nb\nc\n", train_en="1\n2\n3\n", validation_tsv="d\t4"
  )
  data = {
    "mixture": {
      "files": {"name": "mine", "dir": str(path), "weight": 1.0},
      "tfds": {"name": "fables", "domain_feature": "none", "weight": 3.0},
    },
    "tokenizer": "bytes",
    "cache_dir": str(tmp_path / "cache"),
  }
  pair = {"source": "de", "target": "en", "prefix": ""}
  corpus = mixed.prepare(data, plugins=(plugin,), pair=pair)
  assert corpus.domains == ("files", "tfds")
  assert len(texts_of(corpus, "train")["tfds"]) == 7
  stream = train(corpus, several=False, batch_size=40)
  assert collections.Counter(stream[0]["domain"].tolist()) == {0: 10, 1: 30}


def test_parts_have_features_and_a_prefix_of_their_own(folder, tmp_path):
  """Both directions of a file, told apart as T5 does."""
  path = folder(train_de="a\n\n", train_en="1\n2\n", validation_tsv="d\t4")
  shared = {"name": "mine", "dir": str(path)}
  data = {
    "mixture": {
      "back": shared | {"source": "en", "target": "de", "prefix": "to de: "},
      "forth": shared,
    },
    "tokenizer": "bytes",
    "cache_dir": str(tmp_path / "cache"),
  }
  pair = {"source": "de", "target": "en", "prefix": "to en: "}
  pair |= {"source_begin": (), "target_begin": ()}
  corpus = mixed.prepare(data, pair=pair)
  assert texts_of(corpus, "train") == {
    "back": [("to de: 1", "a"), ("to de: 2", "")],
    "forth": [("to en: a", "1"), ("", "2")],  # It has no source.
  }
  again = mixed.prepare(data, pair=pair, fingerprint=corpus.fingerprint)
  assert again.fingerprint == corpus.fingerprint
  with pytest.raises(ConfigError, match="source, target, prefix of data.mixt"):
    mixed.prepare(data)


def test_tokens_of_languages_stand_before_both_sides(
  folder, tmp_path, monkeypatch
):
  """Before texts that are there; a part of a mixture has others."""
  path = folder(train_de="a\n\n", train_en="1\n2\n", validation_tsv="d\t4")
  shared = {"name": "mine", "dir": str(path)}
  own = {"source_begin": [9, 8], "target_begin": []}
  data = {
    "mixture": {"back": shared | own, "forth": shared},
    "tokenizer": "bytes",
    "cache_dir": str(tmp_path / "cache"),
  }
  pair = {"source": "de", "target": "en", "prefix": "x"}
  pair |= {"source_begin": (3,), "target_begin": (4, 5)}
  corpus = mixed.prepare(data, pair=pair)
  end, x, a, one, two = 256, *map(ord, "xa12")
  wanted = [3, x, a, end, 4, 5, one, end, end, 4, 5, two, end]
  assert corpus.tokens("train", "forth").tolist() == wanted
  wanted = [9, 8, x, a, end, one, end, end, two, end]
  assert corpus.tokens("train", "back").tolist() == wanted
  plain = mixed.prepare(
    data | {"mixture": {}, "text_feature": "text", **shared},
    pair=pair | {"source_begin": (), "target_begin": ()},
  )
  assert plain.tokens("train", "text").tolist()[:3] == [x, a, end]
  # A text that no token stands for is an empty one, and is refused as such.
  blank = tokenizers.load()._replace(
    encode_all=lambda texts: [np.array([*t.strip(b"x")], int) for t in texts]
  )
  monkeypatch.setattr(tokenizers, "load", lambda name: blank)
  path = folder(train_de="x\n", train_en="1\n", validation_tsv="d\t4")
  data["mixture"] = {"blank": {"name": "blank", "dir": str(path)}}
  tokens = mixed.prepare(data, pair=pair | {"prefix": ""})
  assert tokens.tokens("train", "blank").tolist() == [end, 4, 5, one, end]
  monkeypatch.undo()
  with pytest.raises(
    ConfigError, match="target_begin = .256,. has a token bey"
  ):
    mixed.prepare(data, pair=pair | {"target_begin": (256,)})


def test_the_built_in_pairs_are_docstrings_and_definitions():
  module = sys.modules[registry.load("datasets", "python_functions").__module__]
  examples = list(itertools.islice(module._examples(), 300))
  assert len({example["source"] for example in examples}) == 300
  for example in examples:
    assert example["target"].startswith("def ")
    assert example["target"].endswith("):")
    for side in ("source", "target"):
      assert 0 < len(example[side].encode()) < 128
      assert "\n" not in example[side]


# Rows.


def corpus_of(*domains, weights=None):
  """A corpus with pairs of texts of some lengths: every token is its own.

  Args:
    *domains: (lengths of sources, lengths of targets) of each.
    weights: of a part for each domain; None: they are one part.
  """
  arrays, names = {}, tuple(f"d{i}" for i in range(len(domains)))
  for number, sides in enumerate(domains):
    tokens = []
    for pair, sizes in enumerate(zip(*sides, strict=True)):
      for side, size in enumerate(sizes):
        first = 10**6 * number + 1000 * pair + 500 * side
        tokens += [*range(first, first + size), LAST]
    arrays[names[number]] = np.array(tokens, np.uint32)
  sizes = {name: array.size for name, array in arrays.items()}
  parts = (
    [(w, (n,)) for w, n in zip(weights, names)] if weights else [(1, names)]
  )
  return corpora.Corpus(
    "made",
    np.broadcast_to(np.int8(1), LAST + 1),
    parts=tuple(parts),
    arrays=dict.fromkeys(corpora.SPLITS, arrays),
    num_tokens=dict.fromkeys(corpora.SPLITS, sizes),
  )


LAST = 10**7  # Ends a text.
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 12, (2, 90)), RNG.integers(1, 7, (2, 30))


@pytest.fixture(scope="module")
def corpus():
  return corpus_of(*LENGTHS)


def packing(inputs_length=24, targets_length=16, **options):
  return pairs.Packing(
    inputs_length=inputs_length, targets_length=targets_length, **options
  )


def train(
  corpus, seed=3, rows=None, batch_size=8, accumulation=None, **options
):
  own = packing(**{"inputs_length": 24, "targets_length": 16} | options)
  return pairs.train_batches(
    corpus,
    seed,
    rows,
    packing=own,
    batch_size=batch_size,
    accumulation=accumulation,
  )


def validate(
  corpus, batch_size=4, batches_per_domain=None, rows=None, **options
):
  found = pairs.validation_batches(
    corpus,
    rows,
    packing=packing(**options),
    batch_size=batch_size,
    batches_per_domain=batches_per_domain,
  )
  return list(found)


def pairs_of(batch, row):
  """[(source, target), ...] of a row, without ends, by the document numbers."""
  sides = []
  for side in SIDES:
    mask = batch[f"{side}_mask"][row]
    assert not (np.diff(mask.astype(int)) > 0).any()  # Padding is at the end.
    assert not batch[side][row][~mask].any()
    numbers = batch[f"{side}_document"][row][mask]
    tokens = batch[side][row][mask]
    count = int(numbers[-1]) + 1 if numbers.size else 0
    assert (np.diff(numbers) >= 0).all() and set(numbers) == set(range(count))
    texts = [tokens[numbers == n].tolist() for n in range(count)]
    assert all(t[-1] == LAST and LAST not in t[:-1] for t in texts)
    sides.append([tuple(t[:-1]) for t in texts])
  return list(zip(*sides, strict=True))


def written(corpus, split="train"):
  """All pairs of a corpus, by plain loops."""
  found = []
  for domain in corpus.domains:
    texts, text = [], []
    for token in corpus.tokens(split, domain).tolist():
      if token == LAST:
        texts.append(tuple(text))
        text = []
      else:
        text.append(token)
    found += zip(texts[::2], texts[1::2], strict=True)
  return found


def epochs_of(stream, number, total):
  """Rows of some epochs, each of whose pairs are as many as `total`."""
  epochs, rows, step = [], [], 0
  while len(epochs) < number:
    batch = stream[step]
    for row in range(len(batch["domain"])):
      rows.append(tuple(pairs_of(batch, row)))
      assert sum(map(len, rows)) <= total
      if sum(map(len, rows)) == total:
        epochs.append(rows)
        rows = []
    step += 1
  return epochs[:number]


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key, strict=True)


def test_a_batch_is_what_it_says(corpus):
  batch = train(corpus)[0]
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  assert shapes == {
    "inputs": ((8, 24), "int32"),
    "inputs_mask": ((8, 24), "bool"),
    "inputs_document": ((8, 24), "int32"),
    "targets": ((8, 16), "int32"),
    "targets_mask": ((8, 16), "bool"),
    "targets_document": ((8, 16), "int32"),
    "decoder_inputs": ((8, 16), "int32"),
    "domain": ((8,), "int32"),
  }


@pytest.mark.parametrize("start", [None, 7])
def test_the_decoder_reads_the_targets_before(corpus, start):
  batch = train(corpus, start=start)[0]
  for row in range(8):
    mask = batch["targets_mask"][row]
    read, want = batch["decoder_inputs"][row].tolist(), []
    for _, target in pairs_of(batch, row):
      want += [LAST if start is None else start, *target]
    assert read == want + [0] * int((~mask).sum())


@pytest.mark.parametrize("several", [True, False])
def test_every_epoch_has_every_pair_once_in_another_order(corpus, several):
  everything = collections.Counter(written(corpus))
  total = sum(everything.values())
  epochs = epochs_of(train(corpus, several=several), 20, total)
  for epoch in epochs:
    assert collections.Counter(itertools.chain(*epoch)) == everything
    if not several:
      assert {len(row) for row in epoch} == {1}
  assert len({tuple(epoch) for epoch in epochs}) == 20
  # And in other rows, from one epoch to the next.
  assert several == (set(epochs[0]) != set(epochs[1]))


def test_rows_are_packed_greedily_in_the_order_of_a_permutation(corpus):
  """The rows of a packing, by a plain loop."""
  stream = train(corpus, batch_size=1)
  want, first = set(), 0
  for domain, lengths in enumerate(LENGTHS):
    texts = written(corpus)[first : first + lengths.shape[1]]
    order = draws.permutation(len(texts), 3, 0, 0, 0, domain)
    row, room = [], (0, 0)
    for pair in order:
      sizes = [len(text) + 1 for text in texts[pair]]
      if row and (sizes[0] > room[0] or sizes[1] > room[1]):
        want.add(tuple(row))
        row = []
      room = room if row else (24, 16)
      room = room[0] - sizes[0], room[1] - sizes[1]
      row.append(texts[pair])
    want.add(tuple(row))
    first += len(texts)
  found = [tuple(pairs_of(stream[step], 0)) for step in range(len(want))]
  assert set(found) == want and len(found) == len(want)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_any_pairs_are_there_once_and_never_mixed(sizes):
  corpus = corpus_of(np.array(sizes).T)
  total = collections.Counter(written(corpus))
  for own in ({}, {"several": False}):
    (epoch,) = epochs_of(train(corpus, **own), 1, len(sizes))
    assert collections.Counter(itertools.chain(*epoch)) == total
    found = validate(corpus, **own)
    rows = [pairs_of(b, r) for _, b in found for r in range(4)]
    assert list(itertools.chain(*rows)) == written(corpus)


def test_rows_are_of_one_domain_and_it_is_named(corpus):
  batch = train(corpus, batch_size=64)[0]
  assert set(batch["domain"].tolist()) == {0, 1}
  for row, domain in enumerate(batch["domain"]):
    for source, target in pairs_of(batch, row):
      assert {t // 10**6 for t in source + target} == {domain}
      # Of the same pair.
      assert len({t // 1000 for t in source + target}) == 1


def test_a_row_depends_on_seed_step_and_place_alone(corpus):
  stream = train(corpus)
  in_order = [stream[step] for step in range(60)]  # A dozen epochs.
  for step in (59, 4, 4, 31):
    assert_equal(train(corpus)[step], in_order[step])
    assert_equal(stream[np.int64(step)], in_order[step])
  whole, split = in_order[31], train(corpus, accumulation=2)[31]
  assert split["inputs"].shape == (2, 4, 24) and split["domain"].shape == (2, 4)
  assert_equal(whole, {k: np.concatenate(v) for k, v in split.items()})
  halves = [train(corpus, batch_size=4)[step] for step in (62, 63)]
  for key, value in whole.items():
    np.testing.assert_array_equal(
      value, np.concatenate([h[key] for h in halves])
    )
  some = train(corpus, rows=np.array([1, 3]), accumulation=2)[31]
  assert_equal(some, {k: v[:, [1, 3]] for k, v in split.items()})
  assert (train(corpus, seed=4)[31]["inputs"] != whole["inputs"]).any()
  with pytest.raises(IndexError, match="step -1"):
    stream[-1]


def test_a_part_of_a_mixture_has_its_share_of_rows():
  corpus = corpus_of(*LENGTHS, weights=(1.0, 3.0))
  for several in (True, False):
    batch = train(corpus, batch_size=400, several=several)[1]
    assert (batch["domain"] == 0).sum() == 100


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_validation_has_every_pair_once_in_order(corpus, batch_size):
  found = validate(corpus, batch_size)
  read = [
    p for _, b in found for r in range(batch_size) for p in pairs_of(b, r)
  ]
  assert read == written(corpus)
  for (domain, batch), (other, same) in zip(
    found, validate(corpus, batch_size)
  ):
    assert domain == other
    assert_equal(batch, same)
    assert (batch["domain"] == corpus.domains.index(domain)).all()


def test_validation_can_be_cut(corpus):
  whole, cut = validate(corpus, 1), validate(corpus, 1, batches_per_domain=3)
  assert [d for d, _ in cut] == ["d0"] * 3 + ["d1"] * 3
  rows = [batch["inputs"].tobytes() for _, batch in whole]
  assert all(batch["inputs"].tobytes() in rows for _, batch in cut)
  fours = validate(corpus)
  some = validate(corpus, rows=np.array([2, 3]))
  for (_, batch), (_, part) in zip(fours, some, strict=True):
    assert_equal({k: v[2:] for k, v in batch.items()}, part)


# What has no place in a row.


LONG = corpus_of(([3, 24, 23, 2, 30], [5, 4, 15, 16, 40]))


def test_pairs_that_are_too_long_are_refused():
  for read in (train, validate):
    with pytest.raises(
      ConfigError,
      match="made has 3 pairs in its split (train|validation) that are longer than"
      " data.seq_len = 24 or task.targets_length = 16: the longest source has 31"
      " tokens, and the longest target 41; set longer ones, or task.too_long to"
      ' "drop" or "truncate"',
    ):
      read(LONG)
  fits = {"inputs_length": 31, "targets_length": 41}
  (epoch,) = epochs_of(train(LONG, **fits), 1, 5)
  assert sorted(itertools.chain(*epoch)) == written(LONG)


def test_pairs_that_are_too_long_are_dropped_or_truncated(caplog):
  texts = written(LONG)
  (epoch,) = epochs_of(train(LONG, too_long="drop"), 1, 2)
  assert sorted(itertools.chain(*epoch)) == [texts[0], texts[2]]
  assert "split train, domain d0" in caplog.text
  assert "pairs are left out (task.too_long = drop)" in caplog.text
  found = validate(LONG, too_long="drop")
  assert [p for _, b in found for r in range(4) for p in pairs_of(b, r)] == [
    texts[0],
    texts[2],
  ]
  (epoch,) = epochs_of(train(LONG, too_long="truncate"), 1, 5)
  assert sorted(itertools.chain(*epoch)) == [(s[:23], t[:15]) for s, t in texts]


@pytest.mark.parametrize(
  ("sizes", "match"),
  [
    (
      ([3, 2, 0], [1, 0, 0]),
      "pair 1 .* split train, domain d0, .* empty target; mend",
    ),
    (([3, 0], [1, 1]), "pair 1 .* of dataset made has an empty source"),
  ],
)
def test_an_empty_side_is_refused_or_dropped(sizes, match):
  corpus = corpus_of(sizes)
  for too_long in ("error", "truncate"):
    with pytest.raises(ConfigError, match=match):
      train(corpus, too_long=too_long)
  with pytest.raises(ConfigError, match="split validation"):
    validate(corpus)
  (epoch,) = epochs_of(train(corpus, too_long="drop"), 1, 1)
  assert epoch == [(written(corpus)[0],)]


def test_a_dataset_without_a_pair_that_fits_is_refused():
  with pytest.raises(ConfigError, match=r"no pair for training in \('d0',\)"):
    train(LONG, inputs_length=2, too_long="drop")
  with pytest.raises(ConfigError, match="no validation text to predict"):
    validate(LONG, inputs_length=2, too_long="drop")
  none = dict.fromkeys(corpora.SPLITS, {"d0": np.zeros(0, np.uint32)})
  empty = dataclasses.replace(LONG, arrays=none)
  with pytest.raises(ConfigError, match="no pair for training"):
    train(empty)
