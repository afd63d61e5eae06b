"""GLM-4.5 and its relatives, by Z.ai (2508.06471)."""

import functools

from moe_jax.hf import families, rows, tensors
from moe_jax.hf.families import deepseek
from moe_jax.hf.tensors import SAME

_QKV = {True: "qkv", False: "none"}
_BIAS = "balance/moe/bias_E mlp.gate.e_score_correction_bias"
GLM4_MOE = families.Family(
  "glm4_moe",
  "Glm4MoeForCausalLM",
  rows=(
    *rows.common(151_552, 4096, 46, 96, 1e-5, whole_heads=False),
    *rows.grouped(kv_heads=8),
    rows.Rope(theta=1e4, longest=131_072, part=0.5),
    rows.flag("attention_bias", "attention.bias", False, values=_QKV),
    rows.flag(
      *("use_qk_norm", "attention.qk_norm", False),
      values={True: "head", False: "none"},
    ),
    rows.Pair(
      functools.partial(deepseek.read_layers, dense=1), deepseek.write_layers
    ),
    rows.whole("intermediate_size", "d_ff", 10_944),
    *rows.experts("n_routed_experts", 128, 8, "moe_intermediate_size", 1408),
    rows.whole(
      "n_shared_experts", "moe.num_shared_experts", 1, null=0, least=0
    ),
    rows.RENORMALIZE._replace(default=True, null=False),
    rows.number("routed_scaling_factor", "moe.router.scale", 1.0),
    rows.whole("n_group", "moe.router.num_expert_groups", 1, null=1),
    rows.whole("topk_group", "moe.router.top_expert_groups", 1, null=1),
  ),
  tensors=(
    *tensors.maps(_BIAS, form=SAME),
    *tensors.gated("moe/shared/{}", "mlp.shared_experts.{}.weight"),
  ),
  constants={
    "moe.router.score": "sigmoid",
    "moe.router.group_score": "sum_top_2",
    "moe.balancers.bias": {"name": "bias", "rate": 1e-3},
  },
)
