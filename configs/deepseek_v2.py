"""DeepSeek-V2 and V2-Lite (2405.04434, 2.1, 2.2 and 3.1).

Multi-head latent attention; a dense layer, then 160 (Lite: 64) experts, of which a
token takes six, and two shared ones. Softmax over all experts, not renormalised, times
16 (Lite: 1). V2 takes experts in the best three of eight groups, which are devices,
by a group's best score. Three losses balance experts, devices and what devices
receive; they are computed over each sequence in the paper, and the third over groups
here, which are whole sequences.

  python -m moe_jax.params --config=configs/deepseek_v2.py:236b
"""

from configs import published


def get_config(variant: str = "236b"):
  return published.one_of({"236b": _236b, "lite": _lite}, variant)


def _lite():
  c = published.decoder()
  c.model.vocab_size = 102_400
  c.model.d_model = 2048
  c.model.num_layers = 27
  c.model.prefix = ("dense",)
  c.model.d_ff = 10_944
  c.model.num_heads = 16
  c.model.num_kv_heads = 16
  c.model.head_dim = 128
  c.model.norm_eps = 1e-6
  c.model.attention = {
    "name": "latent",
    "rope": "interleaved",
    "rope_scaling": {
      "name": "yarn",
      "factor": 40.0,
      "original_length": 4096,
      "mscale": 0.707,
      "mscale_all_dim": 0.707,
    },
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "rope_head_dim": 64,
    "v_head_dim": 128,
  }
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 6
  c.model.moe.d_expert = 1408
  c.model.moe.num_shared_experts = 2
  c.model.moe.router = {"name": "top_k"}
  c.model.moe.balancers = {
    "load": {"name": "switch", "coefficient": 1e-3, "scope": "sequence"}
  }
  return c


def _236b():
  c = _lite()
  c.model.d_model = 5120
  c.model.num_layers = 60
  c.model.d_ff = 12_288
  c.model.num_heads = 128
  c.model.num_kv_heads = 128
  c.model.attention.q_lora_rank = 1536
  c.model.attention.rope_scaling.update(mscale=1.0, mscale_all_dim=1.0)
  c.model.moe.num_experts = 160
  c.model.moe.d_expert = 1536
  c.model.moe.router.update(
    scale=16.0, num_expert_groups=8, top_expert_groups=3
  )
  devices = {"name": "device", "devices": 8}
  c.model.moe.balancers = {
    "load": {"name": "switch", "coefficient": 3e-3, "scope": "sequence"},
    "devices": {**devices, "coefficient": 0.05, "scope": "sequence"},
    "sent": {**devices, "coefficient": 0.02, "of": "tokens", "scope": "group"},
  }
  c.optim.learning_rate = 2.4e-4
  c.optim.optimizer.b2 = 0.95
  return c
