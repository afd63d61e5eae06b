"""The token cache: its content, its life, and datasets of others."""

import collections
import errno
import itertools
import json
import os
import pathlib

import numpy as np
import pytest
import sentencepiece
import tensorflow_datasets as tfds
import tokenizers as library

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.data import caches
from moe_jax.data.text import corpora
from tests.tokenizers_test import TEXTS, make_tokenizer

PLUGIN = '''
import tensorflow_datasets as tfds

class Fable(tfds.core.GeneratorBasedBuilder):
  """A small dataset."""
  VERSION = tfds.core.Version("1.0.0")
  ending = "."

  @classmethod
  def sources(cls):
    return {"ending": cls.ending}

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({
        "text": tfds.features.Text(),
        "domain": tfds.features.ClassLabel(names=["fox", "none", "crow"]),
      }),
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(range(40)),
      "validation": self._generate_examples(range(40, 45)),
    }

  def _generate_examples(self, numbers):
    for i in numbers:
      text = f"{i} grapes, caf\\u00e9{self.ending}"
      yield i, {"text": text, "domain": "crow" if i % 3 else "fox"}

def build():
  return Fable
'''


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
  folder = tmp_path_factory.mktemp("plugin")
  (folder / "datasets").mkdir()
  (folder / "datasets" / "fable.py").write_text(PLUGIN)
  return str(folder)


@pytest.fixture
def prepare(plugin, tmp_path):
  def prepare(**kwargs):
    kwargs = {"cache_dir": tmp_path / "cache", **kwargs}
    return corpora.prepare("fable", plugins=(plugin,), **kwargs)

  return prepare


@pytest.fixture
def fable_class(plugin):
  return registry.load("datasets", "fable", plugins=(plugin,))


def split_at_ends(array):
  """The documents of a token array."""
  ends = np.flatnonzero(array == 256)
  assert ends.size == 0 or ends[-1] == array.size - 1
  starts = [0, *(ends + 1)]
  return [bytes(array[a:b].tolist()) for a, b in zip(starts, ends)]


def everything(corpus):
  return {
    (split, domain): sorted(split_at_ends(corpus.tokens(split, domain)))
    for split in ("train", "validation")
    for domain in corpus.domains
  }


def fable(numbers):
  return sorted(f"{i} grapes, café.".encode() for i in numbers)


def test_every_document_is_there_as_bytes_and_an_end(prepare):
  corpus = prepare()
  assert corpus.vocab_size == 257
  assert corpus.domains == ("fox", "none", "crow")
  assert everything(corpus) == {
    ("train", "fox"): fable(range(0, 40, 3)),
    ("train", "none"): [],
    ("train", "crow"): fable(i for i in range(40) if i % 3),
    ("validation", "fox"): fable([42]),
    ("validation", "none"): [],
    ("validation", "crow"): fable([40, 41, 43, 44]),
  }
  assert corpus.num_documents["train"] == {"fox": 14, "none": 0, "crow": 26}
  assert corpus.sources == {"fable": "1.0.0", "ending": "."}
  array = corpus.tokens("train", "fox")
  assert array.dtype == np.uint16
  assert array.size == corpus.num_tokens["train"]["fox"]
  with pytest.raises(ValueError, match="read-only"):
    array[0] = 0


def forbid_writing(monkeypatch):
  def write(*_):
    raise AssertionError("the cache was made again")

  monkeypatch.setattr(corpora, "_write_tokens", write)


def test_a_cache_is_made_once(prepare, monkeypatch):
  first = prepare()
  forbid_writing(monkeypatch)
  assert prepare() == first


def test_the_cache_lies_under_xdg_cache_home(prepare, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  corpus = prepare(cache_dir=None)
  assert corpus.directory.parent == tmp_path / "home" / "moe_jax"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "other"))
  corpus = prepare(cache_dir=None)
  assert corpus.directory.parent == tmp_path / "other/.cache/moe_jax"


def truncate(path):
  os.truncate(path, path.stat().st_size - 2)


def change(path):
  content = bytearray(path.read_bytes())
  content[-2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  ("file", "damage"),
  [
    ("train-002.tokens", truncate),
    ("train-000.tokens", change),
    ("validation-000.tokens", pathlib.Path.unlink),
    ("index.json", truncate),
    ("index.json", lambda path: path.write_text("[]")),
    ("index.json", lambda path: path.write_text("{}")),
    ("index.json", lambda path: path.write_text("[" * 10**6)),
    ("index.json", lambda path: path.write_bytes(b'{"a": "\xff"}')),
    ("index.json", pathlib.Path.unlink),
    ("index.json", lambda path: (path.unlink(), path.mkdir())),
  ],
)
def test_a_damaged_cache_is_made_again(prepare, file, damage):
  first = prepare()
  content = everything(first)
  damage(first.directory / file)
  again = prepare()
  assert again == first
  assert everything(again) == content


def test_all_of_the_index_is_under_its_digest(prepare):
  """The tokens' fingerprint does not tell how they are counted."""
  first = prepare()
  path = first.directory / "index.json"
  good = json.loads(path.read_text())

  def change(value):
    if isinstance(value, dict):
      key = next(iter(value))
      return value | {key: change(value[key])}
    if isinstance(value, list):
      return [change(value[0]), *value[1:]]
    return value + 1 if isinstance(value, int) else f"{value}x"

  assert (
    good["num_tokens"]["train"]["crow"] == first.num_tokens["train"]["crow"]
  )
  for key in good.keys() - {"format", "fingerprint"}:
    for damaged in (good | {key: change(good[key])}, good.copy()):
      if damaged == good:
        del damaged[key]
      path.write_text(json.dumps(damaged))
      assert prepare(fingerprint=first.fingerprint) == first, key
      assert json.loads(path.read_text()) == good, key


def test_files_of_another_size_than_the_index_says_are_noticed(prepare):
  """Also where somebody has made its digest right again."""
  first = prepare()
  path = first.directory / "index.json"
  good = json.loads(path.read_text())
  for size in (0, 1, 10**6):
    index = json.loads(path.read_text())
    index["num_tokens"]["train"]["crow"] = size
    del index["digest"]
    index["digest"] = caches.sha256(index)
    path.write_text(json.dumps(index))
    assert prepare() == first
    assert json.loads(path.read_text()) == good


def test_a_cache_of_another_format_is_left_alone(prepare, monkeypatch, caplog):
  first = prepare()
  with monkeypatch.context() as patch:
    patch.setattr(corpora, "_FORMAT", 2)
    older = prepare()
  assert older.directory != first.directory
  caplog.clear()
  assert prepare(fingerprint=first.fingerprint) == first
  assert not caplog.records


def test_an_interrupted_preparation_leaves_nothing(prepare, monkeypatch):
  corpus = prepare()
  root = corpus.directory.parent
  (corpus.directory / "index.json").unlink()
  before = os.listdir(root)

  def write(name, builder, features, tokenizer, folder, whole):
    (folder / "train-000.tokens").write_bytes(b"half")
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(corpora, "_write_tokens", write)
    prepare()
  assert os.listdir(root) == before
  assert prepare() == corpus


def test_of_two_processes_at_once_the_first_one_wins(prepare, monkeypatch):
  write = corpora._write_tokens
  winner = []

  def write_slowly(*args):
    if not winner:
      winner.append(None)
      winner[0] = prepare()  # The other process comes and goes.
      (winner[0].directory / "mark").touch()
    return write(*args)

  monkeypatch.setattr(corpora, "_write_tokens", write_slowly)
  loser = prepare()
  assert loser == winner[0]
  assert (loser.directory / "mark").exists()
  assert os.listdir(loser.directory.parent) == [loser.directory.name]


def test_a_run_keeps_its_data_when_a_source_has_changed(
  prepare, fable_class, monkeypatch
):
  old = prepare()
  monkeypatch.setattr(fable_class, "ending", "!")
  new = prepare()
  assert new.fingerprint != old.fingerprint
  assert new.directory != old.directory
  assert prepare(fingerprint=old.fingerprint) == old
  assert prepare(fingerprint=new.fingerprint) == new
  with pytest.raises(ConfigError, match="was asked for and is not in"):
    prepare(fingerprint="0" * 64)


def test_the_fingerprint_says_where_a_text_is(make_dataset, tmp_path):
  """The same texts under another domain, or split, are other content."""

  def fingerprint(domain, train, validation):
    splits = {
      "train": [{"text": train, "domain": domain}],
      "validation": [{"text": validation, "domain": domain}],
    }
    folder = make_dataset(splits)
    return corpora.prepare(
      "it", data_dir=folder, cache_dir=tmp_path
    ).fingerprint

  assert fingerprint("a", "one", "two") == fingerprint("a", "one", "two")
  assert fingerprint("a", "one", "two") != fingerprint("b", "one", "two")
  assert fingerprint("a", "one", "two") != fingerprint("a", "two", "one")


def test_an_unknown_dataset_names_the_known_ones(tmp_path):
  with pytest.raises(ConfigError, match='did you mean "python_sources"'):
    corpora.prepare("python_source", cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_named(prepare, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ConfigError, match="set data.cache_dir or XDG_CACHE_HOME"):
    prepare(cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize("place", ["documents", "tokens"])
def test_a_full_disk_is_one_sentence(
  place, prepare, fable_class, monkeypatch, tmp_path
):
  """TFDS' writers tell of it by a RuntimeError."""

  def full(*args, **kwargs):
    if place == "tokens":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise RuntimeError("write() failed: No space left on device; writing x")

  with monkeypatch.context() as patch:
    if place == "tokens":
      patch.setattr(corpora, "_write_tokens", full)
    else:
      patch.setattr(fable_class, "download_and_prepare", full)
    with pytest.raises(ConfigError, match="No space left .*; free space") as e:
      prepare()
  assert str(tmp_path / "cache") in str(e.value)
  assert not os.listdir(tmp_path / "cache")
  assert prepare().num_documents["train"]["crow"] == 26


def test_another_error_of_a_dataset_keeps_its_traceback(
  prepare, fable_class, monkeypatch
):
  def broken(*args, **kwargs):
    raise RuntimeError("a fault of its author")

  monkeypatch.setattr(fable_class, "download_and_prepare", broken)
  with pytest.raises(RuntimeError, match="a fault of its author"):
    prepare()


class SomebodysOwn(tfds.core.GeneratorBasedBuilder):
  """A dataset that this package knows nothing of."""

  VERSION = tfds.core.Version("2.1.0")
  splits = {}  # Split -> examples; set before a builder is made.

  def _info(self):
    (first, *_) = itertools.chain(*self.splits.values())
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {key: tfds.features.Text() for key in first}
      ),
    )

  def _split_generators(self, dl_manager):
    return {k: self._generate_examples(v) for k, v in self.splits.items()}

  def _generate_examples(self, examples):
    yield from enumerate(examples)


@pytest.fixture
def make_dataset(tmp_path_factory, monkeypatch):
  def make_dataset(splits, file_format="array_record"):
    monkeypatch.setattr(SomebodysOwn, "splits", splits)
    builder = SomebodysOwn(
      data_dir=tmp_path_factory.mktemp("tfds"), file_format=file_format
    )
    builder.download_and_prepare()
    return builder.data_dir

  return make_dataset


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_a_prepared_dataset_of_others_is_read(
  make_dataset, tmp_path, file_format
):
  folder = make_dataset(
    {
      "train": [
        {"text": "one", "domain": "tales", "url": "x"},
        {"text": "zwei", "domain": "Märchen", "url": "y"},
      ],
      "validation": [{"text": "", "domain": "new/here", "url": "z"}],
    },
    file_format,
  )
  corpus = corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path)
  assert sorted(corpus.domains) == ["Märchen", "new/here", "tales"]
  found = {k: v for k, v in everything(corpus).items() if v}
  assert found == {
    ("train", "tales"): [b"one"],
    ("train", "Märchen"): [b"zwei"],
    ("validation", "new/here"): [b""],
  }
  assert corpus.sources["data_dir"] == folder
  assert corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path) == corpus


def test_empty_documents_have_an_end_and_nothing_else(make_dataset, tmp_path):
  texts = [{"text": text} for text in ("some text", "", "more", "")]
  folder = make_dataset({"train": texts, "validation": texts})
  path = make_tokenizer("tokenizers", tmp_path)
  for tokenizer in ("bytes", str(path)):
    corpus = corpora.prepare(
      "it", data_dir=folder, cache_dir=tmp_path, tokenizer=tokenizer
    )
    tokens = corpus.tokens("train", "text")
    assert (tokens == corpus.end_of_document).sum() == 4
    assert np.array(corpus.num_bytes_V)[tokens].sum() == 13
  folder = make_dataset({"train": [{"text": ""}] * 3, "validation": texts})
  with pytest.raises(ConfigError, match="training documents .* hold no text"):
    corpora.prepare("it", data_dir=folder, cache_dir=tmp_path)


def test_too_many_domains_are_refused(make_dataset, tmp_path):
  folder = make_dataset(
    {"train": [{"text": "a", "domain": f"host {i}"} for i in range(300)]}
  )
  with pytest.raises(ConfigError, match='"domain" has more than 256 values'):
    corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path)


TEXT = "tensorflow_datasets.core.features.text_feature.Text"
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
STRANGE = {"a": {"type": "strange.Text", "content": {}}}


@pytest.mark.parametrize("form", ["proto", "legacy", "text", "info"])
def test_a_folder_that_names_code_runs_none(
  make_dataset, tmp_path, monkeypatch, form
):
  """TFDS would import the classes that features.json names."""
  folder = pathlib.Path(make_dataset({"train": [{"text": "abc"}]}))
  file = folder / "features.json"
  features = json.loads(file.read_text())
  if form in ("proto", "info"):
    features = json.loads(json.dumps(features).replace(TEXT, "strange.Text"))
  if form == "legacy":
    features = {"type": DICT, "content": STRANGE}
  if form == "text":
    own = {"json": json.dumps(STRANGE)}
    features = {"pythonClassName": DICT, "jsonFeature": own}
  if form == "info":
    file = folder / "dataset_info.json"
    features = json.loads(file.read_text()) | {"features": features}
  file.write_text(json.dumps(features))
  (tmp_path / "strange.py").write_text("raise SystemExit('it was run')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ConfigError, match="strange.* is code of somebody else"):
    corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["hello-world", "a b", "foo/", "a:b:c"])
def test_what_is_no_name_of_a_dataset(name, tmp_path):
  with pytest.raises(ConfigError, match="there is no dataset|community"):
    corpora.prepare(name, cache_dir=tmp_path)


def test_a_community_dataset_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="whose code TFDS would download"):
    corpora.prepare("somebody:texts/en", cache_dir=tmp_path)


def test_a_damaged_dataset_is_named(make_dataset, tmp_path):
  folder = pathlib.Path(make_dataset({"train": [{"text": "abc"}]}))
  (folder / "dataset_info.json").write_text("{")
  with pytest.raises(ConfigError, match="data.dir .* cannot be read"):
    corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path)


def test_damaged_documents_are_named(make_dataset, tmp_path):
  folder = pathlib.Path(make_dataset({"train": [{"text": "abc" * 99}] * 9}))
  (file,) = folder.glob("*.array_record*")
  for content in (b"", b"x" * 1000):
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="split train of .* cannot be read"):
      corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_validation_split_documents_are_held_out(
  make_dataset, tmp_path
):
  texts = [f"text {i % 400}" for i in range(600)]  # Some are there twice.
  folder = make_dataset({"train": [{"text": text} for text in texts]})
  corpus = corpora.prepare("a/b", data_dir=folder, cache_dir=tmp_path)
  found = everything(corpus)
  train, validation = found["train", "text"], found["validation", "text"]
  assert collections.Counter(train + validation) == collections.Counter(
    text.encode() for text in texts
  )
  assert not set(train) & set(validation)
  assert 0.03 < len(validation) / 600 < 0.12


def test_other_content_in_the_same_folder_is_noticed(make_dataset, tmp_path):
  folder = pathlib.Path(make_dataset({"train": [{"text": "abc"}] * 20}))
  first = corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path)
  other = pathlib.Path(make_dataset({"train": [{"text": "xyz"}] * 20}))
  for file in other.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
    os.utime(folder / file.name, (10**9, 10**9))
  again = corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path)
  assert again.fingerprint != first.fingerprint


def test_a_missing_folder_says_what_to_give(make_dataset, tmp_path):
  with pytest.raises(ConfigError, match="nowhere does not exist; give"):
    corpora.prepare("mine", data_dir=tmp_path / "nowhere", cache_dir=tmp_path)
  folder = pathlib.Path(make_dataset({"train": [{"text": "abc"}]}))
  with pytest.raises(
    ConfigError, match="holds nothing that is read, but .*; give text in"
  ):
    corpora.prepare("mine", data_dir=folder.parent, cache_dir=tmp_path)


def test_a_dataset_that_cannot_serve_says_why(make_dataset, tmp_path):
  def refused(folder, match):
    with pytest.raises(ConfigError, match=match):
      corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []

  folder = make_dataset({"train": [{"prose": "abc"}]})
  refused(folder, 'the feature "text" .* is not there; .* of text: prose')
  folder = make_dataset({"test": [{"text": "abc"}]})
  refused(folder, r"no documents in the split train, .* \{'test': 1\}")
  info = pathlib.Path(folder) / "dataset_info.json"
  content = json.loads(info.read_text())
  info.write_text(json.dumps({**content, "fileFormat": "tfrecord"}))
  refused(folder, "is in tfrecord format, which only TensorFlow reads")


# Features, names, tokenizers.


class SomebodysReviews(tfds.core.GeneratorBasedBuilder):
  """A dataset with features of its own, that TFDS finds by its name."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "review": tfds.features.Text(),
          "title": tfds.features.Text(),
          "stars": tfds.features.ClassLabel(names=["bad", "good"]),
          "length": np.int64,
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(range(200))}

  def _generate_examples(self, numbers):
    for i in numbers:
      text = f"review number {i}, " + "good " * (i % 7)
      example = {"review": text, "title": "t", "length": i}
      yield i, example | {"stars": "good" if i % 7 > 3 else "bad"}


@pytest.fixture
def reviews(tmp_path, monkeypatch):
  """Prepares them by name, under TFDS's own folder."""
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))

  def prepare(name="somebodys_reviews", **kwargs):
    kwargs = {"text_feature": "review", "domain_feature": "stars"} | kwargs
    return corpora.prepare(name, cache_dir=tmp_path / "cache", **kwargs)

  return prepare


def test_a_dataset_of_tfds_by_name_and_its_own_features(reviews, tmp_path):
  corpus = reviews()
  assert corpus.domains == ("bad", "good")
  found = everything(corpus)
  train = found["train", "bad"] + found["train", "good"]
  validation = found["validation", "bad"] + found["validation", "good"]
  assert len(train) + len(validation) == 200 and validation
  assert all(text.startswith(b"review number") for text in train)
  # No held-out text occurs in training, compared by content.
  assert not set(train) & set(validation)
  # The same by its folder, and another feature is another cache.
  (folder,) = (tmp_path / "tfds" / "somebodys_reviews").iterdir()
  assert reviews("x", data_dir=folder).fingerprint == corpus.fingerprint
  titles = reviews(text_feature="title", domain_feature="none")
  assert titles.domains == ("text",)
  assert set(everything(titles)["train", "text"]) == {b"t"}


def test_nothing_is_prepared_for_a_feature_that_is_not_text(
  reviews, monkeypatch
):
  """It may be a large download."""
  monkeypatch.setattr(SomebodysReviews, "download_and_prepare", None)
  with pytest.raises(ConfigError, match="is not text but a ClassLabel"):
    reviews(text_feature="stars")


def test_a_config_that_a_dataset_has_not(reviews):
  with pytest.raises(ConfigError, match=r'mean "paws_x_wiki/\w\w"'):
    reviews("paws_x_wiki/xx")


def test_a_name_for_which_tfds_needs_a_network(reviews, monkeypatch):
  def unreachable(*args, **kwargs):
    raise ConnectionError("no route to host")

  monkeypatch.setattr(tfds, "builder", unreachable)
  with pytest.raises(ConfigError, match='no dataset "unheard_of", neither'):
    reviews("unheard_of")


@pytest.mark.parametrize(
  ("kwargs", "words"),
  [
    (
      {"name": "somebodys_review"},
      ["somebodys_review", 'mean "somebodys_reviews"'],
    ),
    ({"text_feature": "reviews"}, ["reviews", "review", "data.text_feature"]),
    ({"text_feature": "stars"}, ["not text", "ClassLabel", "review", "title"]),
    ({"text_feature": "length"}, ["not text", "Tensor"]),
    ({"domain_feature": "star"}, ["star", "stars", "none", "domain_feature"]),
    ({"tokenizer": "byte"}, ["data.tokenizer = 'byte'", "bytes"]),
    ({"tokenizer": "/no/tokenizer.json"}, ["/no/tokenizer.json", "there"]),
  ],
)
def test_what_cannot_be_read_is_one_sentence(reviews, kwargs, words):
  with pytest.raises(ConfigError) as e:
    reviews(**kwargs)
  assert all(word in str(e.value) for word in words), str(e.value)
  assert "\n" not in str(e.value)


def test_an_empty_split_is_refused(make_dataset, tmp_path):
  some = [{"text": "abc"}]
  folder = make_dataset({"train": some, "validation": some})
  info = pathlib.Path(folder) / "dataset_info.json"
  content = json.loads(info.read_text())
  for split in content["splits"]:
    if split["name"] == "validation":
      split["shardLengths"] = ["0"]
  info.write_text(json.dumps(content))
  with pytest.raises(
    ConfigError, match="an empty split validation: .*'validation': 0"
  ):
    corpora.prepare("mine", data_dir=folder, cache_dir=tmp_path)


# Tokenizers.


@pytest.mark.parametrize("kind", ["tokenizers", "sentencepiece"])
def test_a_tokenizer_from_a_file(kind, make_dataset, tmp_path):
  path = make_tokenizer(kind, tmp_path)
  folder = make_dataset({"train": [{"text": text} for text in TEXTS]})
  corpus, by_bytes = (
    corpora.prepare("it", data_dir=folder, cache_dir=tmp_path, tokenizer=t)
    for t in (str(path), "bytes")
  )
  assert corpus.fingerprint != by_bytes.fingerprint
  assert corpus.num_documents == by_bytes.num_documents
  sizes = np.array(corpus.num_bytes_V)
  assert corpus.vocab_size == len(sizes) > 257 and sizes[-1] == 0
  for split in corpora.SPLITS:
    found, text = corpus.tokens(split, "text"), by_bytes.tokens(split, "text")
    assert found.max() == corpus.end_of_document
    assert len(found) < 0.95 * len(text)
    # Bits per byte are counted over the same bytes.
    assert sizes[found].sum() == (text < 256).sum()


def test_a_tokenizer_that_loses_bytes_is_refused(make_dataset, tmp_path):
  """Trainers' defaults make tokenizers that collapse spaces and line ends."""
  indented = [text.replace(" ", "    ") for text in TEXTS]
  folder = make_dataset({"train": [{"text": text} for text in indented]})
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_prefix=str(tmp_path / "m"),
    vocab_size=40,
    minloglevel=2,
  )
  lower = library.Tokenizer.from_file(
    str(make_tokenizer("tokenizers", tmp_path))
  )
  lower.normalizer = library.normalizers.BertNormalizer()
  lower.save(str(tmp_path / "lower.json"))
  real = sum(len(text.encode()) for text in indented)
  for name in ("m.model", "lower.json"):
    own = {"data_dir": folder, "cache_dir": tmp_path / "cache"}
    own["tokenizer"] = str(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name}' stand for .* has {real}"):
      corpora.prepare("it", **own)
  assert not list((tmp_path / "cache").iterdir())
  # A task that counts no bytes takes it, and no other task does after that.
  corpus = corpora.prepare("it", **own, whole=False)
  assert corpora.prepare("it", **own, whole=False).directory == corpus.directory
  with pytest.raises(ConfigError, match="stand for"):
    corpora.prepare("it", **own)
