"""Published encoder-decoders: the reference's logits and texts, in and out.

`python -m tests.parity` made the files, see `tests.hf_pairs`.
"""

import dataclasses
import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import configs.nllb_moe
import configs.switch
from moe_jax import evaluate, hf, models
from moe_jax.core.errors import ConfigError
from moe_jax.hf import architecture, config
from moe_jax.hf.families import nllb_moe, switch_transformers
from moe_jax.models import counts
from moe_jax.models.encoder_decoder import Text
from moe_jax.models.generation import beam, decoding
from moe_jax.training import trained
from tests import hf_pairs, mesh_cases, parity, tiers

NAMES = sorted(hf_pairs.cases())
ONE_A_FAMILY = [
  "nllb_moe_b",
  "switch_transformers_a",
  "t5_b",
]  # Their slots run out.
APPLY = jax.jit(
  lambda model, variables, *texts: model.apply(variables, *texts),
  static_argnums=0,
)


def expected(name):
  with np.load(parity.FOLDER / name / "expected.npz") as file:
    return dict(file)


def random_variables(model, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    nn.unbox(models.variables(model)),
  )


def dropped(aux):
  """Assignments without a slot, in all layers."""
  found = traverse_util.flatten_dict(aux, sep="/")
  stats = [x for path, x in found.items() if path.endswith("stats")]
  return sum(int(x.dropped["capacity"].sum()) for x in stats)


def tensors(folder):
  """All tensors of a folder, by the library alone."""
  return {
    k: x for f in folder.glob("*.safetensors") for k, x in load_file(f).items()
  }


DROPPED = {
  "nllb_moe_a": False,
  "nllb_moe_b": True,
  "nllb_moe_c": True,
  "nllb_moe_d": True,
  "switch_transformers_a": True,
  "switch_transformers_b": False,
  "switch_transformers_c": True,
  "t5_a": False,
  "t5_b": False,
}


@pytest.mark.parametrize("name", tiers.only(ONE_A_FAMILY, NAMES))
def test_the_references_logits_and_files(name, tmp_path):
  """Logits, with padding and without, and every tensor written back."""
  model, variables = hf.load(parity.FOLDER / name)
  want = expected(name)
  texts = [Text(want[side]) for side in ("inputs", "targets")]
  logits, aux = APPLY(model, variables, *texts)
  assert np.abs(want["logits"]).max() > 1
  np.testing.assert_allclose(logits, want["logits"], atol=1e-4, rtol=0)
  assert (dropped(aux) > 0) == DROPPED[name]
  # What stands in padding does not matter here.
  texts = [Text(want[x], want[f"{x}_mask"]) for x in ("inputs", "targets")]
  logits, _ = APPLY(model, variables, *texts)
  real = want["targets_mask"]
  np.testing.assert_allclose(
    logits[real], want["logits_padded"][real], atol=1e-4, rtol=0
  )
  hf.save(tmp_path / "copy", model, variables, max_shard_bytes=9_000)
  one, other = (tensors(p) for p in (parity.FOLDER / name, tmp_path / "copy"))
  assert one.keys() == other.keys()
  for tensor in one:
    np.testing.assert_array_equal(other[tensor], one[tensor], err_msg=tensor)
  again, same = hf.load(tmp_path / "copy")
  assert again.arch == model.arch
  assert again.arch.source.ends == (want["eos"],)
  assert again.arch.source.start == want["start"]
  jax.tree.map(np.testing.assert_array_equal, same, variables)


@pytest.mark.parametrize("name", tiers.only(["switch_transformers_a"], NAMES))
def test_the_references_texts(name):
  """Greedy texts and those of a beam search, token for token."""
  model, variables = hf.load(parity.FOLDER / name)
  want = expected(name)
  prompts = [
    row[mask].tolist() for row, mask in zip(want["inputs"], want["inputs_mask"])
  ]
  options = {"ends": model.arch.source.ends, "start": [model.arch.source.start]}
  names = ("num_beams", "length_penalty", "early_stopping")
  search = beam.Beams(**{k: want[k].item() for k in names})
  for key, beams in (("greedy", None), ("beam4", search)):
    made = decoding.generate(
      *(model, variables, prompts, hf_pairs.NEW_TOKENS), **options, beams=beams
    )
    found = np.full_like(want[key], -1)
    found[:, : made.tokens_BN.shape[1]] = made.tokens_BN
    np.testing.assert_array_equal(found, want[key], err_msg=key)
  np.testing.assert_allclose(made.score_B, want["beam4_score"], atol=1e-4)


def test_some_beams_end_and_others_do_not():
  ended = [(expected(name)["beam4"] < 0).any() for name in NAMES]
  assert any(ended) and not all(ended)


@pytest.mark.parametrize(
  "name", tiers.only(["nllb_moe_c"], ["nllb_moe_c", "switch_transformers_b"])
)
def test_loading_onto_a_mesh(name):
  sizes = (1, 2, 2, 1) if name == "nllb_moe_c" else (2, 1, 1, 1)
  mesh = mesh_cases.make_mesh(sizes)
  model, variables = hf.load(parity.FOLDER / name, mesh)
  want = expected(name)
  rows = 2 * mesh.size // 2
  texts = [
    Text(np.resize(want[side], (rows, want[side].shape[1])))
    for side in ("inputs", "targets")
  ]
  logits, _ = APPLY(model, variables, *texts)
  np.testing.assert_allclose(logits[:2], want["logits"], atol=1e-4, rtol=0)


def test_bfloat16(tmp_path):
  model, variables = hf.load(parity.FOLDER / "nllb_moe_a", dtype="bfloat16")
  hf.save(tmp_path / "half", model, variables)
  found = tensors(tmp_path / "half")
  assert {x.dtype.name for x in found.values()} == {"bfloat16"}
  again, same = hf.load(tmp_path / "half", dtype="bfloat16")
  assert again.arch == model.arch
  jax.tree.map(np.testing.assert_array_equal, same, variables)


# Fields.


def read(model_type, **fields):
  fields = {"model_type": model_type, **fields}
  return config.read(fields, "config.json")[1]


@pytest.mark.parametrize(
  "count,sparse,layers",
  [
    (12, 6, "dmdmdmdmdmdm"),
    (12, 3, "dmdddmdddmdd"),
    (3, 1, "dmd"),
    (4, 3, "mmmm"),
    (2, 0, "dm"),
    (1, 0, "m"),
    (1, 1, "m"),
    (2, 3, "dd"),
  ],
)
def test_the_sparse_layers_of_switch(count, sparse, layers):
  """Layers with experts are where the reference's class places them."""
  options = {"num_layers": count, "num_sparse_encoder_layers": sparse}
  ours = read("switch_transformers", **options)
  assert "".join(kind[0] for kind in ours["encoder.layers"]) == layers
  model = architecture.build(ours, "config.json")
  _, fields = config.write(model.arch, "switch_transformers")
  again = read(**fields)
  assert again["encoder.layers"] == ours["encoder.layers"]
  assert again["layers"] == ours["layers"]
  if layers.count("m") == sparse:
    assert fields["num_sparse_encoder_layers"] == sparse


def test_small_models_of_presets_can_be_saved():
  """NLLB's as they train, as evaluation drops nothing; Switch's dropless."""
  section = configs.nllb_moe.get_config("tiny").model.to_dict()
  family, _ = config.write(models.build(section, vocab_size=288).arch, None)
  assert family.model_type == "nllb-moe"
  section = configs.switch.get_config("tiny").model.to_dict()
  with pytest.raises(ConfigError, match="capacity_factor"):
    config.write(models.build(section, vocab_size=288).arch, None)
  section = models.dropless(section)
  family, _ = config.write(models.build(section, vocab_size=288).arch, None)
  assert family.model_type == "switch_transformers"


def test_the_step_of_switch_counts_more():
  ours = read("switch_transformers", encoder_sparse_step=1)
  assert ours["encoder.layers"] == ["moe"] * 12
  assert ours["layers"] == ["dense", "moe", "dense", "dense"] * 3


@pytest.mark.parametrize("step,layers", [(0, "ddd"), (1, "mmm"), (2, "dmd")])
def test_the_sparse_layers_of_nllb(step, layers):
  ours = read("nllb-moe", decoder_layers=3, decoder_sparse_step=step)
  assert "".join(kind[0] for kind in ours["layers"]) == layers
  model = architecture.build(ours, "config.json")
  _, fields = config.write(model.arch, None)
  assert read(**fields)["layers"] == ours["layers"]


@pytest.mark.parametrize(
  "model_type,fields,wanted",
  [
    (
      "switch_transformers",
      {"num_decoder_layers": None, "num_layers": 5},
      {"num_layers": 5, "encoder.num_layers": 5},
    ),
    (
      "switch_transformers",
      {"num_hidden_layers": 4},
      {"encoder.num_layers": 4},
    ),
    (
      "switch_transformers",
      {"tie_word_embeddings": False},
      {"tie_embeddings": False, "scale_output": False},
    ),
    (
      "nllb-moe",
      {
        "moe_eval_capacity_token_fraction": 0.3,
        "normalize_router_prob_before_dropping": True,
        "batch_prioritized_routing": True,
        "num_experts": 7,
      },
      {"moe.capacity_rounding": "ceil", "moe.router.priority": "score"},
    ),
    (
      "nllb-moe",
      {
        "moe_eval_capacity_token_fraction": -1,
        "normalize_router_prob_before_dropping": True,
        "expert_capacity": 9,
      },
      {"moe.capacity": 9},
    ),
  ],
)
def test_fields_there_and_back(model_type, fields, wanted):
  """A config that was read and written is read as the same."""
  ours = read(model_type, **fields)
  assert {key: ours[key] for key in wanted} == wanted
  arch = architecture.build(ours, "config.json").arch
  _, written = config.write(arch, None)
  for key in fields.keys() & written.keys():
    assert fields[key] in (written[key], None), key
  assert architecture.build(read(**written), "config.json").arch == arch


@pytest.mark.parametrize(
  "model_type,fields,words",
  [
    ("switch_transformers", {"dense_act_fn": "gated-gelu"}, "'gated-gelu'"),
    ("switch_transformers", {"dense_act_fn": "gelu"}, "dense_act_fn = 'gelu'"),
    ("switch_transformers", {"router_dtype": "bfloat16"}, "router_dtype"),
    ("switch_transformers", {"expert_capacity": 0}, "expert_capacity = 0"),
    ("switch_transformers", {"num_decoder_layers": 0}, "num_decoder_layers"),
    ("switch_transformers", {"d_ff": "9"}, "d_ff = '9'"),
    ("switch_transformers", {"new_trick": 3}, "new_trick = 3"),
    ("switch_transformers", {"num_selected_experts": 2}, "num_selected_expert"),
    (
      "nllb-moe",
      {"router_ignore_padding_tokens": True},
      "router_ignore_padding",
    ),
    ("t5", {"feed_forward_proj": "gelu"}, "feed_forward_proj = 'gelu'"),
    ("t5", {"expert_capacity": 4}, "expert_capacity = 4"),
    ("nllb-moe", {"second_expert_policy": "random"}, "second_expert_policy"),
    ("nllb-moe", {"pad_token_id": 0}, "pad_token_id = 0"),
    ("nllb-moe", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("nllb-moe", {"decoder_attention_heads": 3}, "does not divide d_model"),
    ("nllb-moe", {"encoder_sparse_step": -1}, "encoder_sparse_step"),
    ("nllb-moe", {"activation_function": "swish"}, "activation_function"),
    ("nllb-moe", {"decoder_start_token_id": "x"}, "decoder_start_token_id"),
  ],
)
def test_values_that_are_not_supported_are_named(model_type, fields, words):
  with pytest.raises(ConfigError) as caught:
    read(model_type, **fields)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_chance_that_is_none():
  ours = read("nllb-moe", moe_token_dropout=1)
  with pytest.raises(ConfigError, match="output_masking = 1.0"):
    architecture.build(ours, "config.json")


SIZES = {
  # google-t5/t5-base, and google/t5-v1_1-base.
  "t5": (
    {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    222_903_552,
  ),
  "t5 1.1": (
    {
      **{"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
      **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    },
    247_577_856,
  ),
  # The dimensions of google/switch-base-8 and of facebook/nllb-moe-54b.
  "switch_transformers": (
    {
      "d_ff": 3072,
      "num_sparse_encoder_layers": 6,
      "num_sparse_decoder_layers": 6,
    },
    619_339_008,
  ),
  "nllb-moe": (
    {
      **{"vocab_size": 256_206, "d_model": 2048, "encoder_ffn_dim": 8192},
      **{"encoder_layers": 24, "decoder_layers": 24, "decoder_ffn_dim": 8192},
    },
    54_500_569_088,
  ),
}


@pytest.mark.parametrize("model_type", SIZES)
def test_published_sizes(model_type):
  fields, wanted = SIZES[model_type]
  family = model_type.split()[0]
  model = architecture.build(read(family, **fields), "config.json")
  assert counts.count(model, models.variables(model))["total"] == wanted


# Folders.


@pytest.fixture(params=["nllb_moe_a", "switch_transformers_b"])
def folder(request, tmp_path):
  """A copy of a checkpoint, and a function that changes its tensors."""
  path = tmp_path / "m"
  shutil.copytree(parity.FOLDER / request.param, path)
  file = path / "model.safetensors"

  def change(names=lambda name: name, **tensors):
    whole = {names(k): x for k, x in load_file(file).items()}
    found = {k: x for k, x in (whole | tensors).items() if x is not None}
    save_file(found, file)

  return path, change


def refused(path, *words):
  with pytest.raises(ConfigError) as caught:
    hf.load(path)
  text = str(caught.value)
  assert "\n" not in text
  for word in words:
    assert word in text, text


def test_copies_of_the_embedding(folder):
  """They may be there, but have its numbers."""
  path, change = folder
  model, _ = hf.load(path)
  before = "model." if model.arch.tie_embeddings else ""
  name = f"{before}encoder.embed_tokens.weight"
  shared = tensors(path)[f"{before}shared.weight"]
  change(**{name: shared, f"{before}decoder.embed_tokens.weight": None})
  hf.load(path)
  change(**{name: shared + 1})
  refused(path, name, "has other numbers than", "one embedding")
  change(**{name: shared[1:]})
  refused(path, name, "has other numbers than")


def test_a_tensor_of_the_first_files_that_nothing_uses(tmp_path):
  shutil.copytree(parity.FOLDER / "t5_a", tmp_path / "m")
  file = tmp_path / "m" / "model.safetensors"
  place = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias"
  unused = {f"{place}.weight": np.ones((32, 3), np.float32)}
  save_file(load_file(file) | unused, file)
  _, found = hf.load(tmp_path / "m")
  _, wanted = hf.load(parity.FOLDER / "t5_a")
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_missing_and_unknown_tensors(folder):
  path, change = folder
  name = next(k for k in tensors(path) if "expert_1" in k and "decoder" in k)
  change(**{name: None})
  refused(path, "lacks 1 tensors", name)
  change(**{name: np.zeros((2, 3), np.float32)})
  refused(path, name, "has shape [2, 3]")
  strange = name.replace("expert_1", "expert_9")
  change(**{strange: np.zeros(3, np.float32)})
  refused(path, "has unknown 1 tensors", strange)


def test_files_of_a_model_without_its_output_layer(tmp_path):
  """Files are like those of the converted, published NLLB-MoE."""
  shutil.copytree(parity.FOLDER / "nllb_moe_a", tmp_path / "m")
  file = tmp_path / "m" / "model.safetensors"
  whole = {k.removeprefix("model."): x for k, x in load_file(file).items()}
  whole["decoder.embed_tokens.weight"] = whole["shared.weight"].copy()
  whole["encoder.embed_positions.weights"] = np.zeros((3, 18), np.float32)
  save_file(whole, file)
  _, found = hf.load(tmp_path / "m")
  _, wanted = hf.load(parity.FOLDER / "nllb_moe_a")
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_special_tokens_that_decide_something(folder, tmp_path):
  path, _ = folder
  (path / "generation_config.json").write_text('{"decoder_start_token_id": 7}')
  model, variables = hf.load(path)
  assert model.arch.source.start == 7
  hf.save(tmp_path / "x", model, variables, extra={"eos_token_id": 4})
  assert hf.load(tmp_path / "x")[0].arch.source.start == 7
  if model.arch.positions == "sinusoidal":
    for name in ("pad_token_id", "moe_token_dropout"):
      with pytest.raises(ConfigError, match=f'extra has "{name}"'):
        hf.save(tmp_path / "y", model, variables, extra={name: 0})


# Models of ours.


def preset(name, **moe):
  """(model, random variables) of a preset's variant tiny, as wide everywhere.

  moe: options of all experts.
  """
  c = importlib.import_module(f"configs.{name}").get_config("tiny").model
  c = models.dropless(c.to_dict())
  for part in (c, c["encoder"]):
    part.setdefault("moe", {}).update(moe, d_expert=c["d_ff"])
  model = models.build(c, vocab_size=288)
  return model, random_variables(model)


SAVED = [("switch", "switch_transformers"), ("nllb_moe", "nllb-moe")]


@pytest.mark.parametrize(
  "name,model_type", tiers.only(SAVED[:1], SAVED, several=True)
)
def test_what_we_train_can_be_saved(name, model_type, tmp_path):
  model, variables = preset(name)
  extra = {"decoder_start_token_id": 256, "eos_token_id": 256}
  hf.save(tmp_path / "out", model, variables, extra=extra)
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert fields["model_type"] == model_type
  again, found = hf.load(tmp_path / "out")
  assert again.arch.decoder.layers == model.arch.decoder.layers
  rng = np.random.default_rng(1)
  texts = [Text(rng.integers(0, 256, (2, n))) for n in (20, 12)]
  one, aux = APPLY(model, variables, *texts)
  other, _ = APPLY(again, found, *texts)
  np.testing.assert_array_equal(one, other)
  assert dropped(aux) == 0
  # Without a tokenizer tokens are bytes.
  loaded = trained.published(str(tmp_path / "out"))
  assert (loaded.start, loaded.ends) == ((256,), (256,))
  flags = [f"--hf={tmp_path / 'out'}", "--dataset=python_sources"]
  with pytest.raises(ConfigError, match="is of an encoder-decoder"):
    evaluate.main(flags)
  # A config names the task, whose tokens are those of the files.
  (tmp_path / "train.jsonl").write_text(
    "".join(
      json.dumps({"text": f"{i} sour grapes."}) + "\n" for i in range(400)
    )
  )
  flags = [f"--hf={tmp_path / 'out'}", f"--json={tmp_path / 'json'}"]
  flags += ["--dataset=mine", f"--data_dir={tmp_path}", "--seq_len=24"]
  flags += ["--config=configs/switch.py:tiny", "--batches_per_domain=1"]
  flags += [f"--config.data.cache_dir={tmp_path / 'cache'}"]
  with pytest.raises(ConfigError, match="task.sentinels is not given"):
    evaluate.main(flags)
  flags += ["--config.task.sentinels=(257, 1)"]
  assert evaluate.main(flags) == 0
  told = json.loads((tmp_path / "json").read_text())
  assert 4 < -told["metrics"]["neg_log_perplexity"] < 20
  for more, words in {
    "--config.task.sentinels=(400, -1)": "401 tokens, and the model knows 288",
    "--config.model.d_model=8": "model.d_model=8 has no effect on published",
    "--config.data.seq_len=x": "data.seq_len = 'x' is not",
    "--config=configs/base.py": "next_token has no end and start",
    "--dropless": "--dropless is of a run",
    "--bleu=3": "--bleu is for the task translation",
  }.items():
    with pytest.raises(ConfigError, match=words):
      evaluate.main([*flags, more])


def test_slots_are_a_part_of_what_is_saved(tmp_path):
  slots = {"capacity": 3, "dispatcher": {"name": "gather", "order": "token"}}
  model, variables = preset("switch", **slots)
  hf.save(tmp_path / "x", model, variables)
  again, _ = hf.load(tmp_path / "x")
  for parts in again.sublayers.values():
    assert parts.grouping.capacity == 3
  slots = {"capacity_factor": 2.0, "dispatcher": {"name": "gather"}}
  model, variables = preset("switch", **slots)
  with pytest.raises(ConfigError, match="not capacity_factor = 2.0; build the"):
    hf.save(tmp_path / "y", model, variables)
  slots = {"capacity": 3, "dispatcher": {"name": "gather", "order": "token"}}
  model, variables = preset("nllb_moe", **slots)
  with pytest.raises(ConfigError, match="order of encoder layer . is token"):
    hf.save(tmp_path / "y", model, variables)


def test_a_model_that_nobody_else_has_is_not_saved(tmp_path):
  model, variables = hf.load(parity.FOLDER / "switch_transformers_b")
  with pytest.raises(ConfigError) as caught:
    hf.save(tmp_path / "x", model, variables, model_type="mixtral")
  words = "model.name = decoder, and this one is of encoder_decoder"
  assert words in str(caught.value)
  decoder = hf.load(parity.FOLDER / "mixtral_a")
  with pytest.raises(ConfigError) as caught:
    hf.save(tmp_path / "x", *decoder, model_type="nllb-moe")
  words = "model.name = encoder_decoder, and this one is of decoder"
  assert words in str(caught.value)
  # Only those with as many stacks are tried.
  arch = dataclasses.replace(model.arch, scale_embedding=True)
  with pytest.raises(ConfigError) as caught:
    hf.save(tmp_path / "x", model.clone(arch=arch), variables)
  text = str(caught.value)
  assert "scale_embedding is True; saved and loaded" in text
  assert "nllb-moe: " in text and "mixtral" not in text
  for family, kinds in ((switch_transformers, "mmd"), (nllb_moe, "mdm")):
    whole = {"m": {"kind": "moe"}, "d": {"kind": "dense"}}
    layers = {"encoder.layers": [whole[x] for x in kinds], "layers": []}
    with pytest.raises(ConfigError, match="the encoder of this model has moe"):
      family._write_layers(layers)


def test_gradients_reach_every_parameter():
  """Training goes on from published weights, with their slots."""
  model, variables = hf.load(parity.FOLDER / "switch_transformers_a")
  want = expected("switch_transformers_a")
  texts = [Text(want[side]) for side in ("inputs", "targets")]

  def loss(params):
    logits, _ = model.apply({"params": params}, *texts, train=True)
    return jnp.square(logits).mean()

  for path, x in traverse_util.flatten_dict(
    jax.jit(jax.grad(loss))(variables["params"])
  ).items():
    assert np.isfinite(x).all() and np.abs(x).max() > 0, path
