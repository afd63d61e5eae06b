"""The arms: a dense model, what is made of it, and the same model from scratch.

Every layer has 8 experts as wide as the dense network, of which a token takes two
(OLMoE, 2409.02060, section 4.1.5), or 32 of a quarter of it, of which it takes eight.
Learning rates are constant after the warm-up, so that a curve is also a comparison at
each of its steps.
"""

from experiments import small, sweeps, tuning

COPIES = ("copy", "copy_raw", "drop", "granular")
SCRATCH = ("scratch", "scratch_granular")
# Arms that start from a trained dense model, and which one.
STARTS = dict.fromkeys((*COPIES, "dense_on"), "dense")
STARTS["copy_long"] = "dense_long"
DENSE = ("dense", "dense_long", "dense_on")


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores: a dense model, its copies, and from scratch."""
  c = _config(small.demo_config(), 128)
  c.eval.every = 50
  return _sweep(c, ("dense", "scratch", "copy"), (150, 300, 438), seeds=2)


def cpu() -> sweeps.Sweep:
  """The committed scale: less than two hours on two CPU cores, a run on each.

  The learning rate is tuned for the dense model and from scratch, then for the
  copies; the other arms take theirs.
  """
  c = _config(small.cpu_config(), 128)
  c.eval.update(every=100, batches_per_domain=32)
  key, rates = "optim.learning_rate", (1e-3, 3e-3, 1e-2, 3e-2)
  like = dict.fromkeys(DENSE[1:], "dense") | {"scratch_granular": "scratch"}
  first = tuning.Stage({"dense": key, "scratch": key}, rates, like=like)
  like = dict.fromkeys((*COPIES[1:], "copy_long"), "copy")
  second = tuning.Stage({"copy": key}, rates, like=like)
  arms = (*DENSE, *SCRATCH, *STARTS)
  return _sweep(c, arms, (500, 1500, 2112), seeds=5, stages=(first, second))


def gpu() -> sweeps.Sweep:
  """A dense model of 124 million parameters: about three days on eight accelerators."""
  c = _published(768, 12, 12, 2048, 256)
  return _sweep(c, (*DENSE, *SCRATCH, *STARTS), (10_000, 20_000, 25_700))


def pod() -> sweeps.Sweep:
  """The widths of OLMoE's comparison, of whose dense tokens it takes a tenth."""
  c = _published(2048, 16, 16, 8192, 1024)
  return _sweep(
    c, (*DENSE, *SCRATCH, *STARTS), (48_000, 36_000, 56_100), seeds=1
  )


SCALES = {"demo": demo, "cpu": cpu, "gpu": gpu, "pod": pod}


def _sweep(c, names, steps, **options):
  """Arms by name.

  Args:
    steps: of the dense model, of models with experts, and of a dense model with the
      FLOPs of these.
  """
  dense, sparse, alike = steps
  arms = {
    name: own for name, own in _arms(c.model.d_ff).items() if name in names
  }
  number = {"dense": dense, "dense_long": 3 * dense, "dense_on": alike}
  for name, own in arms.items():
    own["train.num_steps"] = number.get(name, sparse)
  starts = {arm: source for arm, source in STARTS.items() if arm in arms}
  return sweeps.Sweep(c, arms, starts=starts, **options)


def _arms(width):
  dense = {"model.pattern": ("dense",)}
  raw = {"model.moe.router": {"name": "top_k"}}
  cuts = {
    "model.moe.num_experts": 32,
    "model.moe.top_k": 8,
    "model.moe.d_expert": width // 4,
  }
  methods = dict.fromkeys(("copy", "copy_raw", "copy_long"), "copy")
  methods |= {"drop": "drop", "granular": "granular"}
  own = {"copy_raw": raw, "granular": cuts, "scratch_granular": cuts}
  return {
    **{name: dict(dense) for name in DENSE},
    **{name: dict(own.get(name, {})) for name in SCRATCH},
    **{
      name: own.get(name, {}) | {"upcycle": {"method": method}}
      for name, method in methods.items()
    },
  }


def _config(c, width):
  """8 experts in every layer, dropless; weights add up to 1, so that copies are kept."""
  c.model.update(prefix=(), d_ff=width)
  c.model.moe.update(
    num_experts=8, top_k=2, d_expert=width, num_shared_experts=0
  )
  c.model.moe.capacity_factor = None
  c.model.moe.router = {"name": "top_k", "renormalize": True}
  c.model.moe.dispatcher = {"name": "sorted"}
  c.model.moe.balancers = {"loss": {"name": "switch", "coefficient": 1e-2}}
  c.optim.schedule = "constant"
  return c


def _published(d_model, layers, heads, width, batch_size):
  c = _config(small.cpu_config(), width)
  c.data.update(name="text_of_your_own", seq_len=4096, batch_size=batch_size)
  c.model.update(d_model=d_model, num_layers=layers, head_dim=d_model // heads)
  c.model.update(num_heads=heads, num_kv_heads=heads, rope_theta=10_000.0)
  c.model.dtype = "bfloat16"
  c.model.moe.tokens_per_group = 4096
  c.optim.update(learning_rate=4e-4, warmup_steps=2000, weight_decay=0.1)
  c.optim.optimizer.b2 = 0.95
  c.checkpoint.every = 1000
  c.train.log_every = 50
  c.eval.update(every=1000, batch_size=batch_size)
  return c
