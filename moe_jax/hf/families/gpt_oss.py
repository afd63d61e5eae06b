"""gpt-oss (2508.10925)."""

from moe_jax.hf import families, rows, tensors


def _read_layers(fields, ours):
  """Every second layer sees a window only, unless the layers are listed."""
  count, known = ours["num_layers"], (rows.SLIDING, rows.FULL)
  rule = [known[i % 2] for i in range(count)]
  types = fields.list_of("layer_types", str, rule)
  if len(types) != count or not {*types} <= {*known}:
    reason = f"is not one of {known} for each of {count} layers"
    raise fields.error("layer_types", types, reason)
  kinds = ["moe" if t == rows.FULL else "moe@window" for t in types]
  window = fields.take("sliding_window", int, 128, least=1)
  return {"layers": kinds, "variants.window.window": window}


def _write_layers(ours):
  windows = [layer["attention.window"] for layer in ours["layers"]]
  types = [rows.SLIDING if window else rows.FULL for window in windows]
  width = max(filter(None, windows), default=128)
  return {"layer_types": types, "sliding_window": width}


_YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False}
_YARN["original_max_position_embeddings"] = 4096
_EXPERTS = ("moe/experts/{}", "mlp.experts.{}")
_ROUTER = ("moe/router/{}", "mlp.router.{}")
_DOWN = "down down_proj, down_bias down_proj_bias"
_UP = "gate+up gate_up_proj, gate_bias+up_bias gate_up_proj_bias"
GPT_OSS = families.Family(
  "gpt_oss",
  "GptOssForCausalLM",
  rows=(
    *rows.common(201_088, 2880, 36, 64, 1e-5)[:-1],
    *rows.grouped(kv_heads=8, head_dim=64),
    rows.Rope(theta=150_000.0, longest=131_072, default=_YARN),
    rows.Pair(_read_layers, _write_layers),
    rows.BIAS._replace(default=True),
    *rows.experts("num_local_experts", 128, 4, "intermediate_size", 2880),
    rows.fixed("swiglu_limit", 7.0),
    rows.fixed("swiglu_alpha", 1.702),
  ),
  tensors=(
    *tensors.maps("attention/sinks self_attn.sinks", form=tensors.SAME),
    *tensors.maps("kernel_bias bias", *_ROUTER, tensors.SAME),
    *tensors.maps("kernel weight", *_ROUTER),
    *tensors.maps(_UP, *_EXPERTS, tensors.INTERLEAVED),
    *tensors.maps(_DOWN, *_EXPERTS, tensors.STACKED),
  ),
  constants={
    "attention.sinks": True,
    "activation": "clamped_swiglu",
    "moe.use_bias": True,
    "moe.router.score_before_top_k": False,
    "moe.router.use_bias": True,
  },
  ignored=("hidden_act",),
)
