"""The arms: a vision transformer, and the same with experts in every second layer.

V-MoE (2106.05974) has experts as wide as the dense network, of which a token takes two.
Here two experts together are as wide as it, so that arms have equal FLOPs, but for
`dense_wide`. Soft MoE (2308.00951) and experts that choose tokens have as many slots
as there are tokens, and experts as wide as the dense network.
"""

from configs import vmoe
from experiments import sweeps, tuning

TIGHT = 0.5  # Slots over assignments of the arms `plain_*` and `priority_*`.
# Arms of `sparse` with one change each, which take its learning rate.
LIKE_SPARSE = (
  *("top1", "last", "choice", "experts_4", "experts_32"),
  *(f"plain_{TIGHT}", f"priority_{TIGHT}", "no_losses", "distinct"),
)
LIKE_SOFT = ("soft_dot", "soft_dot_distinct")
ARMS = ("dense", "dense_wide", "sparse", "soft", *LIKE_SPARSE, *LIKE_SOFT)


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores: dense, sparse and soft on handwritten digits."""
  c = _config(32, 64, heads=2, experts=8)
  c.data.name = "digits"
  c.task = dict(c.task) | {"size": 8, "channels": 1, "num_classes": 10}
  c.model.image.patch = 2
  c.train.num_steps = 300
  c.eval.every = 100
  return _sweep(c, ("dense", "sparse", "soft"), tokens=16, seeds=2)


def cpu() -> sweeps.Sweep:
  """The committed scale: about an hour and a half on two CPU cores, a run on each.

  The learning rate is tuned for the dense model, for sparse and for soft experts.
  """
  like = {arm: "sparse" for arm in LIKE_SPARSE} | {"dense_wide": "dense"}
  like |= dict.fromkeys(LIKE_SOFT, "soft")
  keys = dict.fromkeys(("dense", "sparse", "soft"), "optim.learning_rate")
  rates = tuning.Stage(keys, (5e-4, 1e-3, 2e-3, 4e-3), metric="loss", like=like)
  c = _config(64, 128, heads=2, experts=8)
  return _sweep(c, ARMS, tokens=16, seeds=5, stages=(rates,))


def gpu() -> sweeps.Sweep:
  """V-MoE's S/16 on ImageNet for 90 passes: some hours a run on one accelerator."""
  c = _config(512, 2048, heads=8, experts=32)
  c.data.update(name="imagenet2012", batch_size=1024)
  augment = {"area": (0.05, 1.0), "flip": True, "mixup": 0.5}
  c.task = {
    "name": "classify_images",
    **{"size": 224, "channels": 3, "num_classes": 1000},
    "augment": augment,
  }
  c.model.update(num_layers=8, head_dim=64, dtype="bfloat16", remat="block")
  c.model.image.patch = 16
  c.optim.update(learning_rate=1e-3, warmup_steps=10_000)
  c.train.update(num_steps=112_600, log_every=100)
  c.checkpoint.every = 5000
  c.eval.update(every=10_000, batch_size=256)
  arms = [arm for arm in ARMS if not arm.startswith("experts")]
  return _sweep(c, arms, tokens=196, seeds=3)


SCALES = {"demo": demo, "cpu": cpu, "gpu": gpu}


def _config(width, d_ff, heads, experts):
  """V-MoE, but small: two of four layers have experts, and classes are exclusive."""
  c = vmoe.get_config("s_32")
  c.data.update(name="glyphs", batch_size=64)
  c.task = {
    "name": "classify_images",
    **{"size": 16, "channels": 3, "num_classes": 34},
  }
  m = c.model
  m.update(d_model=width, d_ff=d_ff, num_layers=4, dtype="float32")
  m.update(num_heads=heads, num_kv_heads=heads, head_dim=width // heads)
  m.image = {"patch": 4, "pooling": "mean"}
  m.remat = "none"
  m.moe.update(num_experts=experts, d_expert=d_ff // 2)
  m.moe.router = {"name": "top_k", "noise": 1 / experts}
  c.optim.update(learning_rate=2e-3, schedule="cosine", warmup_steps=50)
  c.optim.optimizer = {"name": "adamw"}
  c.train.num_steps = 2000
  c.checkpoint.every = 0  # A run takes minutes.
  c.eval.update(every=250, batch_size=64)
  return c


def _sweep(c, names, tokens, **options):
  """Arms by name, for images of so many tokens."""
  arms = _arms(c.model, tokens)
  return sweeps.Sweep(c, {name: arms[name] for name in names}, **options)


def _arms(m, tokens) -> sweeps.Arms:
  number, router = m.moe.num_experts, dict(m.moe.router)
  slots = -(-tokens // number)
  dropless = {
    "model.moe.d_expert": m.d_ff,
    "model.moe.balancers": {},
    "model.moe.capacity_factor": None,
    "model.moe.eval_capacity_factor": None,
    "model.moe.dispatcher": {"name": "sorted"},
  }
  average = number * slots / tokens
  soft = dropless | {
    "model.moe.top_k": slots,
    "model.moe.router": {"name": "soft", "normalize": True, "average": average},
    "model.moe.tokens_per_group": "sequence",
  }
  dot = {"model.moe.router": {"name": "soft", "average": average}}
  choice = {"name": "expert_choice", "rounding": "round"}
  tight = {
    "model.moe.capacity_factor": TIGHT,
    "model.moe.eval_capacity_factor": TIGHT,
  }
  priority = {"model.moe.router": router | {"priority": "score"}}
  return {
    "dense": {"model.pattern": ("dense",)},
    "dense_wide": {"model.pattern": ("dense",), "model.d_ff": 2 * m.d_ff},
    "sparse": {},
    "soft": soft,
    "soft_dot": soft | dot,
    "soft_dot_distinct": soft | dot | {"model.moe.equal_experts": False},
    "top1": {"model.moe.top_k": 1, "model.moe.d_expert": m.d_ff},
    "last": {"model.prefix": ("dense",) * (m.num_layers - 2)},
    "choice": dropless | {"model.moe.top_k": 1, "model.moe.router": choice},
    **{f"experts_{n}": _experts(n, router) for n in (4, 32)},
    f"plain_{TIGHT}": tight,
    f"priority_{TIGHT}": tight | priority,
    "no_losses": {"model.moe.balancers": {}},
    "distinct": {"model.moe.equal_experts": False},
  }


def _experts(number, router):
  """The arm with another number of experts, and noise to match."""
  return {
    "model.moe.num_experts": number,
    "model.moe.router": router | {"noise": 1 / number},
  }
