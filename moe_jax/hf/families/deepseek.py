"""DeepSeek-V2 (2405.04434) and V3 (2412.19437), and Kimi K2 (2507.20534)."""

import functools

from moe_jax.hf import families, rows, tensors
from moe_jax.hf.tensors import SAME, Map


def read_layers(fields, ours, dense=3):
  """Returns the kinds of layers: the first are dense.

  Layers beyond the last, which predict more than one token, are left out.

  Args:
    fields, ours: see `rows.Row.read`.
    dense: the default number of dense layers.
  """
  count = ours["num_layers"]
  dense = min(fields.take("first_k_dense_replace", int, dense), count)
  more = fields.take("num_mtp_layers", int, 1)
  more = fields.take("num_nextn_predict_layers", int, more)
  beyond = range(count, count + min(more, 100))
  return {
    "layers": ["dense"] * dense + ["moe"] * (count - dense),
    "left_out": tuple(f"model.layers.{i}." for i in beyond),
  }


def write_layers(ours):
  """Returns the fields of `read_layers`, from our keys."""
  dense = sum(layer["kind"] == "dense" for layer in ours["layers"])
  return {"first_k_dense_replace": dense, "num_nextn_predict_layers": 0}


def _read_groups(fields, ours):
  """Groups of experts; a token chooses in some of them."""
  method = fields.take("topk_method", str, "greedy")
  groups = fields.take("n_group", int, 1, 1)
  best = fields.take("topk_group", int, 1, 1)
  if method not in _METHODS:
    words = ", ".join(_METHODS)
    raise fields.error(
      "topk_method", method, f"is not supported; supported: {words}"
    )
  groups, best = (groups, best) if method == _METHODS[1] else (1, 1)
  return {
    "moe.router.num_expert_groups": groups,
    "moe.router.top_expert_groups": best,
  }


def _write_groups(ours):
  groups = ours.get("moe.router.num_expert_groups", 1)
  best = ours.get("moe.router.top_expert_groups", 1)
  method = _METHODS[best < groups]
  return {"topk_method": method, "n_group": groups, "topk_group": best}


_METHODS = "greedy", "group_limited_greedy"
_PAIRS = {"null": False, "values": {True: "interleaved", False: "half"}}
_OR_NONE = {"null": 0, "least": 0}
_WIDTH = "moe_intermediate_size"
_QUERY = "attention/query"
_LATENT = ("attention/{}", "self_attn.{}.weight")
_DOWN = "query_down q_a_proj, kv_down kv_a_proj_with_mqa, kv_up kv_b_proj"
_NORMS = "query_norm/scale q_a_layernorm, kv_norm/scale kv_a_layernorm"
_BIAS = "balance/moe/bias_E mlp.gate.e_score_correction_bias"


def _latent(vocab_size, d_model, layers, num_heads, longest):
  """Rows of all of them, with the defaults of one."""
  return (
    *rows.common(vocab_size, d_model, layers, num_heads, 1e-6),
    rows.size("num_key_value_heads", "num_kv_heads", rows.heads, fixed=True),
    rows.size("qk_nope_head_dim", "head_dim", 128),
    rows.size("qk_rope_head_dim", "attention.rope_head_dim", 64),
    rows.size("v_head_dim", "attention.v_head_dim", 128),
    rows.size("kv_lora_rank", "attention.kv_lora_rank", 512),
    rows.size("q_lora_rank", "attention.q_lora_rank", 1536, null=None),
    rows.Rope(theta=1e4, longest=longest),
    rows.fixed("moe_layer_freq", 1),
  )


_TENSORS = (
  # Queries may have a latent too.
  Map((_QUERY,), "self_attn.q_b_proj.weight", given=(f"{_QUERY}_down",)),
  *tensors.maps(_DOWN, *_LATENT),
  *tensors.maps(_NORMS, *_LATENT, SAME),
  *tensors.gated("moe/shared/{}", "mlp.shared_experts.{}.weight"),
)
DEEPSEEK_V3 = families.Family(
  "deepseek_v3",
  "DeepseekV3ForCausalLM",
  rows=(
    *_latent(129_280, 7168, 61, 128, longest=4096),
    rows.flag("rope_interleave", "attention.rope", True, **_PAIRS),
    rows.Pair(read_layers, write_layers),
    rows.whole("intermediate_size", "d_ff", 18_432),
    *rows.experts("n_routed_experts", 256, 8, _WIDTH, 2048),
    rows.whole("n_shared_experts", "moe.num_shared_experts", 1, **_OR_NONE),
    rows.fixed("scoring_func", "sigmoid"),
    rows.fixed("topk_method", "noaux_tc"),
    rows.RENORMALIZE._replace(default=True, null=False),
    rows.number("routed_scaling_factor", "moe.router.scale", 2.5),
    rows.whole("n_group", "moe.router.num_expert_groups", 8, null=1),
    rows.whole("topk_group", "moe.router.top_expert_groups", 4, null=1),
  ),
  tensors=(*_TENSORS, *tensors.maps(_BIAS, form=SAME)),
  constants={
    "attention.name": "latent",
    "moe.router.score": "sigmoid",
    "moe.router.group_score": "sum_top_2",
    "moe.balancers.bias": {"name": "bias", "rate": 1e-3},
  },
  ends={"bos_token_id": 0, "eos_token_id": 1},
  ignored=("head_dim",),
)
# DeepSeek-V3's architecture by another name; Moonlight's files say deepseek_v3.
KIMI_K2 = DEEPSEEK_V3._replace(model_type="kimi_k2")
DEEPSEEK_V2 = families.Family(
  "deepseek_v2",
  "DeepseekV2ForCausalLM",
  rows=(
    *_latent(102_400, 4096, 32, 32, longest=2048),
    rows.Pair(functools.partial(read_layers, dense=0), write_layers),
    rows.whole("intermediate_size", "d_ff", 11_008),
    *rows.experts("n_routed_experts", 64, rows.REQUIRED, _WIDTH, 1407),
    rows.whole("n_shared_experts", "moe.num_shared_experts", 2, **_OR_NONE),
    rows.fixed("scoring_func", "softmax"),
    rows.fixed("norm_topk_prob", False),
    rows.number("routed_scaling_factor", "moe.router.scale", 1.0),
    rows.Pair(_read_groups, _write_groups),
  ),
  tensors=_TENSORS,
  constants={"attention.name": "latent", "attention.rope": "interleaved"},
  ends={"bos_token_id": 1, "eos_token_id": 2},
  ignored=("head_dim",),
)
