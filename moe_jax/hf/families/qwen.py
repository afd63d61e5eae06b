"""Qwen2 (2407.10671) and Qwen3 (2505.09388), dense and with experts."""

from moe_jax.hf import families, rows, tensors

_SHARED = "shared_expert_intermediate_size"


def _read_layers(fields, ours):
  count = ours["num_layers"]
  step = fields.take("decoder_sparse_step", int, 1, least=1)
  dense = fields.list_of("mlp_only_layers", int, [])
  sparse = {*range(step - 1, count, step)} - {*dense}
  return {"layers": ["moe" if i in sparse else "dense" for i in range(count)]}


def _write_layers(ours):
  layers = enumerate(ours["layers"])
  dense = [i for i, layer in layers if layer["kind"] == "dense"]
  return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _read_shared(fields, ours):
  wide, each = fields.take(_SHARED, int, 5632), ours["moe.d_expert"]
  if not wide or wide % each:
    reason = f"is no multiple of moe_intermediate_size = {each}"
    raise fields.error(_SHARED, wide, reason)
  return {"moe.num_shared_experts": wide // each, "moe.shared_gate": True}


def _write_shared(ours):
  wide = ours.get("moe.num_shared_experts", 0) * ours.get("moe.d_expert", 0)
  return {_SHARED: wide} if wide else {}


def _common(d_model, layers, num_heads, kv_heads, head_dim=rows.per_head):
  """Rows that all families have, with the defaults of one family."""
  full = lambda ours: [rows.FULL] * ours["num_layers"]  # noqa: E731
  return (
    *rows.common(151_936, d_model, layers, num_heads, 1e-6),
    *rows.grouped(kv_heads, head_dim),
    rows.Rope(theta=1e4, longest=32_768),
    rows.Row(list, "layer_types", default=full, fixed=True),
  )


def _rows(num_heads, kv_heads, d_ff, num_experts, top_k, d_expert):
  """Rows of both families with experts, with the defaults of one family."""
  width = "moe_intermediate_size", d_expert
  return (
    *_common(2048, 24, num_heads, kv_heads),
    rows.whole("intermediate_size", "d_ff", d_ff),
    rows.Pair(_read_layers, _write_layers),
    *rows.experts("num_experts", num_experts, top_k, *width),
    rows.RENORMALIZE,
  )


_QKV = {True: "qkv", False: "none"}
QWEN2 = families.Family(
  "qwen2",
  "Qwen2ForCausalLM",
  rows=(*_common(4096, 32, 32, 32), *rows.dense(22_016)),
  constants={"attention.bias": "qkv"},
  ignored=("sliding_window",),
)
QWEN3 = families.Family(
  "qwen3",
  "Qwen3ForCausalLM",
  rows=(*_common(4096, 32, 32, 32, 128), *rows.dense(22_016), rows.BIAS),
  constants={"attention.qk_norm": "head"},
  ignored=("sliding_window",),
)
QWEN2_MOE = families.Family(
  "qwen2_moe",
  "Qwen2MoeForCausalLM",
  rows=(
    *_rows(16, 16, 5632, 60, 4, 1408),
    rows.flag("qkv_bias", "attention.bias", True, values=_QKV),
    rows.Pair(_read_shared, _write_shared),
  ),
  tensors=(
    *tensors.gated("moe/shared/{}", "mlp.shared_expert.{}.weight"),
    *tensors.maps("moe/shared/token_gate mlp.shared_expert_gate.weight"),
  ),
  ignored=("sliding_window",),
)
QWEN3_MOE = families.Family(
  "qwen3_moe",
  "Qwen3MoeForCausalLM",
  rows=(*_rows(32, 4, 6144, 128, 8, 768), rows.BIAS),
  constants={"attention.qk_norm": "head"},
  ignored=("sliding_window",),
)
