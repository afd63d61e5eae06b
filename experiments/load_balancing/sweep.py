"""The arms: a switch loss of two sizes, a loss-free bias, or nothing."""

from configs import base
from experiments import sweeps

_BALANCERS = "model.moe.balancers"


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores.

  The bias moves by 1e-2 a step, ten times the rate of Wang et al.: they have
  40,000 steps to move it in, and here are some hundred.
  """
  return sweeps.Sweep(_demo_config(), _arms(bias_rate=1e-2), seeds=3)


SCALES = {"demo": demo}


def _arms(bias_rate):
  return sweeps.over(
    _BALANCERS,
    {
      "none": {},
      "loss_1e-2": {"loss": {"name": "switch", "coefficient": 1e-2}},
      "loss_1e-3": {"loss": {"name": "switch", "coefficient": 1e-3}},
      "bias": {"bias": {"name": "bias", "rate": bias_rate}},
    },
  )


def _demo_config():
  c = base.get_config()
  c.data.seq_len = 64
  c.data.batch_size = 8
  c.model.d_model = 64
  c.model.num_layers = 3
  c.model.num_heads = 4
  c.model.num_kv_heads = 4
  c.model.head_dim = 16
  c.model.rope_theta = 300.0  # For a context this short.
  c.model.remat = "block"  # Faster here: new memory costs more than FLOPs.
  c.model.moe.num_experts = 16
  c.model.moe.d_expert = 64
  # The gate of Wang et al.: the bias is added to scores between 0 and 1.
  c.model.moe.router = {
    "name": "top_k",
    "score": "sigmoid",
    "renormalize": True,
  }
  c.optim.learning_rate = 1e-2
  c.optim.weight_decay = 0.0
  c.optim.b1 = 0.8
  c.train.num_steps = 400
  c.eval.batch_size = 64
  c.eval.batches_per_domain = 8
  return c
