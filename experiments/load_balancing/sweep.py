"""The arms: a switch loss of two sizes, a loss-free bias, or nothing."""

from configs import base
from experiments import sweeps, tuning

_BALANCERS = "model.moe.balancers"


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores.

  The bias moves by 1e-2 a step, ten times the rate of Wang et al.: they have
  40,000 steps to move it in, and here are some hundred.
  """
  return sweeps.Sweep(demo_config(), _balancers(bias=1e-2), seeds=3)


def cpu() -> sweeps.Sweep:
  """An hour of seeds on two CPU cores, a run on each; what is committed.

  The layers of Wang et al. (a dense one, then experts beside a shared one) at a
  size that a core trains in a minute and a half. `dense` has as many active
  parameters, the routers' included; `dense_longer` trains for as long as the
  arms with experts take (times.csv), not for as many steps.
  """
  dense = {"model.pattern": ("dense",), "model.d_ff": 168}
  arms = _balancers(bias=1e-2) | {
    "bias_1e-3": {_BALANCERS: {"bias": {"name": "bias", "rate": 1e-3}}},
    "dense": dense,
    "dense_longer": dense | {"train.num_steps": 650},
  }
  rates = tuning.Stage("optim.learning_rate", (3e-3, 1e-2, 3e-2))
  return sweeps.Sweep(cpu_config(), arms, seeds=8, stages=(rates,))


def pod() -> sweeps.Sweep:
  """The models of Wang et al., 1B on 100B tokens and 3B on 200B (their table 5).

  For 64 accelerators or more, and text of your own in place of theirs:

    python -m experiments.launch load_balancing --scale=pod --arm=1b-bias \
      --config.data.name=NAME --config.data.dir=DIR \
      --config.data.tokenizer=tokenizer.json --config.mesh='(1,8,8,1)'

  on every host. Their tokenizer has 32,064 tokens. Learning rates are theirs; of
  the steps in the schedule of 3B nothing is published, and it is WSD here.
  Weights begin as everywhere in this package, not with their standard deviation
  of 0.006.
  """
  sizes = _sizes()
  arms = sweeps.product(sizes, _balancers(bias=1e-3))
  for size, d_ff in (("1b", 3984), ("3b", 6584)):  # As many active parameters.
    dense = {"model.pattern": ("dense",), "model.d_ff": d_ff}
    arms[f"{size}-dense"] = sizes[size] | dense
  return sweeps.Sweep(_pod_config(), arms, seeds=1)


SCALES = {"demo": demo, "cpu": cpu, "pod": pod}


def _balancers(bias):
  return sweeps.over(
    _BALANCERS,
    {
      "none": {},
      "loss_1e-2": {"loss": {"name": "switch", "coefficient": 1e-2}},
      "loss_1e-3": {"loss": {"name": "switch", "coefficient": 1e-3}},
      "bias": {"bias": {"name": "bias", "rate": bias}},
    },
  )


def demo_config():
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


def cpu_config():
  """What the scale `cpu` of several questions shares."""
  c = demo_config()
  c.data.seq_len = 128
  c.data.batch_size = 16
  c.model.num_layers = 4
  c.model.prefix = ("dense",)
  c.model.num_heads = 2
  c.model.num_kv_heads = 2
  c.model.head_dim = 32
  c.model.d_ff = 160  # Of the first layer: the width of active experts.
  c.model.moe.num_experts = 32
  c.model.moe.top_k = 4
  c.model.moe.d_expert = 32
  c.model.moe.num_shared_experts = 1
  # One group a step: a sequence is of one domain, its loads are not balanced.
  c.model.moe.tokens_per_group = 2048
  c.optim.warmup_steps = 50
  c.optim.b1 = 0.9
  c.train.num_steps = 500
  c.checkpoint.every = 0  # A run takes minutes.
  c.eval.batch_size = 16
  c.eval.batches_per_domain = 64
  return c


def _pod_config():
  c = cpu_config()
  c.data.name = "text_of_your_own"
  c.data.seq_len = 2048
  c.model.moe.num_experts = 64
  c.model.moe.top_k = 6
  c.model.moe.num_shared_experts = 2
  c.model.moe.tokens_per_group = 2048
  c.model.moe.capacity_factor = None  # Dropless.
  c.model.moe.dispatcher = {"name": "sorted"}
  c.model.rope_theta = 10_000.0
  c.model.tie_embeddings = False
  c.model.dtype = "bfloat16"
  c.optim.warmup_steps = 1000
  c.optim.weight_decay = 0.1
  c.optim.b2 = 0.95
  c.train.log_every = 50
  c.checkpoint.every = 1000
  c.eval.every = 1000
  c.eval.batch_size = 128
  return c


def _sizes():
  """Widths, and the hidden width of a dense layer over the granularity."""
  return {
    "1b": {
      "model.d_model": 1024,
      "model.num_layers": 10,
      "model.num_heads": 8,
      "model.num_kv_heads": 8,
      "model.head_dim": 128,
      "model.d_ff": 2736,
      "model.moe.d_expert": 512,
      "data.batch_size": 1152,
      "train.num_steps": 40_000,
      "optim.learning_rate": 1e-3,
    },
    "3b": {
      "model.d_model": 1280,
      "model.num_layers": 12,
      "model.num_heads": 10,
      "model.num_kv_heads": 10,
      "model.head_dim": 128,
      "model.d_ff": 3408,
      "model.moe.d_expert": 856,
      "data.batch_size": 1728,
      "train.num_steps": 56_514,
      "optim.learning_rate": 7.8e-4,
      "optim.schedule": "wsd",
      "optim.decay_steps": 11_302,
    },
  }
