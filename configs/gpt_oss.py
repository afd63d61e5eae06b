"""gpt-oss-20b and gpt-oss-120b (2508.10925; their config.json).

A token takes four experts: softmax over the four best logits, which have a bias.
Experts have biases and a clamped SwiGLU. Every second layer sees a window of 128
tokens; every head has a sink. How they were balanced is not published, so there
is no balancer here.

  python -m moe_jax.params --config=configs/gpt_oss.py:120b
"""

from configs import published


def get_config(variant: str = "20b"):
  return published.one_of({"20b": _20b, "120b": _120b}, variant)


def _20b():
  c = published.decoder()
  c.model.vocab_size = 201_088
  c.model.d_model = 2880
  c.model.num_layers = 24
  c.model.pattern = ("moe@window", "moe")
  c.model.num_heads = 64
  c.model.num_kv_heads = 8
  c.model.head_dim = 64
  c.model.rope_theta = 150_000.0
  c.model.attention = {
    "bias": "all",
    "sinks": True,
    "rope_scaling": {
      "name": "yarn",
      "factor": 32.0,
      "original_length": 4096,
      "truncate": False,
    },
  }
  c.model.variants = {"window": {"window": 128}}
  c.model.moe.num_experts = 32
  c.model.moe.top_k = 4
  c.model.moe.d_expert = 2880
  c.model.moe.activation = "clamped_swiglu"
  c.model.moe.use_bias = True
  c.model.moe.router = {
    "name": "top_k",
    "score_before_top_k": False,
    "use_bias": True,
  }
  return c


def _120b():
  c = _20b()
  c.model.num_layers = 36
  c.model.moe.num_experts = 128
  return c
