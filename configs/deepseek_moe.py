"""DeepSeekMoE 16B (2401.06066).

A dense layer, then 64 small experts, of which a token takes six, and two shared
ones. Softmax over all, not renormalised. Expert-level balance loss of 0.001 over
a sequence; no token is dropped.

  python -m moe_jax.params --config=configs/deepseek_moe.py:16b
"""

from configs import published


def get_config(variant: str = "16b"):
  return published.one_of({"16b": _16b}, variant)


def _16b():
  c = published.decoder()
  c.model.vocab_size = 102_400
  c.model.d_model = 2048
  c.model.num_layers = 28
  c.model.prefix = ("dense",)
  c.model.d_ff = 10_944
  c.model.num_heads = 16
  c.model.num_kv_heads = 16
  c.model.head_dim = 128
  c.model.norm_eps = 1e-6
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 6
  c.model.moe.d_expert = 1408
  c.model.moe.num_shared_experts = 2
  c.model.moe.router = {"name": "top_k"}
  c.model.moe.balancers = {
    "load": {"name": "switch", "coefficient": 1e-3, "scope": "sequence"}
  }
  return c
