"""GLM-4.5 Air and GLM-4.5 (2508.06471), by Z.ai.

Grouped queries of which half of a head's width turns with the position, biases after
queries, keys and values, and in the larger model a norm of queries and keys; dense
layers, then many experts and a shared one. Sigmoid scores over the sum of the chosen,
times a factor, with a selection bias and a balance loss of 1e-4 over sequences. The
layer that predicts one token more is not there. Trained with Muon.

  python -m moe_jax.params --config=configs/glm_4_5.py:air
"""

from configs import published


def get_config(variant: str = "air"):
  return published.one_of({"air": _air, "355b": _355b}, variant)


def _air():
  c = published.decoder()
  c.model.vocab_size = 151_552
  c.model.d_model = 4096
  c.model.num_layers = 46
  c.model.prefix = ("dense",)
  c.model.d_ff = 10_944
  c.model.num_heads = 96
  c.model.num_kv_heads = 8
  c.model.head_dim = 128
  c.model.rope_theta = 1_000_000.0
  c.model.attention = {"rotary_dim": 64, "bias": "qkv"}
  c.model.moe.num_experts = 128
  c.model.moe.top_k = 8
  c.model.moe.d_expert = 1408
  c.model.moe.num_shared_experts = 1
  c.model.moe.router = {
    "name": "top_k",
    "score": "sigmoid",
    "renormalize": True,
  }
  c.model.moe.balancers = {
    "bias": {"name": "bias", "rate": 1e-3},
    "load": {"name": "switch", "coefficient": 1e-4, "scope": "sequence"},
  }
  c.optim.optimizer = {"name": "muon"}
  return c


def _355b():
  c = _air()
  c.model.d_model = 5120
  c.model.num_layers = 92
  c.model.prefix = ("dense",) * 3
  c.model.d_ff = 12_288
  c.model.attention.qk_norm = "head"
  c.model.moe.num_experts = 160
  c.model.moe.d_expert = 1536
  c.model.moe.router.scale = 2.5
  return c
