"""The arms: a switch loss of two sizes, a loss-free bias, or nothing."""

from experiments import small, sweeps, tuning

_BALANCERS = "model.moe.balancers"


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores.

  The bias moves by 1e-2 a step, ten times the rate of Wang et al.: they have
  40,000 steps to move it in, and here are some hundred.
  """
  return sweeps.Sweep(small.demo_config(), _balancers(bias=1e-2), seeds=3)


def cpu() -> sweeps.Sweep:
  """The committed scale: an hour of seeds on two CPU cores, a run on each.

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
  return sweeps.Sweep(small.cpu_config(), arms, seeds=8, stages=(rates,))


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
  for size, d_ff in (("1b", 3984), ("3b", 6584)):  # Same active parameters.
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


def _pod_config():
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


def _sizes():
  """Widths, and the hidden width of a dense layer over the granularity."""
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
