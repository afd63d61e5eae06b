"""OLMoE (2409.02060)."""

from moe_jax.hf import families, rows

OLMOE = families.Family(
  "olmoe",
  "OlmoeForCausalLM",
  rows=(
    *rows.common(50_304, 2048, 16, 16, 1e-5),
    # The norms of all heads together are as wide as hidden_size.
    *rows.grouped(rows.heads, fixed=True),
    rows.Rope(theta=1e4, longest=4096),
    rows.BIAS,
    rows.number("clip_qkv", "attention.clip", None),
    *rows.experts("num_experts", 64, 8, "intermediate_size", 2048),
    rows.RENORMALIZE,
  ),
  constants={"attention.qk_norm": "projection"},
  ends={"eos_token_id": 50_279, "pad_token_id": 1},
)
