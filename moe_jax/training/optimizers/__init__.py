"""Optimizers by name: adamw, adafactor, muon, sgd, and those of plugins.

An update is a direction, plus decoupled weight decay, times a learning rate.
None of these numbers is compiled into a program: they are its arguments.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.core import registry, roles
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, optional, part, section
from moe_jax.training.optimizers import schedules

SHARED = ("schedules",)
_FACTORS = section(dict.fromkeys(roles.FACTORS, number(0)), required=())
OPTIONS = schedules.OPTIONS | {
  "optimizer": part(),
  "weight_decay": number(0),
  "learning_rate_factors": _FACTORS,
  "weight_decay_factors": _FACTORS,
  "part_warmup_steps": section(dict.fromkeys(roles.FACTORS, integer(1)), ()),
  "clip_norm": optional(number(above=0)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
  """The record that the file of an optimizer builds.

  direction: (numbers, tree of `roles.Role`) -> optax.GradientTransformation,
    whose updates point along the gradient. It is a function of the module, not
    one that `build` makes: sections with the same function, and numbers of the
    same names, share a compiled program.
  numbers: {name: number} for `direction`, which gets them as scalars in jit.
  decays: whether weight decay is added.
  """

  direction: Callable[[Mapping[str, Any], Any], optax.GradientTransformation]
  numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
  decays: bool = True


PART = Optimizer  # The record that `build` of each file returns.


def load(section: Mapping, plugins: tuple[str, ...] = ()) -> Optimizer:
  """Returns the optimizer that a section `optim` names.

  Args:
    section: see `configs/base.py`.
    plugins: folders with optimizers/NAME.py of the user.

  Raises:
    ConfigError: there is no such optimizer, or its options are impossible.
  """
  return registry.from_config(
    "optimizers", section["optimizer"], "optim.optimizer", plugins=plugins
  )


def numbers(
  section: Mapping, num_steps: int, plugins: tuple[str, ...] = ()
) -> dict[str, Any]:
  """Returns the numbers of a section `optim`: a tree of floats and ints.

  Python's numbers, and weakly typed arrays, do not change the dtype of a
  parameter. All numbers that need no array are computed here, in double
  precision.

  Args:
    section, plugins: as in `load`.
    num_steps: length of the run, the end of the schedule.

  Raises:
    ConfigError: as in `load`; or the schedule does not fit into the run.
  """
  optimizer = load(section, plugins)
  rates, decays = (
    _of_all_parts(section[f"{name}_factors"])
    for name in ("learning_rate", "weight_decay")
  )
  if not any(rates.values()):
    raise ConfigError(
      "optim.learning_rate_factors are 0 for all parts, so that nothing is learnt; the"
      " part rest is all that are not named"
    )
  decay = section["weight_decay"] if optimizer.decays else 0.0
  warmups = _of_all_parts(section["part_warmup_steps"], None)
  return {
    "direction": dict(optimizer.numbers),
    "schedule": schedules.numbers(section, num_steps),
    "factors": rates,
    "decay": {part: decay * factor for part, factor in decays.items()},
    "clip_norm": section["clip_norm"],
    "warmups": {part: 1 / n for part, n in warmups.items() if n},
  }


def _of_all_parts(given, default=1.0):
  """{part: number}; a part without its own has the number of "rest"."""
  rest = given.get("rest", default)
  return {part: given.get(part, rest) for part in roles.FACTORS}


def build(
  direction: Callable, of_params, numbers: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Returns the optimizer, which may be built inside of the compiled step.

  Args:
    direction: of an `Optimizer`.
    of_params: the parameters' roles, from `roles.of`.
    numbers: from `numbers`, or tracers in their place.
  """

  def scaled(updates, params):
    def leaf(role, u, p):
      if role.is_decayed:
        u += numbers["decay"][role.factor] * p
      return u * numbers["factors"][role.factor]

    return jax.tree.map(leaf, of_params, updates, params)

  clip = numbers["clip_norm"]
  return optax.chain(
    optax.identity() if clip is None else optax.clip_by_global_norm(clip),
    direction(numbers["direction"], of_params),
    optax.stateless(scaled),
    _by_rate(numbers, of_params),
  )


def _by_rate(numbers, of_params):
  """Updates times the rate of a step; parts may have warm-ups of their own."""
  rate = schedules.rate(numbers["schedule"])
  if not numbers["warmups"]:
    return optax.scale_by_learning_rate(rate)

  def update(updates, state, params=None):
    del params
    step = state.count

    def leaf(role, u):
      part = numbers["warmups"].get(role.factor)
      ramp = 1.0 if part is None else jnp.minimum((step + 1) * part, 1.0)
      return u * (-rate(step) * ramp)

    scaled = jax.tree.map(leaf, of_params, updates)
    return scaled, optax.ScaleByScheduleState(optax.safe_increment(step))

  return optax.GradientTransformation(
    optax.scale_by_learning_rate(rate).init, update
  )
