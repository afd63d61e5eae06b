"""DBRX, 132 billion parameters (databricks/dbrx, model/config.json).

16 experts, of which a token takes four; softmax over all, over the sum of the
four. Layer norm without bias; queries, keys and values clipped to 8. Its balance
loss is 0.05 in MegaBlocks' unit, which divides by the number of layers.

  python -m moe_jax.params --config=configs/dbrx.py:132b
"""

from configs import published


def get_config(variant: str = "132b"):
  return published.one_of({"132b": _132b}, variant)


def _132b():
  c = published.decoder()
  c.model.vocab_size = 100_352
  c.model.d_model = 6144
  c.model.num_layers = 40
  c.model.num_heads = 48
  c.model.num_kv_heads = 8
  c.model.head_dim = 128
  c.model.rope_theta = 5e5
  c.model.norm = "layer"
  c.model.attention = {"clip": 8.0}
  c.model.moe.num_experts = 16
  c.model.moe.top_k = 4
  c.model.moe.d_expert = 10_752
  c.model.moe.router = {"name": "top_k", "renormalize": True}
  c.model.moe.balancers = {
    "load": {"name": "switch", "coefficient": 0.05 / c.model.num_layers}
  }
  c.data.seq_len = 32_768
  return c
