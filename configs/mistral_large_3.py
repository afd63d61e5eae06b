"""Mistral Large 3, 675 billion parameters with its vision, here the text decoder.

Multi-head latent attention as DeepSeek-V3's; three dense layers, then 128 experts
of which a token takes four, by softmax over their sum, and a shared one. No
selection bias. The numbers are those of its params.json, as the tests of
TensorRT-LLM and vLLM have them. How it was balanced is not published, so there is
no balancer here.

  python -m moe_jax.params --config=configs/mistral_large_3.py:675b
"""

from configs import published


def get_config(variant: str = "675b"):
  return published.one_of({"675b": _675b}, variant)


def _675b():
  c = published.decoder()
  c.model.vocab_size = 131_072
  c.model.d_model = 7168
  c.model.num_layers = 61
  c.model.prefix = ("dense",) * 3
  c.model.d_ff = 16_384
  c.model.num_heads = 128
  c.model.num_kv_heads = 128
  c.model.head_dim = 128
  c.model.norm_eps = 1e-6
  c.model.attention = {
    "name": "latent",
    "rope": "interleaved",
    "rope_scaling": {
      "name": "yarn",
      "factor": 36.0,
      "original_length": 8192,
      "mscale": 1.0,
      "mscale_all_dim": 1.0,
    },
    "temperature": (0.1, 8192, 0),
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "rope_head_dim": 64,
    "v_head_dim": 128,
  }
  c.model.moe.num_experts = 128
  c.model.moe.top_k = 4
  c.model.moe.d_expert = 4096
  c.model.moe.num_shared_experts = 1
  c.model.moe.router = {"name": "top_k", "renormalize": True}
  return c
