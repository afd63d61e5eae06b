"""Names on the Hugging Face hub, read from a cache that is made by hand.

The package `huggingface_hub` is the real one, without a network.
"""

import json
import os
import shutil
import sys
import tempfile

import flax.linen as nn
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs import tiny
from moe_jax import evaluate, generate, hf, main, models, upcycle
from moe_jax.core import hub
from moe_jax.core.errors import ConfigError
from moe_jax.data.text import corpora
from moe_jax.run import config as config_lib
from moe_jax.training import checkpoint, program, starts

COMMIT, OLDER = "a" * 40, "b" * 40
SHARED = f"{tempfile.gettempdir()}/moe_jax_tests_{os.getuid()}/moe_jax"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """The cache of the package, which is offline; nothing is remembered."""
  from huggingface_hub import constants

  folder = tmp_path / "hub"
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
  monkeypatch.setattr(program.parallel, "mesh_or_none", lambda *_: None)
  monkeypatch.chdir(tmp_path)
  hub._snapshot.cache_clear()
  yield folder
  hub._snapshot.cache_clear()


def snapshot(cache, name, commit=COMMIT, ref="main"):
  """The folder of a snapshot in the cache, as the package lays it out.

  Args:
    cache: of the package.
    name: such as models--org--name.
    commit: of the snapshot.
    ref: a branch or tag that stands for it.
  """
  (cache / name / "refs").mkdir(parents=True, exist_ok=True)
  (cache / name / "refs" / ref).write_text(commit)
  folder = cache / name / "snapshots" / commit
  folder.mkdir(parents=True)
  return folder


def section():
  """The model of a run whose weights are published as those of Mixtral."""
  c = tiny.get_config().model
  c.update(scale_embedding=False, vocab_size=257)
  c.moe.update(capacity_factor=None, dispatcher={"name": "sorted"})
  c.moe.router = {"name": "top_k", "renormalize": True}
  c.norm_eps = 1e-5
  return c


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A folder of published weights."""
  folder = tmp_path_factory.mktemp("published") / "model"
  model = models.build(section(), vocab_size=257)
  params = models.init(model, jax.random.key(0))["params"]
  params = jax.tree.map(np.asarray, nn.unbox(params))
  hf.save(folder, model, {"params": params}, extra={"eos_token_id": 256})
  return folder


@pytest.fixture
def on_hub(cache, published):
  """The same on the hub, beside files that are not read."""
  folder = snapshot(cache, "models--org--name")
  shutil.copytree(published, folder, dirs_exist_ok=True)
  return folder


def flags(tmp_path):
  """A config whose model is `section`, for the commands."""
  c = tiny.get_config()
  c.model = section()
  c.model.vocab_size = None
  c.train.update(num_steps=1, log_every=1)
  c.optim.update(warmup_steps=0, learning_rate=0.0)
  c.eval.batches_per_domain = 1
  c.data.cache_dir = SHARED
  (tmp_path / "config.json").write_text(c.to_json())
  return [f"--config={tmp_path}/config.json"]


def test_a_run_begins_with_a_name(on_hub, published, tmp_path):
  """run.json has the commit; to go on, nothing is asked for again."""
  given = [*flags(tmp_path), "--config.init_from=hf:org/name"]
  given += [f"--workdir={tmp_path}/run"]
  main.main(given)
  found = checkpoint.load_params(tmp_path / "run")
  wanted = hf.load(published)[1]["params"]
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  facts = json.loads((tmp_path / "run" / "run.json").read_text())
  assert facts["init_from"] == str(on_hub) and COMMIT in facts["init_from"]
  shutil.rmtree(on_hub)
  hub._snapshot.cache_clear()
  assert main.main(given) == 0


@pytest.mark.parametrize("name", ["hf:org/name", "org/name"])
def test_commands_on_a_name(on_hub, tmp_path, name, capsys):
  """They do what they do on its folder."""
  told = []
  for place in (name, on_hub):
    more = ["--dataset=python_sources", "--batches_per_domain=1"]
    evaluate.main([f"--hf={place}", *more, "--seq_len=32"])
    generate.main([f"--hf={place}", "--prompt=def ", "--num_tokens=4"])
    told.append(capsys.readouterr().out)
  assert told[0] == told[1] and "bits_per_byte" in told[0]
  (tmp_path / "org").mkdir()
  words = "no folder org/name; give one, or hf:org/name if that is a name"
  if name == "org/name":  # A path in a folder that is here is no name.
    with pytest.raises(ConfigError, match=words):
      generate.main([f"--hf={name}", "--prompt=def "])
    c = config_lib.load(str(flags(tmp_path)[0].partition("=")[2]))
    with pytest.raises(ConfigError, match=f"init_from = {name}: .*{words}"):
      starts.read(name, None, c)


def test_experts_made_of_a_name(on_hub, tmp_path):
  """The command reads its layers, too."""
  more = ["--config.model.moe.num_experts=8", "--like_source"]
  upcycle.main(
    ["--hf=hf:org/name", *flags(tmp_path), *more, f"--out={tmp_path}/up"]
  )
  made = checkpoint.load_params(tmp_path / "up")
  assert made["decoder"]["0"]["moe"]["experts"]["up"].shape[1] == 8


def test_revisions_and_folders(cache, published):
  older = snapshot(cache, "models--org--name", OLDER, "v1")
  shutil.copytree(published, older / "high")
  snapshot(cache, "models--org--name")
  for revision in ("v1", OLDER):
    found = hub.weights(f"hf:org/name/high@{revision}")
    assert found == str(older / "high")
  with pytest.raises(ConfigError, match="hf:org/name has no safetensors files"):
    hub.weights("hf:org/name")
  for path in (
    "hf:name",
    "hf:",
    "hf:org/name@",
    "hf:org/na me",
    "hf:org/name/a/..",
  ):
    with pytest.raises(
      ConfigError, match="no name on the .* hf:ORG/NAME, with"
    ):
      hub.weights(path)
  for path in ("name", "./org/name", "/org/name", str(published)):
    assert hub.weights(path) == path


def test_only_files_that_are_read_are_asked_for(monkeypatch, tmp_path):
  """By the patterns of the package, over a listing of a repository."""
  import huggingface_hub
  from huggingface_hub.utils import filter_repo_objects

  there = ["README.md", "config.json", "tokenizer.json", "modeling.py"]
  there += ["model.safetensors.index.json", "model-1-of-1.safetensors"]
  there += ["pytorch_model.bin", "consolidated.safetensors"]
  there += ["original/model.safetensors", "high/config.json"]
  there += ["high/a.safetensors", "high/more/b.safetensors"]
  asked = []

  def download(name, *, repo_type, revision, **patterns):
    asked.append((name, repo_type, revision))
    for file in filter_repo_objects(there, **patterns):
      (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name / file).touch()
    return str(tmp_path / name)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  hub.weights("hf:org/a")
  hub.weights("hf:org/b/high@c")
  found = [sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*.*"))]
  assert found == [
    [
      *("org/a/config.json", "org/a/model-1-of-1.safetensors"),
      *("org/a/model.safetensors.index.json", "org/a/tokenizer.json"),
      *("org/b/high/a.safetensors", "org/b/high/config.json"),
    ]
  ]
  assert asked == [("org/a", "model", None), ("org/b", "model", "c")]


@pytest.mark.parametrize("missing", ["package", "network"])
def test_without_the_package_or_a_network(monkeypatch, missing, tmp_path):
  """One sentence, and no run is begun."""
  words = "hf:org/name cannot be downloaded .*Cannot find.*folder of a copy"
  if missing == "package":
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = (
      "hf:org/name is .* needs the extra hf: pip install 'moe_jax.hf.', or"
    )
  with pytest.raises(ConfigError, match=f"^{words}") as e:
    generate.main(["--hf=hf:org/name", "--prompt=def "])
  assert "\n" not in str(e.value)
  more = ["--config.init_from=hf:org/name", f"--workdir={tmp_path}/run"]
  with pytest.raises(ConfigError, match=f"^init_from = hf:org/name: .*{words}"):
    main.main([*flags(tmp_path), *more])
  assert not (tmp_path / "run" / "config.json").exists()


# Datasets.


def texts(kind, number=40):
  return [f"{kind} {i}: {'word ' * (i % 7)}" for i in range(number)]


@pytest.fixture
def dataset(cache):
  """A dataset with rows in two forms, and a page about it."""
  folder = snapshot(cache, "datasets--org--data")
  (folder / "data").mkdir()
  for split in ("train", "test"):
    rows = pyarrow.table({"text": texts(split)})
    pyarrow.parquet.write_table(rows, folder / "data" / f"{split}-0.parquet")
  lines = [json.dumps({"text": text}) + "\n" for text in texts("line")]
  (folder / "lines").mkdir()
  (folder / "lines" / "part.jsonl").write_text("".join(lines))
  (folder / "README.md").write_text("not read")
  return folder


def read(name, tmp_path):
  """The texts of a corpus, in order."""
  corpus = corpora.prepare(name, cache_dir=tmp_path / "cache")
  (domain,) = corpus.domains
  ids = [x for s in corpora.SPLITS for x in corpus.tokens(s, domain).tolist()]
  whole = bytes(10 if x == corpus.end_of_document else x for x in ids).decode()
  return sorted(whole.splitlines())


@pytest.mark.parametrize(
  "path, kind",
  [
    ("/data/train-*.parquet", "train"),
    ("/lines", "line"),
    ("/lines/part.jsonl", "line"),
    ("/data/test-0.parquet", "test"),
  ],
)
def test_the_files_of_a_dataset(dataset, tmp_path, path, kind):
  assert read(f"hf:org/data{path}", tmp_path) == sorted(texts(kind))


def test_datasets_that_are_refused(dataset, cache, tmp_path):
  words = "held out, such as data/test-0.parquet; name those to read, such as"
  words += r" hf:org/data/data/train\*.parquet@main$"
  with pytest.raises(ConfigError, match=words):
    read("hf:org/data@main", tmp_path)
  with pytest.raises(ConfigError, match="has no files data/no.txt on the Hugg"):
    read("hf:org/data/data/no.txt", tmp_path)
  (dataset / "data" / "test-0.parquet").unlink()
  hub._snapshot.cache_clear()
  # Parquet goes before lines of the same, and pages are not read.
  assert read("hf:org/data", tmp_path) == sorted(texts("train"))
  with pytest.raises(ConfigError, match="hf:org/other cannot be downloaded"):
    read("hf:org/other", tmp_path)


def test_a_run_on_a_dataset_of_the_hub(dataset, tmp_path):
  """It goes on without the dataset: the tokens are in its cache."""
  c = tiny.get_config()
  c.data.update(name="hf:org/data/lines", cache_dir=f"{tmp_path}/cache")
  task = program.build_task(c)
  assert COMMIT in task.sources["data_dir"]
  shutil.rmtree(dataset)
  hub._snapshot.cache_clear()
  again = program.build_task(c, fingerprint=task.fingerprint)
  assert again.fingerprint == task.fingerprint
  with pytest.raises(
    ConfigError, match="hf:org/data/lines cannot be downloaded"
  ):
    program.build_task(c)
