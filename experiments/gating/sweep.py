"""The arms: gate x balancer x whether the chosen weights are renormalised."""

from experiments import small, sweeps, tuning

TARGET = 0.3  # The max_vio_global at which all arms are compared.


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores; nothing is tuned, so the balance is not equal."""
  return sweeps.Sweep(small.demo_config(), _arms(), seeds=1)


def cpu() -> sweeps.Sweep:
  """The committed scale: over an hour on two CPU cores, a run on each.

  First the learning rate is tuned, then the strength of the balancer, to the
  same balance for every arm.
  """
  rates = tuning.Stage("optim.learning_rate", (3e-3, 1e-2, 3e-2))
  strengths = tuning.Stage(
    key={arm: _STRENGTH[arm.split("-")[-1]] for arm in _arms()},
    values={arm: _tried(arm) for arm in _arms()},
    metric="max_vio_global",
    target=TARGET,
    seeds=3,  # A single seed is off by a sixth.
  )
  return sweeps.Sweep(
    small.cpu_config(), _arms(), seeds=8, stages=(rates, strengths)
  )


SCALES = {"demo": demo, "cpu": cpu}

_STRENGTH = {
  "loss": "model.moe.balancers.loss.coefficient",
  "bias": "model.moe.balancers.bias.rate",
}


def _arms():
  """softmax-renorm-loss, ..., sigmoid-raw-bias."""
  arms = {}
  for score in ("softmax", "sigmoid"):
    gate = {"name": "top_k", "score": score}
    forms = sweeps.over(
      "model.moe.router",
      {
        f"{score}-renorm": gate | {"renormalize": True},
        f"{score}-raw": gate | {"renormalize": False},
      },
    )
    balancers = sweeps.over(
      "model.moe.balancers",
      {
        "loss": {"loss": {"name": "switch", "coefficient": 1e-2}},
        "bias": {"bias": {"name": "bias", "rate": _RATE[score]}},
      },
    )
    arms |= sweeps.product(forms, balancers)
  return arms


# Rates in the unit of the scores; softmax scores sum to 1 over the experts.
_RATE = {"softmax": 1e-4, "sigmoid": 1e-2}


def _tried(arm):
  """Strengths of its balancer."""
  score, _, balancer = arm.split("-")
  if balancer == "loss":
    return (1e-2, 3e-2)
  if score == "softmax":
    return (3e-4, 1e-3, 3e-3)
  return (3e-3, 1e-2, 3e-2)
