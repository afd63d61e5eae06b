"""Llama 4: the decoder, alone or beside its vision, of which nothing is read."""

from moe_jax.core.errors import ConfigError
from moe_jax.hf import families, rows, tensors

_CHUNKED = "chunked_attention"


def _read_layers(fields, ours):
  """Which layers have experts, and which have positions."""
  count = ours["num_layers"]
  step = fields.take("interleave_moe_layer_step", int, 1, least=1)
  sparse = fields.list_of("moe_layers", int, [*range(step - 1, count, step)])
  every = fields.take("no_rope_layer_interval", int, 4, least=1)
  turned = fields.list_of("no_rope_layers", int, [])
  turned = turned or [int((i + 1) % every != 0) for i in range(count)]
  if len(turned) < count:
    raise fields.error("no_rope_layers", turned, f"needs {count} numbers")
  ffns = ["moe" if i in sparse else "dense" for i in range(count)]
  return {"layers": [f"{x}@local" if t else x for x, t in zip(ffns, turned)]}


def _write_layers(ours):
  layers = ours["layers"]
  turned = [int(layer["attention.rope"] != "none") for layer in layers]
  sparse = [i for i, layer in enumerate(layers) if layer["kind"] == "moe"]
  return {"moe_layers": sparse, "no_rope_layers": turned}


def _read_attention(fields, ours):
  """Layers with positions see their own chunk only; in the others queries grow
  with their position."""
  chunk = fields.take("attention_chunk_size", int, 8192, None, least=1)
  near = _CHUNKED if chunk else rows.FULL
  rule = [near if "@" in kind else rows.FULL for kind in ours["layers"]]
  types = rows.types_of_layers(fields, rule, (rows.FULL, _CHUNKED))
  if types != rule:
    reason = "is not supported: it has to be chunked just where positions are"
    raise fields.error("layer_types", types, reason)
  tempered = fields.take("attn_temperature_tuning", bool, True)
  scale = fields.take("attn_scale", float, 0.1)
  length = fields.take("floor_scale", int, 8192, least=1)
  norm = "l2" if fields.take("use_qk_norm", bool, True) else "none"
  local = {"rope": "interleaved", "qk_norm": norm, "chunk": chunk}
  return {
    "attention.rope": "none",
    "attention.temperature": (scale, length, 1) if tempered else None,
    "variants.local": local | {"temperature": None},
  }


def _write_attention(ours):
  names = ("attention.rope", "attention.chunk", "attention.temperature")
  layers = [[layer[name] for name in names] for layer in ours["layers"]]
  types = [_CHUNKED if chunk else rows.FULL for _, chunk, _ in layers]
  grows = [grows for rope, _, grows in layers if rope == "none" and grows]
  scale, length, _ = [*grows, (0.1, 8192, 1)][0]
  return {
    "layer_types": types,
    "attention_chunk_size": ours["attention.chunk"],
    "use_qk_norm": ours["attention.qk_norm"] == "l2",
    "attn_temperature_tuning": bool(grows),
    "attn_scale": scale,
    "floor_scale": length,
  }


_EXPERTS = ("moe/experts/{}", "feed_forward.experts.{}")
TEXT = families.Family(
  "llama4_text",
  "Llama4ForCausalLM",
  rows=(
    *rows.common(202_048, 5120, 48, 40, 1e-5),
    *rows.grouped(kv_heads=8, head_dim=128),
    rows.Rope(theta=500_000.0, longest=131_072),
    rows.BIAS,
    rows.Pair(_read_layers, _write_layers),
    rows.Pair(_read_attention, _write_attention),
    rows.whole("intermediate_size_mlp", "d_ff", 16_384),
    *rows.experts("num_local_experts", 16, 1, "intermediate_size", 8192),
  ),
  tensors=(
    *tensors.ATTENTION,
    *tensors.gated("mlp/{}", "feed_forward.{}.weight"),
    *tensors.maps("{}", "{}", "moe/router/kernel feed_forward.router.weight"),
    *tensors.maps(*_EXPERTS, "gate+up gate_up_proj", tensors.HALVES),
    *tensors.maps(*_EXPERTS, "down down_proj", tensors.SAME),
    *tensors.gated("moe/shared/{}", "feed_forward.shared_expert.{}.weight"),
  ),
  constants={
    "moe.num_shared_experts": 1,
    "moe.router.score": "sigmoid",
    "moe.router.score_before_top_k": False,
    "moe.router.apply_to": "input",
  },
  ends={"bos_token_id": 1, "eos_token_id": 2},
)


def _write_vision(ours):
  raise ConfigError("there is no vision here; save it as llama4_text")


_IMAGES = ("boi_token_index", "eoi_token_index", "image_token_index")
WITH_VISION = TEXT._replace(
  model_type="llama4",
  architecture="Llama4ForConditionalGeneration",
  rows=(*TEXT.rows, rows.Pair(lambda fields, ours: {}, _write_vision)),
  constants={**TEXT.constants, "left_out": ("vision_model.", "multi_modal_")},
  inner="text_config",
  ignored=(*_IMAGES, "vision_config", "tie_word_embeddings"),
  prefix="language_model.",
)
