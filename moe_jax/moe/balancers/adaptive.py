"""A load loss whose coefficient moves toward a wanted imbalance.

  loss = c * E * sum_i f_i P_i                     (the `switch` loss)
  c <- c * factor^sign(MaxVio - target), after every step, in [lowest, highest]

MaxVio is (max load - mean load) / mean load of the step. One does not have to guess a
coefficient, and the loss fades where loads are even enough. AxLearn drives its
coefficient by the rows beyond capacity in the same way; ReMoE that of an L1 term, see
`l1`. The target must lie above what random choices give, see `max_vio_floor` in the
metrics: below it the coefficient only grows.
"""

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import number, word
from moe_jax.moe.balancers import switch
from moe_jax.moe.types import Balancer, Mean

CONTRACT_OPTIONS = {"target": 0.5, "start": 1.0}


def build(
  target: number(above=0),
  start: number(above=0) = 1e-3,
  factor: number(above=1) = 1.02,
  lowest: number(above=0) = 1e-6,
  highest: number(above=0) = 10.0,
  scope: word(*switch.SCOPES) = "micro_batch",
) -> Balancer:
  """A balancer whose load loss has a coefficient for each layer that moves.

  Args:
    target: MaxVio above which the coefficient grows.
    start: the coefficient at first.
    factor: by which the coefficient grows or shrinks in a step.
    lowest: the smallest coefficient.
    highest: the largest coefficient.
    scope: over which tokens f and P are formed, as in `switch`.

  Raises:
    ConfigError: `lowest` is above `highest`.
  """
  load_loss = switch.build(1.0, scope).loss

  def loss(state, stats, so_far_E, router_params):
    value = load_loss({}, stats, so_far_E, router_params)
    return Mean(state["coefficient"] * value.total, value.weight)

  def update(state, stats, step):
    del step
    before = state["coefficient"]
    load_E = stats.count_E.sum((0, 1)).astype(before.dtype)
    mean = load_E.mean()
    max_vio = load_E.max() / jnp.maximum(mean, 1) - 1
    after = moved(before, max_vio - target, factor, lowest, highest)
    return {"coefficient": jnp.where(mean > 0, after, before)}

  needs = frozenset({"prob_TE", "loads"})
  init = first(start, lowest, highest)
  parts = dict(init=init, loss=loss, update=update, needs=needs)
  return Balancer(**parts, max_vio=target)


def first(start, lowest, highest):
  """`Balancer.init` of a coefficient that moves between two ends.

  Args:
    start: the coefficient at first; outside of the ends it is the nearer one.
    lowest: the smallest coefficient.
    highest: the largest coefficient.

  Raises:
    ConfigError: the lowest one is above the highest one.
  """
  known = all(isinstance(x, int | float) for x in (lowest, highest))
  if known and lowest > highest:  # In a step they are arrays, already checked.
    raise ConfigError(
      f"lowest = {lowest:g} is above highest = {highest:g}; exchange them"
    )

  def init(num_experts):
    del num_experts
    return {"coefficient": jnp.clip(jnp.full((), start), lowest, highest)}

  return init


def moved(coefficient, excess, factor, lowest, highest):
  """The coefficient times or over `factor`, as the excess is above or below 0.

  Args:
    coefficient: a scalar.
    excess: a scalar, the measured value minus the wanted one.
    factor: above 1.
    lowest: the smallest coefficient.
    highest: the largest coefficient.
  """
  moved = coefficient * factor ** jnp.sign(excess)
  return jnp.clip(moved, lowest, highest)
