"""GLaM with 64 experts: 64B, 8B and 1.7B (2112.06905, Table 4).

Every second layer has 64 experts, of which a token takes two as in GShard: the
second one with a probability of twice its weight, a balance loss of 0.01, and
slots for the balanced load of both: the paper's factor of 2 is of the tokens. They are
given token by token; in the public code first choices come before second ones, which
shows a token what later ones choose. Experts are not gated, dense layers are. Every
layer has a table of position biases; their buckets are T5's here. Adafactor keeps
at most 0.99 of its moments, and the sum of the output's softmax has a loss of 1e-4.
The 8B and 1.7B models are those whose printed sizes have a vocabulary of 32,000.

  python -m moe_jax.params --config=configs/glam.py:64b_64e
"""

from configs import published


def get_config(variant: str = "64b_64e"):
  sizes = {"64b_64e": _64b, "8b_64e": _8b, "1b7_64e": _1b7}
  return published.one_of(sizes, variant)


def _64b():
  c = published.decoder()
  c.task = {"name": "next_token", "z_loss": 1e-4}
  c.data.update(seq_len=1024, batch_size=1024)
  c.optim.optimizer = {"name": "adafactor", "most": 0.99}
  c.optim.update(learning_rate=1e-2, schedule="rsqrt", decay_steps=10_000)
  c.optim.update(warmup_steps=0, weight_decay=0.0, clip_norm=None)
  c.model.attention = {"rope": "none", "position_bias": "layer"}
  c.model.vocab_size = 256_000
  c.model.tie_embeddings = True
  c.model.d_model = 8192
  c.model.num_layers = 64
  c.model.pattern = ("dense", "moe")
  c.model.d_ff = 32_768
  c.model.activation = "geglu"
  c.model.num_heads = 128
  c.model.num_kv_heads = 128
  c.model.head_dim = 128
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 2
  c.model.moe.d_expert = 32_768
  c.model.moe.activation = "gelu"
  c.model.moe.capacity_factor = 1.0
  c.model.moe.dispatcher = {"name": "gather", "order": "token"}
  c.model.moe.router = {
    "name": "top_k",
    "renormalize": True,
    "second_expert": "random",
  }
  c.model.moe.balancers = {
    "load": {"name": "switch", "coefficient": 0.01, "count": "first"}
  }
  return c


def _8b():
  c = _64b()
  c.model.vocab_size = 32_000
  c.model.d_model = 4096
  c.model.num_layers = 32
  c.model.d_ff = 16_384
  c.model.num_heads = 32
  c.model.num_kv_heads = 32
  c.model.moe.d_expert = 16_384
  return c


def _1b7():
  c = _8b()
  c.model.d_model = 2048
  c.model.num_layers = 24
  c.model.d_ff = 8192
  c.model.num_heads = 16
  c.model.num_kv_heads = 16
  c.model.moe.d_expert = 8192
  return c
