"""Mistral (2310.06825), Mixtral (2401.04088) and OLMoE (2409.02060)."""

from moe_jax.hf import families, rows, tensors

_EXPERTS = ("moe/experts/{}", "block_sparse_moe.experts.{e}.{}.weight")
MIXTRAL = families.Family(
  "mixtral",
  "MixtralForCausalLM",
  rows=(
    *rows.common(32_000, 4096, 32, 32, 1e-5),
    *rows.grouped(kv_heads=8),
    rows.Rope(theta=1e6, longest=131_072),
    rows.whole("sliding_window", "attention.window", None),
    *rows.experts("num_local_experts", 8, 2, "intermediate_size", 14_336),
  ),
  tensors=(
    *tensors.maps("moe/router/kernel block_sparse_moe.gate.weight"),
    *tensors.maps("gate w1, up w3, down w2", *_EXPERTS),
  ),
  constants={"moe.router.renormalize": True},
  ends={"bos_token_id": 1, "eos_token_id": 2},
)
MISTRAL = families.Family(
  "mistral",
  "MistralForCausalLM",
  rows=(
    *rows.common(32_000, 4096, 32, 32, 1e-6),
    *rows.grouped(kv_heads=8),
    rows.Rope(theta=1e4, longest=131_072),
    rows.whole("sliding_window", "attention.window", 4096, null=None),
    *rows.dense(14_336),
  ),
  ends={"bos_token_id": 1, "eos_token_id": 2},
)
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
