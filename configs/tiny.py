"""The smallest run that still learns: for trying things and for tests.

python -m moe_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from configs import base


def get_config():
  c = base.get_config()
  c.data.seq_len = 64
  c.data.batch_size = 8
  c.model.d_model = 32
  c.model.num_layers = 2
  c.model.num_heads = 2
  c.model.num_kv_heads = 1
  c.model.head_dim = 16
  c.model.moe.num_experts = 4
  c.model.moe.d_expert = 32
  c.optim.warmup_steps = 5
  c.train.num_steps = 20
  c.train.log_every = 5
  c.train.loads_every = 5
  c.eval.batch_size = 8
  c.eval.batches_per_domain = 2
  return c
