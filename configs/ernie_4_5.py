"""ERNIE 4.5 21B-A3B, text (its technical report, 2025), by Baidu.

Grouped queries whose neighbours turn with the position; a dense layer, then 64 experts,
of which a token takes six, and two shared ones. Softmax over all experts, with a
selection bias, over the sum of the chosen. A loss keeps the router's columns apart;
its coefficient is not published, and neither is the rate of the bias: both are 1e-3
here.

  python -m moe_jax.params --config=configs/ernie_4_5.py:21b_a3b
"""

from configs import published


def get_config(variant: str = "21b_a3b"):
  return published.one_of({"21b_a3b": _21b_a3b}, variant)


def _21b_a3b():
  c = published.decoder()
  c.model.vocab_size = 103_424
  c.model.d_model = 2560
  c.model.num_layers = 28
  c.model.prefix = ("dense",)
  c.model.d_ff = 12_288
  c.model.num_heads = 20
  c.model.num_kv_heads = 4
  c.model.head_dim = 128
  c.model.rope_theta = 500_000.0
  c.model.tie_embeddings = True
  c.model.attention = {"rope": "interleaved"}
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 6
  c.model.moe.d_expert = 1536
  c.model.moe.num_shared_experts = 2
  c.model.moe.router = {"name": "top_k", "renormalize": True}
  c.model.moe.balancers = {
    "bias": {"name": "bias", "rate": 1e-3},
    "apart": {
      "name": "orthogonality",
      "norm": "squared",
      "coefficient": 1e-3,
    },
  }
  return c
