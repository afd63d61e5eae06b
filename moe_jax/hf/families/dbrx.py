"""DBRX (databricks/dbrx), whose config.json has a section for each sublayer."""

from moe_jax.hf import families, rows, tensors
from moe_jax.hf.tensors import OUTPUT, SAME

_P_NORM = "ffn_config.moe_normalize_expert_weights"
_RENORMALIZE = {"null": None, "values": {1.0: True, None: False}}
_ROPE = {"older": "attn_config.rope_theta", "length": "max_seq_len"}
_NORM = ("{}/scale", "norm_attn_norm.{}.weight")
_ATTENTION = ("attention/{}", "norm_attn_norm.attn.{}.weight")
_EXPERTS = ("moe/experts/{}", "ffn.experts.mlp.{}")
_OUTER = ("{}", "transformer.{}.weight")
DBRX = families.Family(
  "dbrx",
  "DbrxForCausalLM",
  rows=(
    rows.size("vocab_size", "vocab_size", 32_000),
    rows.size("d_model", "d_model", 2048),
    rows.size("n_layers", "num_layers", 24),
    rows.size("n_heads", "num_heads", 16),
    rows.size("attn_config.kv_n_heads", "num_kv_heads", 1),
    rows.size("head_dim", "head_dim", rows.per_head, fixed=True),
    rows.flag("tie_word_embeddings", "tie_embeddings", False, fixed=True),
    rows.Rope(theta=1e4, longest=2048, **_ROPE),
    rows.number("attn_config.clip_qkv", "attention.clip", None),
    rows.size("ffn_config.moe_num_experts", "moe.num_experts", 4),
    rows.whole("ffn_config.moe_top_k", "moe.top_k", 1),
    rows.size("ffn_config.ffn_hidden_size", "moe.d_expert", 3584),
    rows.fixed("ffn_config.ffn_act_fn", {"name": "silu"}),
    rows.number(_P_NORM, "moe.router.renormalize", 1.0, **_RENORMALIZE),
  ),
  tensors=(
    *tensors.maps("attention_norm norm_1, ffn_norm norm_2", *_NORM, SAME),
    *tensors.maps("query+key+value Wqkv", *_ATTENTION),
    *tensors.maps("out out_proj", *_ATTENTION, OUTPUT),
    *tensors.maps("moe/router/kernel ffn.router.layer.weight"),
    *tensors.maps("gate w1, up v1", *_EXPERTS),
    *tensors.maps("down w2", *_EXPERTS, SAME),
  ),
  constants={"norm": "layer", "norm_eps": 1e-5, "activation": "swiglu"},
  sections=("attn_config", "ffn_config"),
  ignored=("num_key_value_heads", "ffn_config.hidden_size"),
  layer="transformer.blocks.{i}.",
  outer=tensors.maps("embedding wte, final_norm/scale norm_f", *_OUTER, SAME),
)
