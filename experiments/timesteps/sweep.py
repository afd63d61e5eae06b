"""The arms: a diffusion transformer for all timesteps, and two that share them.

`high_B` and `low_B` are the two networks of `two_B`: one for the timesteps from the
boundary B on, one for those below (Wan2.2, eDiff-I 2211.01324). Their steps are in
proportion to their timesteps and add up to those of `one`, so that all arms have the
FLOPs of `one` and as many active parameters. In `full_B` each has all the steps of `one`,
and `one_long` has both together.
"""

from configs import wan2_2
from experiments import sweeps, tuning

BOUNDARIES = (0.25, 0.5, 0.75, 0.875)
FULL = 0.5  # The boundary of the two networks that train for all steps each.


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores: one network and two, of handwritten digits."""
  c = _config(32, 64, steps=400)
  c.data.name = "digits"
  c.task = {"name": "denoise", "size": 8, "channels": 1, "num_classes": 10}
  c.model.video.patch = (1, 2, 2)
  return _sweep(c, ("one", *_names("two", 0.5)), seeds=2)


def cpu() -> sweeps.Sweep:
  """The committed scale: an hour and a half on two CPU cores, a run on each.

  The learning rate is tuned for the dense network and for one with experts.
  """
  return _sweep(_config(64, 128, steps=1500), None, seeds=5, tune=True)


def gpu() -> sweeps.Sweep:
  """A network of DiT-B's width on ImageNet at 64 pixels, 3 seeds.

  A run takes 7e18 operations, some hours of one accelerator.
  """
  c = _config(768, 3072, steps=200_000)
  c.data.update(name="imagenet2012", batch_size=256)
  c.task.update(size=64, num_classes=1000)
  c.model.update(num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64)
  c.model.update(dtype="bfloat16", remat="block")
  c.model.video.update(num_waves=256)
  c.optim.update(learning_rate=3e-4, warmup_steps=1000)
  c.train.log_every = 100
  c.checkpoint.every = 5000
  c.eval.update(every=20_000, batch_size=256, batches_per_domain=40)
  return _sweep(c, None, seeds=3)


SCALES = {"demo": demo, "cpu": cpu, "gpu": gpu}


def _names(kind, boundary):
  """The arms of the two networks of an arm "two" or "full"."""
  full = "" if kind == "two" else "full_"
  return tuple(f"{full}{side}_{boundary}" for side in ("high", "low"))


# {name of two networks: the arms that train them}
PAIRS = {f"two_{b}": _names("two", b) for b in BOUNDARIES}
PAIRS[f"full_{FULL}"] = _names("full", FULL)


def _config(width, d_ff, steps):
  """Wan2.2's layers with classes, but no text, and small; t is uniform."""
  c = wan2_2.get_config("t2v_a14b")
  c.task = {"name": "denoise", "size": 16, "channels": 3, "num_classes": 34}
  c.data.update(name="glyphs", batch_size=64)
  m = c.model
  m.update(d_model=width, d_ff=d_ff, num_layers=4, dtype="float32")
  m.update(num_heads=2, num_kv_heads=2, head_dim=width // 2, remat="none")
  m.video = {"patch": (1, 4, 4), "num_waves": 64}
  m.moe.update(num_experts=8, top_k=2, d_expert=d_ff // 2)
  m.moe.update(activation="gelu", use_bias=True, tokens_per_group="8 sequences")
  m.moe.balancers = {"load": {"name": "switch", "coefficient": 1e-2}}
  c.optim.update(learning_rate=2e-3, schedule="cosine", warmup_steps=20)
  c.train.num_steps = steps
  c.checkpoint.every = 0  # A run takes minutes.
  c.eval.update(every=0, batch_size=64)
  return c


def _sweep(c, names, seeds, tune=False):
  """The arms of these names; None: all."""
  arms, stages = _arms(c.model, c.train.num_steps), ()
  if names:
    arms = {name: arms[name] for name in names}
  if tune:
    own = dict.fromkeys(("one", "moe"), "optim.learning_rate")
    like = {arm: "one" for arm in arms if arm not in own}
    like |= {arm: "moe" for arm in arms if arm.startswith("by_time")}
    rates = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    stages = (tuning.Stage(own, rates, metric="loss", like=like),)
  return sweeps.Sweep(c, arms, seeds=seeds, stages=stages)


def _arms(m, steps) -> sweeps.Arms:
  pairs = {}
  for name, sides in PAIRS.items():
    boundary, is_full = float(name.split("_")[1]), name.startswith("full")
    shares = (1, 1) if is_full else (1 - boundary, boundary)
    for arm, expert, share in zip(sides, ("high", "low"), shares):
      pairs[arm] = {
        "task.boundary": boundary,
        "task.expert": expert,
        "train.num_steps": round(share * steps),
      }
  longer = {arm: pairs.pop(arm) for arm in PAIRS[f"full_{FULL}"]}
  return {
    "one": {},
    **pairs,
    "moe": {"model.pattern": ("moe",)},
    **{f"by_time_{n}": _by_time(m, n) for n in (2, 8)},
    "one_long": {"train.num_steps": 2 * steps},
    **longer,
  }


def _by_time(m, number):
  """Layers with one expert for each of so many equal ranges of timesteps."""
  router = {
    "name": "by_feature",
    "feature": "timestep",
    "num_values": number,
    "boundaries": tuple(n / number for n in range(1, number)),
  }
  return {
    "model.pattern": ("moe",),
    "model.moe.router": router,
    "model.moe.num_experts": number,
    "model.moe.top_k": 1,
    "model.moe.d_expert": m.d_ff,
    "model.moe.balancers": {},
  }
