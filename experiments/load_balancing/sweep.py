"""The arms: a switch loss of two sizes, a loss-free bias, or nothing."""

from experiments import small, sweeps, tuning, wang

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

  on every host. `wang.py` says what is theirs.
  """
  sizes = wang.sizes()
  arms = sweeps.product(sizes, _balancers(bias=1e-3))
  for size, d_ff in (("1b", 3984), ("3b", 6584)):  # Same active parameters.
    dense = {"model.pattern": ("dense",), "model.d_ff": d_ff}
    arms[f"{size}-dense"] = sizes[size] | dense
  return sweeps.Sweep(wang.config(), arms, seeds=1)


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
