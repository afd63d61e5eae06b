"""Fields of config.json: absent, null, odd and hostile ones, and those kept.

The values are what the config classes of transformers 5.24 give.
"""

import json
import shutil

import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from configs import base
from moe_jax import hf, models
from moe_jax.core.errors import ConfigError
from moe_jax.hf import architecture, config, families
from moe_jax.moe.routers import top_k
from tests import parity

YARN = {"rope_type": "yarn", "rope_theta": 3000.0, "factor": 4.0}
YARN["original_max_position_embeddings"] = 16


def read(model_type, **fields):
  """Options of ours that a config.json means."""
  fields = {"model_type": model_type, **fields}
  return config.read(fields, "config.json")[1]


ABSENT = {
  "mixtral": {
    **{"vocab_size": 32_000, "d_model": 4096, "num_layers": 32},
    **{"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "norm_eps": 1e-5},
    **{"rope_theta": 1e6, "attention.window": None, "tie_embeddings": False},
    **{"moe.num_experts": 8, "moe.top_k": 2, "moe.d_expert": 14_336},
  },
  "qwen2_moe": {
    **{"num_heads": 16, "num_kv_heads": 16, "norm_eps": 1e-6, "d_ff": 5632},
    **{"moe.num_experts": 60, "moe.top_k": 4, "moe.d_expert": 1408},
    **{"moe.num_shared_experts": 4, "attention.bias": "qkv"},
    **{"moe.router.renormalize": False, "rope_theta": 1e4},
  },
  "qwen3_moe": {
    **{"num_heads": 32, "num_kv_heads": 4, "head_dim": 64, "d_ff": 6144},
    **{"moe.num_experts": 128, "moe.top_k": 8, "moe.d_expert": 768},
    **{"attention.bias": "none", "moe.router.renormalize": False},
  },
  "olmoe": {
    **{"vocab_size": 50_304, "num_kv_heads": 16, "norm_eps": 1e-5},
    **{"moe.num_experts": 64, "moe.top_k": 8, "moe.d_expert": 2048},
    **{"attention.clip": None, "moe.router.renormalize": False},
  },
  "deepseek_v3": {
    **{"num_kv_heads": 128, "head_dim": 128, "d_ff": 18_432},
    **{"attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512},
    **{"attention.rope": "interleaved", "moe.router.scale": 2.5},
    **{"moe.router.num_expert_groups": 8, "moe.router.top_expert_groups": 4},
    **{"moe.router.renormalize": True, "moe.num_shared_experts": 1},
    "layers": ["dense"] * 3 + ["moe"] * 58,
  },
  "dbrx": {
    **{"d_model": 2048, "num_kv_heads": 1, "rope_theta": 1e4},
    **{"moe.num_experts": 4, "moe.top_k": 1, "moe.d_expert": 3584},
    **{"attention.clip": None, "moe.router.renormalize": True},
  },
  "llama4_text": {
    **{"num_heads": 40, "head_dim": 128, "rope_theta": 5e5, "d_ff": 16_384},
    **{"moe.num_experts": 16, "moe.top_k": 1, "moe.d_expert": 8192},
    "attention.temperature": (0.1, 8192, 1),
    "layers": (["moe@local"] * 3 + ["moe"]) * 12,
    **{"variants.local.rope": "interleaved", "attention.rope": "none"},
    **{"variants.local.qk_norm": "l2", "variants.local.chunk": 8192},
    "variants.local.temperature": None,
  },
  "gpt_oss": {
    **{"num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "rope_theta": 150e3},
    **{"moe.num_experts": 128, "moe.top_k": 4, "moe.d_expert": 2880},
    **{"attention.bias": "all", "variants.window.window": 128},
    "layers": ["moe@window", "moe"] * 18,
    "attention.rope_scaling": {
      **{"name": "yarn", "factor": 32.0, "original_length": 4096},
      "truncate": False,
    },
  },
  "deepseek_v2": {
    **{"vocab_size": 102_400, "d_model": 4096, "num_layers": 32},
    **{"num_heads": 32, "head_dim": 128, "d_ff": 11_008, "norm_eps": 1e-6},
    **{"attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512},
    **{"attention.rope_head_dim": 64, "attention.v_head_dim": 128},
    **{"moe.num_experts": 64, "moe.d_expert": 1407, "rope_theta": 1e4},
    **{"moe.num_shared_experts": 2, "moe.router.scale": 1.0},
    **{"moe.router.num_expert_groups": 1, "layers": ["moe"] * 32},
  },
  "glm4_moe": {
    **{"vocab_size": 151_552, "d_model": 4096, "num_layers": 46},
    **{"num_heads": 96, "num_kv_heads": 8, "d_ff": 10_944, "norm_eps": 1e-5},
    **{"attention.bias": "none", "attention.qk_norm": "none"},
    **{"attention.rotary_dim": 21, "rope_theta": 1e4},
    **{"moe.num_experts": 128, "moe.top_k": 8, "moe.d_expert": 1408},
    **{"moe.num_shared_experts": 1, "moe.router.scale": 1.0},
    **{"moe.router.renormalize": True, "moe.router.num_expert_groups": 1},
    "layers": ["dense"] + ["moe"] * 45,
  },
  "ernie4_5_moe": {
    **{"vocab_size": 103_424, "d_model": 2560, "num_layers": 28},
    **{"num_heads": 20, "num_kv_heads": 4, "head_dim": 128, "d_ff": 12_288},
    **{"tie_embeddings": True, "rope_theta": 5e5, "norm_eps": 1e-5},
    **{"moe.num_experts": 64, "moe.top_k": 6, "moe.d_expert": 1536},
    **{"moe.num_shared_experts": 2, "layers": ["dense"] + ["moe"] * 27},
  },
}
ABSENT["switch_transformers"] = {
  **{"name": "encoder_decoder", "vocab_size": 32_128, "d_model": 768},
  **{"num_layers": 12, "encoder.num_layers": 12, "num_heads": 12},
  **{"head_dim": 64, "d_ff": 2048, "moe.d_expert": 2048, "norm_eps": 1e-6},
  **{"moe.num_experts": 8, "moe.top_k": 1, "moe.capacity": 64},
  **{"attention.bias_buckets": 32, "attention.bias_distance": 128},
  **{"tie_embeddings": True, "scale_output": True, "activation": "relu"},
  **{"moe.router.use_bias": False, "attention.position_bias": "shared"},
  "layers": ["dense", "moe", "dense", "dense"] * 3,
  "encoder.layers": ["dense", "moe", "dense", "dense"] * 3,
}
ABSENT["nllb-moe"] = {
  **{"name": "encoder_decoder", "vocab_size": 128_112, "d_model": 1024},
  **{"num_layers": 12, "encoder.num_layers": 12, "num_heads": 16},
  **{"encoder.num_heads": 16, "head_dim": 64, "d_ff": 4096},
  **{"encoder.d_ff": 4096, "moe.d_expert": 4096, "norm": "layer_bias"},
  **{"scale_embedding": True, "positions": "sinusoidal", "norm_eps": 1e-5},
  **{"moe.num_experts": 128, "moe.top_k": 2, "activation": "relu"},
  **{"moe.router.output_masking": 0.2, "moe.router.renormalize": True},
  "layers": ["dense", "dense", "dense", "moe"] * 3,
  "encoder.layers": ["dense", "dense", "dense", "moe"] * 3,
}
ABSENT["llama"] = {
  **{"vocab_size": 32_000, "d_model": 4096, "num_layers": 32, "d_ff": 11_008},
  **{"num_heads": 32, "num_kv_heads": 32, "head_dim": 128, "norm_eps": 1e-6},
  **{"rope_theta": 1e4, "attention.bias": "none", "tie_embeddings": False},
  "layers": ["dense"] * 32,
}
ABSENT["mistral"] = ABSENT["llama"] | {
  **{"num_kv_heads": 8, "d_ff": 14_336, "attention.window": 4096},
}
del ABSENT["mistral"]["attention.bias"]
ABSENT["qwen2"] = ABSENT["llama"] | {
  **{"vocab_size": 151_936, "d_ff": 22_016, "attention.bias": "qkv"},
}
ABSENT["qwen3"] = ABSENT["qwen2"] | {
  **{"attention.bias": "none", "attention.qk_norm": "head"},
}
ABSENT["t5"] = {
  **{"name": "encoder_decoder", "vocab_size": 32_128, "d_model": 512},
  **{"num_layers": 6, "encoder.num_layers": 6, "num_heads": 8},
  **{"head_dim": 64, "d_ff": 2048, "norm_eps": 1e-6, "activation": "relu"},
  **{"attention.bias_buckets": 32, "attention.bias_distance": 128},
  **{"tie_embeddings": True, "scale_output": True},
  **{"layers": ["dense"] * 6, "encoder.layers": ["dense"] * 6},
}
# Moonlight and Kimi K2 are DeepSeek-V3 by another name.
ABSENT["kimi_k2"] = ABSENT["deepseek_v3"]
REQUIRED = {"deepseek_v2": {"num_experts_per_tok": 6}}


@pytest.mark.parametrize("model_type", ABSENT)
def test_absent_fields_have_the_values_of_the_references_class(model_type):
  ours = read(model_type, **REQUIRED.get(model_type, {}))
  wanted = ABSENT[model_type]
  assert {key: ours[key] for key in wanted} == wanted


def test_every_family_says_what_absent_fields_are():
  assert set(ABSENT) == set(families.known()) - {"llama4"}


@pytest.mark.parametrize(
  "model_type,fields,wanted",
  [
    ("mixtral", {"num_key_value_heads": None}, {"num_kv_heads": 32}),
    ("mixtral", {"head_dim": None, "hidden_size": 256}, {"head_dim": 8}),
    ("mixtral", {"rms_norm_eps": None}, {"norm_eps": 1e-5}),
    ("olmoe", {"num_key_value_heads": None}, {"num_kv_heads": 16}),
    ("deepseek_v3", {"q_lora_rank": None}, {"attention.q_lora_rank": None}),
    (
      "deepseek_v3",
      {"norm_topk_prob": None},
      {"moe.router.renormalize": False},
    ),
    ("qwen3_moe", {"mlp_only_layers": None}, {"layers": ["moe"] * 24}),
    ("qwen3_moe", {"num_local_experts": 6}, {"moe.num_experts": 6}),
    (
      "llama4_text",
      {"moe_layers": []},
      {"layers": (["dense@local"] * 3 + ["dense"]) * 12},
    ),
    ("dbrx", {"ffn_config": None}, {"moe.num_experts": 4}),
    (
      "dbrx",
      {"ffn_config": {"moe_normalize_expert_weights": None}},
      {"moe.router.renormalize": False},
    ),
    ("dbrx", {"attn_config": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
    ("gpt_oss", {"rope_theta": 7.0}, {"rope_theta": 7.0}),
    ("mistral", {"sliding_window": None}, {"attention.window": None}),
    (
      "t5",
      {"tie_word_embeddings": False},
      {"tie_embeddings": False, "scale_output": False},
    ),
    (
      "t5",
      {"scale_decoder_outputs": False},
      {"tie_embeddings": True, "scale_output": False},
    ),
  ],
)
def test_null_and_other_names(model_type, fields, wanted):
  ours = read(model_type, **fields)
  assert {key: ours[key] for key in wanted} == wanted


@pytest.mark.parametrize(
  "fields,scaling",
  [
    ({"rope_scaling": None}, None),
    ({"rope_scaling": {}, "rope_parameters": YARN}, {"factor": 4.0}),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, {"factor": 2.0}),
    ({"rope_parameters": YARN | {"factor": None}}, {"factor": 6.0}),
    ({"rope_parameters": YARN | {"truncate": None}}, {"truncate": False}),
    ({"rope_parameters": YARN | {"beta_fast": None}}, {"truncate": True}),
    (
      {"rope_parameters": {"rope_type": "yarn", "factor": 2}},
      {"original_length": 96},
    ),
  ],
)
def test_rope_as_the_reference_reads_it(fields, scaling):
  ours = read("mixtral", max_position_embeddings=96, **fields)
  found = ours["attention.rope_scaling"]
  if scaling is None:
    assert found is None
  else:
    assert found.items() >= scaling.items()
  model = architecture.build(ours, "config.json")
  described = architecture.describe(model.arch)
  assert described["rope_theta"] == ours["rope_theta"]
  assert (described["attention.rope_scaling"] or {}).keys() >= (
    found or {}
  ).keys()


@pytest.mark.parametrize(
  "model_type,fields,words",
  [
    ("mixtral", {"rope_parameters": {"rope_type": "linear"}}, '"factor"'),
    ("mixtral", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("mixtral", {"per_layer_config": {"0": {}}}, "per_layer_config"),
    ("olmoe", {"head_dim": 7}, "head_dim"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 9}, "no multiple"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("dbrx", {"attn_config": [1]}, "attn_config"),
    ("dbrx", {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_act_fn"),
    ("dbrx", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("llama4_text", {"no_rope_layers": [1]}, "no_rope_layers"),
    ("llama4_text", {"layer_types": ["full_attention"] * 48}, "layer_types"),
    ("llama4_text", {"layer_types": "full_attention"}, "layer_types"),
    ("llama4", {"text_config": 3}, "text_config"),
    ("llama4", {"text_config": {"new": 1}}, "text_config has new"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"num_attention_heads": 3}, "does not divide hidden_size"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
    ("gpt_oss", {"layer_types": ["linear_attention"] * 36}, "layer_types"),
  ],
)
def test_values_that_are_not_supported_are_named(model_type, fields, words):
  with pytest.raises(ConfigError) as caught:
    read(model_type, **fields)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_generation_parameters_change_nothing():
  read(
    "mixtral",
    **{"temperature": 1.0, "top_k": 50, "num_beams": 1, "max_length": 20},
    **{"repetition_penalty": 1.0, "rope_scaling": None, "pad_token_id": 0},
    **{"_attn_implementation_autoset": True, "use_cache": True},
    **{"max_sequence_length": 4096, "gradient_checkpointing": True},
  )


def test_a_router_whose_one_weight_is_always_1():
  """It is legal to load, as the weights decide; not to train."""
  with pytest.raises(ConfigError, match="allow_constant_weight"):
    top_k.build(1, renormalize=True)
  model = architecture.build(read("dbrx"), "config.json")
  assert architecture.describe(model.arch)["moe.top_k"] == 1


def test_layers_are_compared_one_by_one():
  """A model whose second layer sees less is not saved as one that has none."""
  ours = read("mixtral", num_hidden_layers=2)
  ours |= {"layers": ["moe", "moe@near"], "variants.near.window": 3}
  model = architecture.build(ours, "config.json")
  with pytest.raises(ConfigError, match="attention.window of layer 1 is 3"):
    config.write(model.arch, "mixtral")


# Folders.


@pytest.fixture
def folder(tmp_path):
  """A copy of a checkpoint, and a function that changes its config.json."""
  path = tmp_path / "m"
  shutil.copytree(parity.FOLDER / "mixtral_a", path)

  def change(**fields):
    values = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(values))

  return path, change


def written(path, name="config.json"):
  return json.loads((path / name).read_text())


def test_what_a_folder_says_beside_is_kept(folder, tmp_path):
  path, change = folder
  change(
    eos_token_id=7, bos_token_id=3, router_aux_loss_coef=0.25, auto_map={"a": 1}
  )
  (path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
  model, variables = hf.load(path)
  assert model.arch.source.ends == (7, 5)
  plain, _ = hf.load(parity.FOLDER / "mixtral_a")
  assert model == plain and hash(model) == hash(plain)
  hf.save(tmp_path / "copy", model, variables)
  copy = written(tmp_path / "copy")
  for name in (
    *("eos_token_id", "bos_token_id", "pad_token_id", "architectures"),
    *("max_position_embeddings", "router_aux_loss_coef", "dtype"),
  ):
    assert copy[name] == written(path)[name], name
  assert "auto_map" not in copy
  generation = written(tmp_path / "copy", "generation_config.json")
  assert generation == {"eos_token_id": [7, 5]}
  extra = {"eos_token_id": 1, "max_position_embeddings": 9}
  hf.save(tmp_path / "more", model, variables, extra=extra)
  assert written(tmp_path / "more").items() >= extra.items()
  generation = written(tmp_path / "more", "generation_config.json")
  assert generation == {"eos_token_id": 1}
  with pytest.raises(ConfigError, match='extra has "hidden_size"'):
    hf.save(tmp_path / "bad", model, variables, extra={"hidden_size": 3})


def test_absent_end_tokens_are_those_of_the_references_class(folder):
  """Ends outside of the vocabulary never come up."""
  path, change = folder
  values = written(path)
  del values["eos_token_id"]
  (path / "config.json").write_text(json.dumps(values))
  assert hf.load(path)[0].arch.source.ends == (2,)
  (path / "generation_config.json").write_text('{"eos_token_id": 9}')
  assert hf.load(path)[0].arch.source.ends == (9,)
  change(eos_token_id=[2, 43, 42])
  assert hf.load(path)[0].arch.source.ends == (2, 42, 9)


def test_end_tokens_inside_of_text_config():
  text = {"eos_token_id": [20, 21]}
  fields = {"model_type": "llama4", "text_config": text}
  _, _, source = config.read(fields, "config.json")
  assert source.ends == (20, 21)


def test_tensors_that_do_no_harm(folder):
  """Buffers of positions, the tied output layer, and tensors of nothing."""
  path, _ = folder
  whole = load_file(path / "model.safetensors")
  more = {
    "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    "model.rotary_emb.cos_cached": np.ones((2, 2), np.float32),
    "model.layers.0.empty.weight": np.zeros((0, 20), np.float32),
  }
  save_file(whole | more, path / "model.safetensors")
  hf.load(path)


def test_sizes_of_shards_are_those_of_their_tensors(folder, tmp_path):
  """Whatever the dtype of the activations is."""
  import dataclasses

  path, _ = folder
  model, variables = hf.load(path)
  arch = dataclasses.replace(model.arch, dtype="bfloat16")
  hf.save(
    tmp_path / "x", model.clone(arch=arch), variables, max_shard_bytes=8000
  )
  assert written(tmp_path / "x")["dtype"] == "float32"
  total = 0
  for file in (tmp_path / "x").glob("*.safetensors"):
    sizes = [x.nbytes for x in load_file(file).values()]
    assert len(sizes) == 1 or sum(sizes) <= 8000
    total += sum(sizes)
  index = written(tmp_path / "x", "model.safetensors.index.json")
  assert index["metadata"]["total_size"] == total


def test_a_model_without_experts(tmp_path):
  """All layers dense, loaded and saved."""
  ours = read(
    "qwen3_moe",
    **{"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 11},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
    **{"intermediate_size": 6, "mlp_only_layers": [0, 1]},
  )
  model = architecture.build(ours, "config.json")
  rng = np.random.default_rng(0)
  variables = random_variables(model, rng)
  hf.save(tmp_path / "x", model, variables)
  again, found = hf.load(tmp_path / "x")
  assert again.arch.layers == ("dense", "dense")
  for tensor in ("query", "out"):
    np.testing.assert_array_equal(
      found["params"]["decoder"]["0"]["attention"][tensor],
      variables["params"]["decoder"]["0"]["attention"][tensor],
    )


def random_variables(model, rng):
  import jax

  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    nn.unbox(models.variables(model)),
  )


@pytest.mark.parametrize(
  "options",
  [
    {"tokens_per_group": 512},
    {"capacity_factor": 0.01, "tokens_per_group": 4096},
    {"capacity_factor": 2.0},
  ],
)
def test_a_model_as_training_builds_it_is_saved(options, tmp_path):
  """Groups and capacity are no part of what a model computes of a token."""
  made = []
  for changed in (models.DROPLESS, options):
    c = base.get_config().model
    c.tie_embeddings = c.scale_embedding = False
    c.update(d_model=8, num_layers=1)
    c.moe.update(changed)
    c.moe.router = {"name": "top_k", "renormalize": True}
    made.append(models.build(c, vocab_size=11))
  variables = random_variables(made[0], np.random.default_rng(0))
  hf.save(tmp_path / "x", made[1], variables)
  _, found = hf.load(tmp_path / "x")
  for part in ("experts", "router"):
    for name, value in found["params"]["decoder"]["0"]["moe"][part].items():
      wanted = variables["params"]["decoder"]["0"]["moe"][part][name]
      np.testing.assert_array_equal(value, wanted)
