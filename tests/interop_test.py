"""Published weights: the reference's logits and texts, in and out of files.

tests/checkpoints has tiny random checkpoints of the reference implementation,
with its logits and texts; `python -m tests.parity` made them.
"""

import importlib
import json
import pathlib
import shutil
import struct

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from moe_jax import evaluate, hf, models
from moe_jax.core.errors import ConfigError
from moe_jax.hf import architecture, config, families, rows, weights
from moe_jax.models import counts
from moe_jax.models.generation import decoding
from tests import hf_pairs, mesh_cases, parity, tiers

NAMES = sorted(parity.cases())
ONE_A_FAMILY = [name for name in NAMES if name.endswith("_a")]
LOGITS = jax.jit(
  lambda model, variables, tokens: model.apply(variables, tokens)[0],
  static_argnums=0,
)


def expected(name):
  with np.load(parity.FOLDER / name / "expected.npz") as file:
    return dict(file)


def flat(variables):
  return traverse_util.flatten_dict(jax.device_get(variables), sep="/")


PUBLISHED = json.loads(
  pathlib.Path(__file__).with_name("published.json").read_text()
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_models(name):
  """All that their config.json has is known, and the model has their size.

  Selection biases are counted apart, by the reference too.
  """
  published = PUBLISHED[name]
  _, ours, _ = config.read(published["fields"], "config.json")
  model = architecture.build(ours, "config.json")
  found = counts.count(model, models.variables(model))
  assert found["total"] == published["parameters"]


def test_every_family_has_two_checkpoints():
  cases = parity.cases() | hf_pairs.cases()
  assert {n.name for n in parity.FOLDER.iterdir()} == set(cases)
  for family in families.known().keys() - {"llama4", "kimi_k2"}:
    assert sum(kind == family for kind, _ in cases.values()) >= 2
  size = sum(f.stat().st_size for f in parity.FOLDER.rglob("*") if f.is_file())
  assert size < 2.5e6


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path):
  path = tmp_path / "m"
  shutil.copytree(parity.FOLDER / "deepseek_v3_a", path)
  fields = json.loads((path / "config.json").read_text())
  fields["model_type"] = "kimi_k2"
  (path / "config.json").write_text(json.dumps(fields))
  model, variables = hf.load(path)
  want = expected("deepseek_v3_a")
  logits = np.asarray(LOGITS(model, variables, want["tokens"]))
  np.testing.assert_allclose(logits, want["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", tiers.only(ONE_A_FAMILY, NAMES))
def test_the_references_logits_and_files(name, tmp_path):
  """Logits, and every tensor written back."""
  model, variables = hf.load(parity.FOLDER / name)
  want = expected(name)
  logits = np.asarray(LOGITS(model, variables, want["tokens"]))
  assert np.abs(want["logits"]).max() > 1
  np.testing.assert_allclose(logits, want["logits"], atol=1e-4, rtol=0)
  hf.save(tmp_path / "copy", model, variables, max_shard_bytes=8_000)
  one, other = (tensors(p) for p in (parity.FOLDER / name, tmp_path / "copy"))
  assert one.keys() == other.keys()
  for tensor in one:
    np.testing.assert_array_equal(other[tensor], one[tensor], err_msg=tensor)
  again = hf.load(tmp_path / "copy")
  assert again[0].arch == model.arch
  assert list((tmp_path / "copy").glob("model-*-of-*.safetensors"))


# Each has an attention of another kind.
TEXTS = ["deepseek_v3_a", "gpt_oss_a"]


@pytest.mark.parametrize("name", tiers.only(TEXTS, NAMES))
def test_the_references_texts(name):
  """Greedy text, token for token."""
  model, variables = hf.load(parity.FOLDER / name)
  prompt, text = np.split(expected(name)["generated"], [5], axis=1)
  made = decoding.generate(model, variables, prompt.tolist(), text.shape[1])
  np.testing.assert_array_equal(made.tokens_BN, text)


def tensors(folder):
  """All tensors of a folder, by the library alone."""
  from safetensors.numpy import load_file

  found = {}
  for file in folder.glob("*.safetensors"):
    found |= load_file(file)
  return found


@pytest.mark.parametrize(
  "name",
  tiers.only(["gpt_oss_b"], ["deepseek_v3_a", "gpt_oss_b", "dbrx_b"]),
)
def test_loading_onto_a_mesh(name):
  """Each device gets its part of the same numbers."""
  mesh = mesh_cases.make_mesh((1, 2, 2, 1))
  _, variables = hf.load(parity.FOLDER / name)
  model, sharded = hf.load(parity.FOLDER / name, mesh)
  one, other = flat(variables), flat(sharded)
  assert one.keys() == other.keys()
  for leaf in one:
    np.testing.assert_array_equal(one[leaf], other[leaf], err_msg=leaf)
  experts = sharded["params"]["decoder"]["0"]["moe"]["experts"]["down"]
  shard = experts.addressable_shards[0].data
  assert shard.shape[1] == experts.shape[1] // 2
  assert shard.shape[3] == experts.shape[3] // 2
  want = expected(name)
  tokens = np.concatenate([want["tokens"], want["tokens"]])
  logits = LOGITS(model, sharded, tokens)
  np.testing.assert_allclose(logits[:2], want["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
  "name,reads", [("mixtral_b", 2 * 3 * 4), ("dbrx_b", 3 * 3 * 4)]
)
def test_a_device_reads_no_more_than_its_part(name, reads, monkeypatch):
  """Experts of other devices are not read for it.

  Layers, matrices and experts, or the parts of devices in a tensor of all.
  """
  read = []
  rows_of = weights.Files.rows

  def counted(self, name, rows):
    if "experts" in name:
      read.append((name, rows.start))
    return rows_of(self, name, rows)

  monkeypatch.setattr(weights.Files, "rows", counted)
  mesh = mesh_cases.make_mesh((1, 1, 4, 1))
  hf.load(parity.FOLDER / name, mesh)
  assert len(read) == len(set(read)) == reads


def test_bfloat16(tmp_path):
  model, variables = hf.load(parity.FOLDER / "olmoe_a", dtype="bfloat16")
  assert {x.dtype.name for x in jax.tree.leaves(variables)} == {"bfloat16"}
  hf.save(tmp_path / "half", model, variables)
  found = tensors(tmp_path / "half")
  assert {x.dtype.name for x in found.values()} == {"bfloat16"}
  again, same = hf.load(tmp_path / "half", dtype="bfloat16")
  assert again.arch == model.arch
  for leaf, value in flat(variables).items():
    np.testing.assert_array_equal(flat(same)[leaf], value)


def test_a_model_that_nobody_else_has_is_not_saved(tmp_path):
  model, variables = hf.load(parity.FOLDER / "mixtral_a")
  with pytest.raises(
    ConfigError, match="qwen3_moe: attention.qk_norm of layer 0 is"
  ):
    hf.save(tmp_path / "x", model, variables, model_type="qwen3_moe")
  model, variables = preset("deepseek_moe")
  with pytest.raises(ConfigError, match="no supported family can hold"):
    hf.save(tmp_path / "x", model, variables)
  assert not (tmp_path / "x").exists()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").touch()
  model, variables = hf.load(parity.FOLDER / "mixtral_a")
  with pytest.raises(ConfigError, match="not an empty folder"):
    hf.save(tmp_path / "full", model, variables)
  with pytest.raises(ConfigError, match='did you mean "mixtral"'):
    hf.save(tmp_path / "x", model, variables, model_type="mixtrall")


SAVED = [
  ("mixtral", "mixtral"),
  ("llama4", "llama4_text"),
  ("dbrx", "dbrx"),
  ("deepseek_v3", "deepseek_v3"),
  ("olmoe", "olmoe"),
  ("qwen3_moe", "qwen3_moe"),
  ("gpt_oss", "gpt_oss"),
]


@pytest.mark.parametrize(
  "name,model_type", tiers.only(SAVED[:1], SAVED, several=True)
)
def test_what_we_train_can_be_saved(name, model_type, tmp_path):
  """A preset is the family that has its name, and comes back the same."""
  model, variables = preset(name)
  hf.save(tmp_path / "out", model, variables)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["model_type"] == model_type
  again, found = hf.load(tmp_path / "out")
  # Layers may be another prefix and pattern of the same list.
  assert again.arch.layers == model.arch.layers
  tokens = np.random.default_rng(1).integers(0, 256, (2, 32))
  one, other = LOGITS(model, variables, tokens), LOGITS(again, found, tokens)
  np.testing.assert_array_equal(one, other)


# Bad input: one sentence, and nothing is loaded.


@pytest.fixture
def copy(tmp_path):
  """A copy of a checkpoint in several files."""
  model, variables = hf.load(parity.FOLDER / "qwen2_moe_b")
  path = tmp_path / "model"
  hf.save(path, model, variables, max_shard_bytes=8_000)
  assert len(list(path.glob("*.safetensors"))) > 2
  return path


def refused(path, *words):
  with pytest.raises(ConfigError) as caught:
    hf.load(path)
  text = str(caught.value)
  assert "\n" not in text
  for word in words:
    assert word in text, text


def edit(path, **fields):
  config = json.loads(path.read_text()) | fields
  path.write_text(json.dumps(config))


def first(path):
  return sorted(path.glob("*.safetensors"))[0]


def test_files_that_are_not_whole(copy):
  file = first(copy)
  whole = file.read_bytes()
  file.write_bytes(whole[:-100])
  refused(copy, file.name, "no whole safetensors file")
  file.write_bytes(whole[:5])
  refused(copy, file.name)
  file.write_bytes(struct.pack("<Q", 2**60) + whole[8:])  # A huge header.
  refused(copy, file.name, "no whole safetensors file")
  file.write_bytes(struct.pack("<Q", 10**8 + 1) + whole[8:])
  refused(copy, file.name)
  file.unlink()
  refused(copy, file.name, "missing")
  file.write_bytes(whole)
  hf.load(copy)


def test_an_index_that_is_wrong(copy):
  path = copy / "model.safetensors.index.json"
  whole = path.read_text()
  index = json.loads(whole)
  name = sorted(index["weight_map"])[0]
  for outside in ("../secret.safetensors", "/etc/passwd", "a/b", "..\\x", ".."):
    index["weight_map"][name] = outside
    path.write_text(json.dumps(index))
    refused(copy, path.name, name, "not a file of this folder")
  index["weight_map"][name] = sorted(copy.glob("*.safetensors"))[-1].name
  path.write_text(json.dumps(index))
  refused(copy, "lacks", name)
  for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
    path.write_text(text)
    refused(copy, path.name)
  path.unlink()
  refused(copy, "neither")


def test_tensors_that_do_not_fit(copy):
  from safetensors.numpy import load_file, save_file

  name = "model.layers.3.mlp.experts.1.up_proj.weight"
  files = {f: load_file(f) for f in copy.glob("*.safetensors")}
  file, whole = next((f, w) for f, w in files.items() if name in w)

  def write(**changed):
    found = {k: v for k, v in {**whole, **changed}.items() if v is not None}
    save_file(found, file)

  write(**{name: whole[name][:-1]})
  refused(copy, file.name, name, "has shape")
  write(**{name: whole[name].astype(np.int32)})
  refused(copy, file.name, name, "dtype I32")
  for name in ("model.layers.1.mlp.strange.weight", "model.layers.9.x"):
    write(**{name: np.zeros(3, np.float32)})
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file.name
    kept = (copy / "model.safetensors.index.json").read_text()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, "unknown", name)
    (copy / "model.safetensors.index.json").write_text(kept)


def test_missing_tensors_are_listed(tmp_path):
  from safetensors.numpy import load_file, save_file

  shutil.copytree(parity.FOLDER / "mixtral_a", tmp_path / "m")
  file = tmp_path / "m" / "model.safetensors"
  whole = load_file(file)
  gone = [n for n in whole if "layers.1.block_sparse_moe.experts.3" in n]
  save_file({k: v for k, v in whole.items() if k not in gone}, file)
  refused(tmp_path / "m", "lacks 3 tensors", *gone)


@pytest.mark.parametrize(
  "fields,words",
  [
    ({"model_type": "mixtrall"}, ["mixtrall", 'did you mean "mixtral"']),
    ({"model_type": None}, ["model_type = None"]),
    ({"model_type": ["mixtral"]}, ["model_type = ['mixtral']"]),
    ({"hidden_act": "gelu"}, ["config.json", "hidden_act = 'gelu'"]),
    ({"new_trick": 3}, ["config.json", "new_trick = 3"]),
    ({"num_local_experts": 4}, ["unknown"]),
    ({"num_local_experts": 6}, ["lacks"]),
    ({"hidden_size": 21}, ["has shape"]),
    (
      {
        "rope_parameters": {
          "rope_type": "longrope",
          "rope_theta": 1.0,
          "factor": 2,
          "original_max_position_embeddings": 3,
        }
      },
      ["longrope", "default, linear, yarn, llama3"],
    ),
    ({"quantization_config": {"quant_method": "fp8"}}, ["fp8", "bfloat16"]),
    ({"quantization_config": "fp8"}, ["fp8", "bfloat16"]),
    ({"num_experts_per_tok": 6}, ["top_k = 6"]),
    ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "room for: 47"]),
    ({"num_local_experts": 10**9}, ["experts = 1000000000", "room"]),
    ({"hidden_size": 10**30}, ["hidden_size", "is not a whole number"]),
    ({"hidden_size": "20"}, ["hidden_size", "is not a whole number"]),
    ({"rms_norm_eps": True}, ["rms_norm_eps", "is not a number"]),
    ({"num_attention_heads": 0}, ["num_attention_heads", "less than 1"]),
    ({"rope_parameters": [3]}, ["rope_parameters", "is not an object"]),
    ({"eos_token_id": "</s>"}, ["eos_token_id", "is no token"]),
  ],
)
def test_configs_that_do_not_fit(tmp_path, fields, words):
  shutil.copytree(parity.FOLDER / "mixtral_a", tmp_path / "m")
  edit(tmp_path / "m" / "config.json", **fields)
  refused(tmp_path / "m", *words)


def test_configs_that_are_none(tmp_path):
  refused(tmp_path, "no config.json")
  deep = "[" * 100_000
  for text in ("{", "[]", "3", deep, '{"a": NaN}', "\xff"):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refused(tmp_path, "config.json", "is not the config of a model")
  shutil.copytree(parity.FOLDER / "mixtral_a", tmp_path / "m")
  path = tmp_path / "m" / "generation_config.json"
  path.write_text("[3]")
  refused(tmp_path / "m", "generation_config.json")
  path.write_text('{"eos_token_id": [2, "x"]}')
  refused(tmp_path / "m", "generation_config.json", "eos_token_id")


def test_float8_is_refused_by_name(tmp_path):
  import ml_dtypes
  from safetensors.numpy import load_file, save_file

  shutil.copytree(parity.FOLDER / "deepseek_v3_b", tmp_path / "m")
  file = tmp_path / "m" / "model.safetensors"
  whole = load_file(file)
  name = "model.layers.0.mlp.experts.0.up_proj.weight"
  whole[name] = whole[name].astype(ml_dtypes.float8_e4m3fn)
  save_file(whole, file)
  refused(tmp_path / "m", file.name, name, "F8_E4M3")


def test_layers_that_predict_more_tokens_are_left_out_and_listed(
  tmp_path, caplog
):
  from safetensors.numpy import load_file, save_file

  shutil.copytree(parity.FOLDER / "deepseek_v3_b", tmp_path / "m")
  file = tmp_path / "m" / "model.safetensors"
  whole = load_file(file)
  whole["model.layers.2.eh_proj.weight"] = np.zeros((3, 3), np.float32)
  save_file(whole, file)
  edit(tmp_path / "m" / "config.json", num_nextn_predict_layers=1)
  hf.load(tmp_path / "m")
  assert (
    "1 tensors are left out" in caplog.text
    and "layers.2.eh_proj" in caplog.text
  )


def test_text_out_of_a_model_with_vision(tmp_path, caplog):
  from safetensors.numpy import load_file, save_file

  shutil.copytree(parity.FOLDER / "llama4_text_b", tmp_path / "m")
  file = tmp_path / "m" / "model.safetensors"
  whole = {f"language_model.{k}": v for k, v in load_file(file).items()}
  whole["vision_model.class_embedding"] = np.zeros(3, np.float32)
  save_file(whole, file)
  path = tmp_path / "m" / "config.json"
  text = json.loads(path.read_text())
  config = {
    "model_type": "llama4",
    "text_config": text,
    "vision_config": {"a": 1},
  }
  path.write_text(json.dumps(config))
  _, found = hf.load(tmp_path / "m")
  assert "vision_model.class_embedding" in caplog.text
  _, wanted = hf.load(parity.FOLDER / "llama4_text_b")
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("name", ["deepseek_v3_a", "gpt_oss_a", "dbrx_a"])
def test_fields_as_they_were_called_before(name, tmp_path):
  """rope_theta and rope_scaling, as published folders have them."""
  shutil.copytree(parity.FOLDER / name, tmp_path / "m")
  path = tmp_path / "m" / "config.json"
  config = json.loads(path.read_text())
  rope = config.pop("rope_parameters")
  theta = rope.pop("rope_theta")
  if "attn_config" in config:
    assert config["attn_config"]["rope_theta"] == theta
  else:
    rope["type"] = rope.pop("rope_type")
    config |= {"rope_theta": theta, "rope_scaling": rope}
  path.write_text(json.dumps(config))
  model, _ = hf.load(tmp_path / "m")
  assert model.arch == hf.load(parity.FOLDER / name)[0].arch


def test_patterns_are_found():
  """The listing with the fewest names is found, among all that fit."""
  listed = rows.listed(["dense"] + ["moe", "moe@x"] * 3)
  assert listed == {"prefix": ("dense",), "pattern": ("moe", "moe@x")}
  assert rows.listed(["a"] * 5) == {"prefix": (), "pattern": ("a",)}
  rng = np.random.default_rng(0)
  for length in rng.integers(1, 12, 60):
    kinds = rng.choice(["a", "b"], length).tolist()
    listed = rows.listed(kinds)
    prefix, pattern = (list(listed[key]) for key in ("prefix", "pattern"))
    repeats = (length - len(prefix)) // len(pattern)
    assert prefix + repeats * pattern == kinds
    fewest = min(
      n + m
      for n in range(length)
      for m in range(1, length - n + 1)
      if kinds[:n] + (length - n) // m * kinds[n : n + m] == kinds
    )
    assert len(prefix) + len(pattern) == fewest
  assert len(rows.listed(["moe", "dense"] * 50_000)["pattern"]) == 2


def preset(name):
  """(model, random variables) of a preset's variant tiny."""
  c = importlib.import_module(f"configs.{name}").get_config("tiny").model
  c = models.dropless(c.to_dict())
  model = models.build(c, vocab_size=288, end_of_document=256)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), np.zeros((1, 32), np.int32))
  )
  rng = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    nn.unbox(shapes),
  )


def test_the_routing_report_of_published_weights(tmp_path, capsys):
  """Our metrics and shares of experts; without a tokenizer of bytes."""
  hf.save(tmp_path / "m", *preset("olmoe"))
  flags = [f"--hf={tmp_path / 'm'}", "--dataset=python_sources"]
  flags += ["--seq_len=32", "--batches_per_domain=2", "--batch_size=4"]
  with pytest.raises(ConfigError, match="no eos_token_id"):
    evaluate.main(flags)
  edit(tmp_path / "m" / "config.json", eos_token_id=[256, 3])
  assert evaluate.main([*flags, f"--json={tmp_path / 'out.json'}"]) == 0
  printed = capsys.readouterr().out
  found = json.loads((tmp_path / "out.json").read_text())
  metrics, shares = found["metrics"], found["shares"]
  assert metrics["dropped"] == 0 and metrics["loss"] > 0
  assert {row["domain"] for row in shares} == {"code", "docstrings"}
  of_one = [row for row in shares if row["domain"] == "code"]
  assert [(row["layer"], row["expert"]) for row in of_one] == [
    ("00", e) for e in range(8)
  ]
  assert abs(sum(row["share"] for row in of_one) - 1) < 1e-6
  best = max(of_one, key=lambda row: row["share"])
  assert f"{best['expert']}: {100 * best['share']:.0f} %" in printed
  # On a mesh it is the same.
  spread = [*flags, f"--json={tmp_path / 'mesh.json'}", "--mesh=(1,2,2,-1)"]
  assert evaluate.main(spread) == 0
  capsys.readouterr()
  again = json.loads((tmp_path / "mesh.json").read_text())
  assert again["metrics"] == pytest.approx(metrics, rel=1e-5, abs=1e-6)
  assert len(again["shares"]) == len(shares)
  with pytest.raises(ConfigError, match="make --batch_size a multiple of 4"):
    evaluate.main([*spread, "--batch_size=6"])
  with pytest.raises(SystemExit):
    evaluate.main([*flags, "--mesh=expert"])
  assert "is not four whole numbers" in capsys.readouterr().err
  # MaxVio is that of these shares.
  assert abs(metrics["max_vio_global/code"] - (8 * best["share"] - 1)) < 1e-5
