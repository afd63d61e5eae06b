"""Kimi K2 (2507.20534) and Moonlight 16B (2502.16982), by Moonshot AI.

Blocks of DeepSeek-V3: multi-head latent attention, a dense layer, then many experts
and shared ones; sigmoid scores over the sum of the chosen, times a factor, with a
selection bias and a balance loss over sequences. Experts have no groups. Both were
trained with Muon. YaRN is that of the released K2; clipping of queries and keys (QK-clip),
which K2 was trained with, is not there.

  python -m moe_jax.params --config=configs/kimi.py:k2
  python -m moe_jax.params --config=configs/kimi.py:moonlight
"""

from configs import published


def get_config(variant: str = "k2"):
  return published.one_of({"k2": _k2, "moonlight": _moonlight}, variant)


def _moonlight():
  c = published.decoder()
  c.model.vocab_size = 163_840
  c.model.d_model = 2048
  c.model.num_layers = 27
  c.model.prefix = ("dense",)
  c.model.d_ff = 11_264
  c.model.num_heads = 16
  c.model.num_kv_heads = 16
  c.model.head_dim = 128
  c.model.rope_theta = 50_000.0
  c.model.attention = {
    "name": "latent",
    "rope": "interleaved",
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "rope_head_dim": 64,
    "v_head_dim": 128,
  }
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 6
  c.model.moe.d_expert = 1408
  c.model.moe.num_shared_experts = 2
  c.model.moe.router = {
    "name": "top_k",
    "score": "sigmoid",
    "renormalize": True,
    "scale": 2.446,
  }
  c.model.moe.balancers = {
    "bias": {"name": "bias", "rate": 1e-3},
    "load": {"name": "switch", "coefficient": 1e-3, "scope": "sequence"},
  }
  c.optim.optimizer = {"name": "muon"}
  c.data.seq_len = 8192
  return c


def _k2():
  c = _moonlight()
  c.model.d_model = 7168
  c.model.num_layers = 61
  c.model.d_ff = 18_432
  c.model.num_heads = 64
  c.model.num_kv_heads = 64
  c.model.norm_eps = 1e-6
  c.model.attention.q_lora_rank = 1536
  c.model.attention.rope_scaling = {
    "name": "yarn",
    "factor": 32.0,
    "original_length": 4096,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
  }
  c.model.moe.num_experts = 384
  c.model.moe.top_k = 8
  c.model.moe.d_expert = 2048
  c.model.moe.num_shared_experts = 1
  c.model.moe.router.scale = 2.827
  c.data.seq_len = 4096
  return c
