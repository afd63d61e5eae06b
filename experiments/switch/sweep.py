"""The arms: tables 1 to 3 of Switch (2101.03961), and table 4 of ST-MoE (2202.08906).

Capacity factors are the papers', which do not multiply by the number of choices: two
choices have slots for half of the factor each, in training and in evaluation. All first
choices of a group take their slots before second ones, as in the papers' code.
"""

from configs import published, switch
from experiments import small, sweeps, tuning

CAPACITIES = (2.0, 1.25, 1.0)
HEADLINE = ("t5", "t5_wide", *(f"switch_{c}" for c in CAPACITIES))
HEADLINE += tuple(f"top2_{c}" for c in CAPACITIES)
# Arms of one change each, of the rest at the learning rate of `switch_1.25`.
ONE_CHANGE = (
  *("bfloat16", "selective", "init_1.0", "dropout_0.1", "dropout_0.1_0.4"),
)
# The task of T5's spans.
SHORT = ("short_t5", "short_t5_wide", "short_switch")
# At a rate at which some runs fail, for a sixth of the steps.
STABILITY = (
  *("fast", "fast_z_loss", "fast_clip", "fast_dropout", "fast_no_jitter"),
  *("fast_init_1.0", "fast_bfloat16", "fast_t5"),
)
FAST = 0.6  # Their learning rate, which does not fall.
SPANS = {"noise_density": 0.5, "mean_span": 16}
TARGETS = 129  # Tokens of the targets of 128 inputs, with these spans.
_TOP_2 = {
  "model.moe.top_k": 2,
  "model.moe.router.renormalize": True,
  "model.moe.router.second_expert": "random",
  "model.moe.router.second_threshold": 0.2,
  "model.moe.dispatcher.order": "choice",
  "model.moe.balancers.load.count": "first",
  "model.allow_noncausal": True,
}


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores: dense, one and two experts, two seeds."""
  c = _config(small.cpu_config())
  c.train.num_steps = 150
  arms = {k: _arms()[k] for k in ("t5", "switch_1.25", "top2_1.25")}
  return sweeps.Sweep(c, arms, seeds=2)


def cpu() -> sweeps.Sweep:
  """The committed scale: an hour and a half on two CPU cores, a run on each.

  The learning rate is tuned for the dense model, for one expert and for two.
  """
  tuned = {"t5": "t5", "switch": "switch_1.25", "top2": "top2_1.25"}
  like = {arm: tuned[arm.split("_")[0]] for arm in HEADLINE}
  like |= dict.fromkeys((*ONE_CHANGE, "short_switch"), "switch_1.25")
  like |= dict.fromkeys(("short_t5", "short_t5_wide"), "t5")
  rates = tuning.Stage(
    dict.fromkeys(tuned.values(), "optim.learning_rate"),
    (3e-2, 1e-1, 3e-1),
    metric="loss",
    like={arm: source for arm, source in like.items() if arm != source},
  )
  return sweeps.Sweep(
    _config(small.cpu_config()),
    _arms() | _short() | _fast(),
    seeds=8,
    stages=(rates,),
    seeds_of=dict.fromkeys(STABILITY, 16) | dict.fromkeys(SHORT, 5),
  )


def gpu() -> sweeps.Sweep:
  """Switch-Base with 32 experts and its dense model, for a part of the steps.

  Groups of 16 rows, so that up to 16 devices have whole ones.
  """
  c = switch.get_config("base_32")
  published.groups_of(c.model, 16 * 512, 16 * 114)
  return _published(c, 20_000, 256)


def pod() -> sweeps.Sweep:
  """The paper's own size: 128 experts, 100,000 steps of 2^20 tokens.

  Groups of 16 rows, so that 128 devices have one each.
  """
  c = switch.get_config("base_128")
  published.groups_of(c.model, 16 * 512, 16 * 114)
  return _published(c, 100_000, 2048)


SCALES = {"demo": demo, "cpu": cpu, "gpu": gpu, "pod": pod}


def _published(c, steps, batch_size):
  c.data.update(name="text_of_your_own", batch_size=batch_size)
  c.model.dtype = "float32"  # Of all arms but those about precision.
  c.train.num_steps = steps
  c.eval.update(every=steps // 10, batches_per_domain=16)
  c.eval.batch_size = batch_size
  kept = (*HEADLINE, *ONE_CHANGE)
  arms = {k: v for k, v in _arms().items() if k in kept and k != "t5_wide"}
  return sweeps.Sweep(c, arms, seeds=3)


def _config(c):
  """T5 of two layers on each side, the second with 16 experts.

  Half of the text is to be filled in, in long spans, so that a step has enough targets
  to learn from; the arms `SHORT` have T5's spans.
  """
  base = switch.get_config("base_16")
  c.task = dict(base.task) | SPANS
  c.data.separate_documents = False
  for key in (
    *("name", "pattern", "activation", "init_scale", "attention"),
    *("tie_embeddings", "scale_output", "scale_embedding", "norm_eps"),
    "embedding_variance",
  ):
    c.model[key] = base.model[key]
  c.model.update(num_layers=2, prefix=(), d_model=16, d_ff=32)
  c.model.update(num_heads=1, num_kv_heads=1, head_dim=16)
  c.model.moe = base.model.moe
  c.model.moe.d_expert = 32
  published.groups_of(c.model, 16 * 128, 16 * TARGETS)
  c.optim.optimizer = {"name": "adafactor"}
  c.optim.update(weight_decay=0.0, clip_norm=None)
  c.train.num_steps = 1500
  c.eval.update(every=150, batches_per_domain=16)
  return c


def _arms() -> sweeps.Arms:
  factors = {c: _capacity(c) for c in CAPACITIES}
  halves = {c: _capacity(c, 2) | _TOP_2 for c in CAPACITIES}
  dense = {"model.pattern": ("dense",)}
  one = {
    # Everything in bfloat16, and everything but the router (selective precision).
    "bfloat16": _in_bfloat16() | {"model.moe.router.dtype": "bfloat16"},
    "selective": _in_bfloat16(),
    "init_1.0": _init(1.0),
    "dropout_0.1": {"model.dropout": 0.1},
    "dropout_0.1_0.4": {"model.dropout": 0.1, "model.moe.expert_dropout": 0.4},
  }
  return {
    "t5": dense,
    "t5_wide": dense | {"model.d_ff": 128},
    **{f"switch_{c}": own for c, own in factors.items()},
    **{f"top2_{c}": own for c, own in halves.items()},
    **{name: _capacity(1.25) | own for name, own in one.items()},
  }


def _short():
  """Arms with T5's spans, of which 16 rows have 464 targets."""
  spans = {
    "task": dict(switch.get_config("base_16").task),
    "model.moe.tokens_per_group": 16 * 29,
  }
  own = {"t5": "t5", "t5_wide": "t5_wide", "switch": "switch_1.25"}
  return {f"short_{k}": spans | _arms()[arm] for k, arm in own.items()}


def _fast():
  """Arms at a learning rate at which some runs fail."""
  changes = {
    "fast": {},
    "fast_z_loss": {
      "model.moe.balancers.z": {"name": "z_loss", "coefficient": 1e-3}
    },
    "fast_clip": {"optim.optimizer.clip": 0.1},
    "fast_dropout": {"model.dropout": 0.1},
    "fast_no_jitter": {"model.moe.router.jitter": 0.0},
    "fast_init_1.0": _init(1.0),
    "fast_bfloat16": _arms()["bfloat16"],
    "fast_t5": {"model.pattern": ("dense",)},
  }
  short = {"train.num_steps": 250, "eval.every": 0}
  short |= {"optim.learning_rate": FAST, "optim.schedule": "constant"}
  return {k: short | _capacity(1.25) | own for k, own in changes.items()}


def _capacity(factor, top_k=1):
  """Slots for `factor` times the tokens in training, and for twice in evaluation."""
  return {
    "model.moe.capacity_factor": factor / top_k,
    "model.moe.eval_capacity_factor": max(2.0, factor) / top_k,
  }


def _in_bfloat16():
  return {"model.dtype": "bfloat16"}


def _init(scale):
  """The variance of all weights over that of the others."""
  keys = ("model", "model.moe", "model.moe.router")
  return {f"{key}.init_scale": scale for key in keys}
