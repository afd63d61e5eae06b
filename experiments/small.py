"""Configs of small models that the committed questions start from."""

import ml_collections

from configs import base


def demo_config() -> ml_collections.ConfigDict:
  """A run takes seconds on two cores: the scale `demo`."""
  c = base.get_config()
  c.data.update(seq_len=64, batch_size=8)
  c.model.update(d_model=64, num_layers=3)
  c.model.update(num_heads=4, num_kv_heads=4, head_dim=16)
  c.model.rope_theta = 300.0  # It suits a context this short.
  c.model.remat = "block"  # Faster here: new memory costs more than FLOPs.
  c.model.moe.update(num_experts=16, d_expert=64)
  # The gate of Wang et al.: the bias is added to scores between 0 and 1.
  sigmoid = {"name": "top_k", "score": "sigmoid", "renormalize": True}
  c.model.moe.router = sigmoid
  c.optim.update(learning_rate=1e-2, weight_decay=0.0)
  c.optim.optimizer.b1 = 0.8
  c.train.num_steps = 400
  c.eval.update(batch_size=64, batches_per_domain=8)
  return c


def cpu_config() -> ml_collections.ConfigDict:
  """A run takes a minute and a half on one core: the scale `cpu`."""
  c = demo_config()
  c.data.update(seq_len=128, batch_size=16)
  c.model.update(num_layers=4, prefix=("dense",))
  c.model.update(num_heads=2, num_kv_heads=2, head_dim=32)
  c.model.d_ff = 160  # The first layer is as wide as the active experts.
  c.model.moe.update(num_experts=32, top_k=4, d_expert=32, num_shared_experts=1)
  # Each step is one group: a single-domain sequence has unbalanced loads.
  c.model.moe.tokens_per_group = 2048
  c.optim.warmup_steps = 50
  c.optim.optimizer.b1 = 0.9
  c.train.num_steps = 500
  c.checkpoint.every = 0  # A run takes minutes.
  c.eval.update(batch_size=16, batches_per_domain=64)
  return c
