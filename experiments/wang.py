"""The models of Wang et al. (2408.15664): 1B on 100B tokens, 3B on 200B (table 5).

Text is your own in place of theirs, whose tokenizer has 32,064 tokens. Learning rates
are theirs; of the steps in the schedule of 3B nothing is published, and it is WSD here.
Weights begin as everywhere in this package, not with their standard deviation of 0.006.
"""

import ml_collections

from experiments import small


def config() -> ml_collections.ConfigDict:
  """The config that both sizes begin with."""
  c = small.cpu_config()
  c.data.update(name="text_of_your_own", seq_len=2048)
  c.model.moe.update(num_experts=64, top_k=6, num_shared_experts=2)
  c.model.moe.tokens_per_group = 2048
  c.model.moe.capacity_factor = None  # Dropless.
  c.model.moe.dispatcher = {"name": "sorted"}
  c.model.update(rope_theta=10_000.0, tie_embeddings=False, dtype="bfloat16")
  c.optim.update(warmup_steps=1000, weight_decay=0.1)
  c.optim.optimizer.b2 = 0.95
  c.train.log_every = 50
  c.checkpoint.every = 1000
  c.eval.update(every=1000, batch_size=128)
  return c


def sizes() -> dict[str, dict]:
  """{size: what it changes}."""
  wsd = {"optim.schedule": "wsd", "optim.decay_steps": 11_302}
  return {
    "1b": _size(1024, 10, 2736, 512, 1152, 40_000, 1e-3),
    "3b": _size(1280, 12, 3408, 856, 1728, 56_514, 7.8e-4) | wsd,
  }


def _size(d_model, layers, d_ff, d_expert, batch_size, steps, rate):
  return {
    "model.d_model": d_model,
    "model.num_layers": layers,
    "model.num_heads": d_model // 128,
    "model.num_kv_heads": d_model // 128,
    "model.head_dim": 128,
    "model.d_ff": d_ff,
    "model.moe.d_expert": d_expert,
    "data.batch_size": batch_size,
    "train.num_steps": steps,
    "optim.learning_rate": rate,
  }
