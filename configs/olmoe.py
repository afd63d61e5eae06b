"""OLMoE-1B-7B (2409.02060; configs/OLMoE-1B-7B-0924.yml of its code).

64 experts, of which a token takes eight: softmax over all, not renormalised, as
norm_topk_prob = false says. Queries and keys are normalised over all heads. Its
balance loss of 0.01 and z-loss of 0.001 are in MegaBlocks' unit, which divides
by the number of layers.

  python -m moe_jax.params --config=configs/olmoe.py:1b_7b
"""

from configs import published


def get_config(variant: str = "1b_7b"):
  return published.one_of({"1b_7b": _1b_7b}, variant)


def _1b_7b():
  c = published.decoder()
  c.model.vocab_size = 50_304
  c.model.d_model = 2048
  c.model.num_layers = 16
  c.model.num_heads = 16
  c.model.num_kv_heads = 16
  c.model.head_dim = 128
  c.model.attention = {"qk_norm": "projection"}
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 8
  c.model.moe.d_expert = 1024
  c.model.moe.router = {"name": "top_k", "renormalize": False}
  layers = c.model.num_layers
  c.model.moe.balancers = {
    "load": {"name": "switch", "coefficient": 0.01 / layers},
    "z": {"name": "z_loss", "coefficient": 0.001 / layers},
  }
  c.optim.learning_rate = 4e-4
  c.data.batch_size = 1024
  return c
