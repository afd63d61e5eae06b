"""Llama 2 and 3 (2307.09288, 2407.21783), which are dense; and Llama 4.

The models of Llama 4 are its decoders; their vision parts are not read.
"""

from moe_jax.hf import families, rows, tensors

_CHUNKED = "chunked_attention"


def _read_layers(fields, ours):
  """Reads the layers that have experts, and those that have positions.

  Layers with positions see their own chunk only.
  """
  count = ours["num_layers"]
  step = fields.take("interleave_moe_layer_step", int, 1, least=1)
  sparse = fields.list_of("moe_layers", int, [*range(step - 1, count, step)])
  every = fields.take("no_rope_layer_interval", int, 4, least=1)
  turned = fields.list_of("no_rope_layers", int, [])
  turned = turned or [int((i + 1) % every != 0) for i in range(count)]
  if len(turned) < count:
    raise fields.error("no_rope_layers", turned, f"needs {count} numbers")
  near = _CHUNKED if ours["variants.local.chunk"] else rows.FULL
  rule = [near if t else rows.FULL for t in turned[:count]]
  types = fields.list_of("layer_types", str, rule)
  if types != rule:
    reason = "is not supported: it has to be chunked just where positions are"
    raise fields.error("layer_types", types, reason)
  ffns = ["moe" if i in sparse else "dense" for i in range(count)]
  return {"layers": [f"{x}@local" if t else x for x, t in zip(ffns, turned)]}


def _write_layers(ours):
  layers = ours["layers"]
  chunks = [layer["attention.chunk"] for layer in layers]
  return {
    "layer_types": [_CHUNKED if chunk else rows.FULL for chunk in chunks],
    "moe_layers": [i for i, x in enumerate(layers) if x["kind"] == "moe"],
    "no_rope_layers": [int(x["attention.rope"] != "none") for x in layers],
  }


def _read_temperature(fields, ours):
  """Reads the growth of queries with their position where layers have none."""
  tempered = fields.take("attn_temperature_tuning", bool, True)
  scale = fields.take("attn_scale", float, 0.1)
  length = fields.take("floor_scale", int, 8192, least=1)
  return {"attention.temperature": (scale, length, 1) if tempered else None}


def _write_temperature(ours):
  temperatures = [layer["attention.temperature"] for layer in ours["layers"]]
  temperatures = [*filter(None, temperatures)]
  scale, length, _ = [*temperatures, (0.1, 8192, 1)][0]
  tempered = {"attn_temperature_tuning": bool(temperatures)}
  return {**tempered, "attn_scale": scale, "floor_scale": length}


def _whole_heads(fields, ours):
  """The reference has heads of this width alone, whatever head_dim is."""
  wide, heads = ours["d_model"], ours["num_heads"]
  if wide % heads:
    reason = f"does not divide hidden_size = {wide}"
    raise fields.error("num_attention_heads", heads, reason)
  return {}


LLAMA = families.Family(
  "llama",
  "LlamaForCausalLM",
  rows=(
    *rows.common(32_000, 4096, 32, 32, 1e-6),
    *rows.grouped(rows.heads),
    rows.Rope(theta=1e4, longest=2048),
    rows.BIAS,
    rows.Pair(_whole_heads, lambda ours: {}),
    rows.fixed("mlp_bias", False),
    *rows.dense(11_008),
  ),
  ends={"bos_token_id": 1, "eos_token_id": 2},
)
_L2 = {True: "l2", False: "none"}
_EXPERTS = ("moe/experts/{}", "feed_forward.experts.{}")
TEXT = families.Family(
  "llama4_text",
  "Llama4ForCausalLM",
  rows=(
    *rows.common(202_048, 5120, 48, 40, 1e-5),
    *rows.grouped(kv_heads=8, head_dim=128),
    rows.Rope(theta=500_000.0, longest=131_072),
    rows.BIAS,
    rows.flag("use_qk_norm", "variants.local.qk_norm", True, values=_L2),
    rows.whole("attention_chunk_size", "variants.local.chunk", 8192, null=None),
    rows.Pair(_read_layers, _write_layers),
    rows.Pair(_read_temperature, _write_temperature),
    rows.whole("intermediate_size_mlp", "d_ff", 16_384),
    *rows.experts("num_local_experts", 16, 1, "intermediate_size", 8192),
  ),
  tensors=(
    *tensors.gated("mlp/{}", "feed_forward.{}.weight"),
    *tensors.maps("moe/router/kernel feed_forward.router.weight"),
    *tensors.maps("gate+up gate_up_proj", *_EXPERTS, tensors.HALVES),
    *tensors.maps("down down_proj", *_EXPERTS, tensors.STACKED),
    *tensors.gated("moe/shared/{}", "feed_forward.shared_expert.{}.weight"),
  ),
  constants={
    "attention.rope": "none",
    "variants.local.rope": "interleaved",
    "variants.local.temperature": None,
    "moe.num_shared_experts": 1,
    "moe.router.score": "sigmoid",
    "moe.router.score_before_top_k": False,
    "moe.router.apply_to": "input",
  },
  ends={"bos_token_id": 1, "eos_token_id": 2},
)


_IMAGES = ("boi_token_index", "eoi_token_index", "image_token_index")
WITH_VISION = TEXT._replace(
  model_type="llama4",
  architecture="Llama4ForConditionalGeneration",
  constants={**TEXT.constants, "left_out": ("vision_model.", "multi_modal_")},
  inner="text_config",
  ignored=(*_IMAGES, "vision_config", "tie_word_embeddings"),
  prefix="language_model.",
)
