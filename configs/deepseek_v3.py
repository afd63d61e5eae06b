"""DeepSeek-V3 and R1, 671 billion parameters (2412.19437, 2.1 and 4.2).

Multi-head latent attention; three dense layers, then 256 experts, of which a
token takes eight in the best four of eight groups, and a shared one. Sigmoid
scores, over the sum of the chosen, times 2.5. A selection bias moves by 1e-3 a
step (and not at all during the last 500 billion tokens, which are not set here);
beside it a balance loss of 1e-4 over each sequence. YaRN is that of the released
model; it was pretrained without. The second head, which predicts one token more,
is not there.

  python -m moe_jax.params --config=configs/deepseek_v3.py:671b
"""

from configs import published


def get_config(variant: str = "671b"):
  return published.one_of({"671b": _671b}, variant)


def _671b():
  c = published.decoder()
  c.model.vocab_size = 129_280
  c.model.d_model = 7168
  c.model.num_layers = 61
  c.model.prefix = ("dense",) * 3
  c.model.d_ff = 18_432
  c.model.num_heads = 128
  c.model.num_kv_heads = 128
  c.model.head_dim = 128
  c.model.norm_eps = 1e-6
  c.model.attention = {
    "name": "latent",
    "rope": "interleaved",
    "rope_scaling": {
      "name": "yarn",
      "factor": 40.0,
      "original_length": 4096,
      "mscale": 1.0,
      "mscale_all_dim": 1.0,
    },
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "rope_head_dim": 64,
    "v_head_dim": 128,
  }
  c.model.moe.num_experts = 256
  c.model.moe.top_k = 8
  c.model.moe.d_expert = 2048
  c.model.moe.num_shared_experts = 1
  c.model.moe.router = {
    "name": "top_k",
    "score": "sigmoid",
    "renormalize": True,
    "scale": 2.5,
    "num_expert_groups": 8,
    "top_expert_groups": 4,
    "group_score": "sum_top_2",
  }
  c.model.moe.balancers = {
    "bias": {"name": "bias", "rate": 1e-3},
    "load": {"name": "switch", "coefficient": 1e-4, "scope": "sequence"},
  }
  c.optim.learning_rate = 2.2e-4
  c.optim.optimizer.b2 = 0.95
  return c
