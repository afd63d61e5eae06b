"""Several datasets as one, and documents kept apart."""

import functools
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import base
from moe_jax import main, models
from moe_jax.core.errors import ConfigError
from moe_jax.data import batches
from moe_jax.data.text import mixed
from moe_jax.run import config, run_directory
from tests import tiers

SEQ_LEN = 32


class TwoFeatures(tfds.core.GeneratorBasedBuilder):
  """Letters of one kind a document, so that its origin is seen."""

  VERSION = tfds.core.Version("1.0.0")
  texts = ()

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "body": tfds.features.Text(),
          "kind": tfds.features.ClassLabel(names=["short", "long"]),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, text in enumerate(self.texts):
      yield i, {"body": text, "kind": "long" if i % 2 else "short"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Two prepared datasets, of small and of large letters."""
  found = {}
  for name, first in (("small", "a"), ("large", "A")):
    letters = [chr(ord(first) + i) for i in range(26)]
    rng = np.random.default_rng(ord(first))
    TwoFeatures.texts = [
      f"{i} " + "".join(rng.choice(letters, 40 + 40 * (i % 2)))
      for i in range(300)
    ]
    builder = TwoFeatures(
      data_dir=tmp_path_factory.mktemp(name), file_format="array_record"
    )
    builder.download_and_prepare()
    found[name] = str(builder.data_dir)
  return found


def parts(folders, **weights):
  return {
    name: {
      "name": name,
      "dir": folders[name],
      "text_feature": "body",
      "domain_feature": "kind" if name == "small" else "none",
      "weight": weight,
    }
    for name, weight in weights.items()
  }


def section(tmp_path, parts):
  c = base.get_config()
  c = config.overridden(c, [f"data.mixture={parts!r}"])
  c.data.cache_dir = str(tmp_path)
  return c.data


def test_rows_come_by_weight_and_names_by_label(folders, tmp_path):
  corpus = mixed.prepare(section(tmp_path, parts(folders, small=3, large=1)))
  assert corpus.domains == ("large", "small/short", "small/long")
  assert corpus.num_documents["train"]["large"] > 250
  for separate in (False, True):
    stream = batches.train_batches(
      corpus,
      seq_len=SEQ_LEN,
      batch_size=16,
      seed=1,
      separate_documents=separate,
    )
    of_large, rows = 0, 0
    for step in range(50):
      batch = stream[step]
      large = batch["domain"] == 0
      of_large, rows = of_large + large.sum(), rows + len(large)
      for row, is_large in zip(batch["inputs"], large):
        text = bytes(row[row < 256].astype(np.uint8))
        assert text.upper() == text if is_large else text.lower() == text
      again = stream[step]
      np.testing.assert_array_equal(batch["inputs"], again["inputs"])
    assert abs(of_large / rows - 1 / 4) < 0.01


def test_every_window_of_every_part_comes_once_an_epoch(folders, tmp_path):
  corpus = mixed.prepare(section(tmp_path, parts(folders, small=1, large=1)))
  stream = batches.train_batches(corpus, seq_len=SEQ_LEN, batch_size=1, seed=0)
  counts = dict.fromkeys((True, False), 0)
  seen = {True: set(), False: set()}
  sizes = corpus.num_tokens["train"]
  windows = {
    True: (sizes["large"] - 1) // SEQ_LEN,
    False: sum(
      (sizes[k] - 1) // SEQ_LEN for k in ("small/short", "small/long")
    ),
  }
  for step in range(2 * min(windows.values())):
    batch = stream[step]
    large = bool(batch["domain"][0] == 0)
    counts[large] += 1
    seen[large].add(batch["inputs"].tobytes())
  smaller = min(windows, key=windows.get)
  assert counts[smaller] == windows[smaller]
  assert len(seen[smaller]) > 0.99 * windows[smaller]  # Random letters.


def test_the_fingerprint_is_of_all_parts(folders, tmp_path):
  both = section(tmp_path, parts(folders, small=3, large=1))
  other = section(tmp_path, parts(folders, small=1, large=1))
  found = mixed.prepare(both).fingerprint
  assert mixed.prepare(other).fingerprint == found  # Weights are no text.
  assert mixed.prepare(both, fingerprint=found).fingerprint == found
  with pytest.raises(ConfigError, match="was asked for"):
    mixed.prepare(both, fingerprint="0" * 64)
  # A run that goes on has them as they were, wherever its parts have gone.
  moved = {k: v | {"dir": "/gone"} for k, v in parts(folders, small=3).items()}
  moved |= parts(folders, large=1)
  moved = section(tmp_path, moved)
  assert mixed.prepare(moved, fingerprint=found).fingerprint == found
  with pytest.raises(ConfigError, match="/gone does not exist"):
    mixed.prepare(moved)
  one = mixed.prepare(section(tmp_path, parts(folders, small=1)))
  assert one.fingerprint != found


@pytest.mark.parametrize(
  ("part", "words"),
  [
    ("{'a': {'name': 'python_source'}}", ["python_sources"]),
  ],
)
def test_an_impossible_part_is_one_sentence(part, words, tmp_path):
  c = base.get_config()
  c = config.overridden(c, [f"data.mixture={part}"])
  c.data.cache_dir = str(tmp_path)
  with pytest.raises(ConfigError) as e:
    mixed.prepare(c.data)
  assert all(word in str(e.value) for word in words), str(e.value)


BOTH = ("small", "large")


@pytest.mark.parametrize("names", tiers.only([BOTH], [BOTH, ("small",)]))
def test_it_trains_and_never_on_what_is_held_out(
  folders, names, tmp_path, monkeypatch
):
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  mix = parts(folders, **dict.fromkeys(names, 1.0))
  flags = [
    "--config=configs/tiny.py",
    f"--workdir={tmp_path / 'run'}",
    f"--config.data.cache_dir={tmp_path / 'cache'}",
    f"--config.data.mixture={mix!r}",
    f"--config.data.seq_len={SEQ_LEN}",
    "--config.train.num_steps=10",
    "--config.train.log_every=5",
    "--config.optim.warmup_steps=1",
  ]
  assert main.main(flags) == 0
  first, last = run_directory.read_metrics(tmp_path / "run", "train")
  assert last["loss"] < first["loss"]
  (found,) = run_directory.read_metrics(tmp_path / "run", "validation")
  facts = json.loads((tmp_path / "run" / "run.json").read_text())
  assert set(facts["data_sources"]) == set(names)
  corpus = mixed.prepare(section(tmp_path / "cache", mix))
  assert {f"max_vio_global/{d}" for d in corpus.domains} <= found.keys()
  # Each document is all in one split or all in the other, by content.
  texts = {
    split: {
      bytes(document.astype(np.uint8))
      for d in corpus.domains
      for document in split_at(corpus.tokens(split, d), corpus.end_of_document)
    }
    for split in ("train", "validation")
  }
  assert texts["validation"] and not texts["train"] & texts["validation"]
  stream = batches.train_batches(
    corpus, seq_len=SEQ_LEN, batch_size=16, seed=0, separate_documents=True
  )
  read = b"".join(
    bytes(row[row < 256].astype(np.uint8))
    for step in range(60)
    for row in stream[step]["inputs"]
  )
  assert not any(text[:28] in read for text in texts["validation"])


def split_at(array, end):
  """Documents without their ends."""
  return np.split(
    array[array < end],
    np.flatnonzero(array == end) - np.arange((array == end).sum()),
  )[:-1]


# Documents kept apart.


def build(separate):
  c = base.get_config().model
  c.update(d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
  c.moe.update(num_experts=4, d_expert=16, capacity_factor=None)
  c.moe.dispatcher = {"name": "sorted"}
  end = 256 if separate else None
  return models.build(c, vocab_size=257, end_of_document=end)


def test_a_document_does_not_see_the_one_before():
  rng = np.random.default_rng(0)
  these = rng.integers(0, 256, (2, 16)).astype(np.int32)
  these[0, 5], these[1, 9] = 256, 256
  others = these.copy()
  others[0, :5], others[1, :9] = 1, 2
  params = jax.jit(build(False).init)(jax.random.key(0), these)
  for separate in (True, False):
    run = jax.jit(functools.partial(build(separate).apply, params))
    change = np.abs(run(these)[0] - run(others)[0]).max(-1)
    assert (change[0, :5] > 1e-3).all() and (change[1, :9] > 1e-3).all()
    behind = np.concatenate([change[0, 6:], change[1, 10:]])
    assert (behind == 0).all() if separate else (behind > 1e-5).all()


def test_the_end_of_a_document_predicts_nothing(folders, tmp_path):
  corpus = mixed.prepare(section(tmp_path, parts(folders, small=1)))
  for separate in (True, False):
    kwargs = dict(seq_len=SEQ_LEN, batch_size=8, separate_documents=separate)
    train = batches.train_batches(corpus, seed=0, **kwargs)[0]
    _, validation = next(iter(batches.validation_batches(corpus, **kwargs)))
    for batch in (train, validation):
      ends = batch["inputs"] == corpus.end_of_document
      assert ends.any()
      assert (
        not batch["mask"][ends].any()
        if separate
        else (batch["mask"][ends].any())
      )
    assert train["mask"][train["inputs"] != corpus.end_of_document].all()
