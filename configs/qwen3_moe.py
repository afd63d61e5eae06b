"""Qwen3-30B-A3B and Qwen3-235B-A22B (2505.09388; their config.json).

128 experts, of which a token takes eight; softmax over all, over the sum of the
eight; no shared expert. Every head's query and key is normalised. Balanced by a
loss over the global batch (2501.11873), whose coefficient is not published: 0.001
is router_aux_loss_coef of config.json.

  python -m moe_jax.params --config=configs/qwen3_moe.py:30b_a3b
"""

from configs import published


def get_config(variant: str = "30b_a3b"):
  sizes = {"30b_a3b": _30b_a3b, "235b_a22b": _235b_a22b}
  return published.one_of(sizes, variant)


def _30b_a3b():
  c = published.decoder()
  c.model.vocab_size = 151_936
  c.model.d_model = 2048
  c.model.num_layers = 48
  c.model.num_heads = 32
  c.model.num_kv_heads = 4
  c.model.head_dim = 128
  c.model.rope_theta = 1e6
  c.model.norm_eps = 1e-6
  c.model.attention = {"qk_norm": "head"}
  c.model.moe.num_experts = 128
  c.model.moe.top_k = 8
  c.model.moe.d_expert = 768
  c.model.moe.router = {"name": "top_k", "renormalize": True}
  c.model.moe.balancers = {
    "load": {"name": "switch", "coefficient": 1e-3, "scope": "global_batch"}
  }
  return c


def _235b_a22b():
  c = _30b_a3b()
  c.model.d_model = 4096
  c.model.num_layers = 94
  c.model.num_heads = 64
  c.model.moe.d_expert = 1536
  return c
