"""Llama 4 Scout and Maverick, their text decoders (llama-models, models/llama4).

A token takes one expert and a shared one; the sigmoid of its logit multiplies the
expert's input. Every fourth layer sees all tokens, without positions and with a
temperature that grows with them; the others see chunks of 8192 tokens. Scout has
16 experts in every layer, and normalised queries and keys; Maverick 128 in every
second one. How they were balanced is not published, so there is no balancer here.

  python -m moe_jax.params --config=configs/llama4.py:maverick
"""

from configs import published


def get_config(variant: str = "scout"):
  return published.one_of({"scout": _scout, "maverick": _maverick}, variant)


def _scout():
  c = published.decoder()
  c.model.vocab_size = 202_048
  c.model.d_model = 5120
  c.model.num_layers = 48
  c.model.pattern = ("moe@local",) * 3 + ("moe",)
  c.model.d_ff = 16_384
  c.model.num_heads = 40
  c.model.num_kv_heads = 8
  c.model.head_dim = 128
  c.model.rope_theta = 5e5
  c.model.attention = {"rope": "none", "temperature": (0.1, 8192, 1)}
  c.model.variants = {
    "local": {
      "rope": "interleaved",
      "chunk": 8192,
      "qk_norm": "l2",
      "temperature": None,
    }
  }
  c.model.moe.num_experts = 16
  c.model.moe.top_k = 1
  c.model.moe.d_expert = 8192
  c.model.moe.num_shared_experts = 1
  c.model.moe.router = {
    "name": "top_k",
    "score": "sigmoid",
    "score_before_top_k": False,
    "apply_to": "input",
  }
  return c


def _maverick():
  c = _scout()
  c.model.pattern = ("dense@local", "moe@local", "dense@local", "moe")
  c.model.variants.local.qk_norm = "none"
  c.model.moe.num_experts = 128
  return c
