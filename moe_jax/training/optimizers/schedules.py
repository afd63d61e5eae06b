"""Learning rates by step, whose numbers are arguments of the compiled step.

XLA folds constants: it multiplies by 1/x where a program divides by x, and
joins constant factors. `numbers` does the same, so that a rate has the bits
that it would have if its numbers stood in the program.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, word

OPTIONS = {
  "learning_rate": number(0),
  "warmup_steps": integer(0),
  "schedule": word("constant", "cosine", "wsd", "rsqrt"),
  "decay_steps": integer(0),
  "final_fraction": number(0, 1),
}


def numbers(section: Mapping, num_steps: int) -> dict[str, Any]:
  """Returns the numbers that `rate` takes; their names tell the schedule.

  Args:
    section: `optim` of a config.
    num_steps: length of the run.

  Raises:
    ConfigError: the schedule does not fit into the run.
  """
  peak, warmup = section["learning_rate"], section["warmup_steps"]
  fraction, decay = section["final_fraction"], section["decay_steps"]
  rest = num_steps - warmup
  if rest <= 0:
    raise ConfigError(
      f"optim.warmup_steps = {warmup} is not between 0 and train.num_steps ="
      f" {num_steps}; change one of them"
    )
  if section["schedule"] == "wsd" and not 0 < decay <= rest:
    raise ConfigError(
      f"optim.decay_steps = {decay} is not between 1 and the {rest} steps after"
      " the warm-up"
    )
  if section["schedule"] == "rsqrt" and not 0 < decay >= warmup:
    raise ConfigError(
      f"optim.decay_steps = {decay} is not the number of steps after which the"
      f' schedule "rsqrt" falls, from the {warmup} of the warm-up on; give one, such'
      " as 10_000 (T5)"
    )
  # Step s counts from 0: the first update already moves, and the last update of
  # the warm-up is at the peak.
  warm = _line(peak / max(warmup, 1), peak, warmup - 1)
  n = {"peak": peak, "warmup": warmup, "warm": warm}
  if section["schedule"] == "cosine":
    steps, scalar = max(rest - 1, 1), _scalar()
    angle = float(scalar(np.pi) * (scalar(1) / scalar(steps)))
    n |= {"steps": steps, "angle": angle, "half": 0.5 * (1 - fraction)}
    n |= {"floor": fraction}
  if section["schedule"] == "wsd":
    start = peak * (1 - 1 / decay) + peak * fraction / decay
    down = _line(start, peak * fraction, decay - 1)
    n |= {"stable": rest - decay, "down": down}
  if section["schedule"] == "rsqrt":
    n |= {"held": float(decay), "root": peak * decay**0.5}
  return n


def steps_of_longer(section: Mapping, num_steps: int) -> int | None:
  """Returns the number of first steps that have the same rates in longer runs.

  Args:
    section: `optim` of the config.
    num_steps: length of the run.

  Returns:
    None for a schedule in which the length decides the rate of every step.
  """
  if section["schedule"] == "cosine":
    return None
  of_decay = section["decay_steps"] if section["schedule"] == "wsd" else 0
  return num_steps - of_decay


def rate(n: Mapping[str, Any]) -> optax.Schedule:
  """Returns a schedule: linear warm-up to the peak, and then

  "constant"; "rsqrt": stable up to step `decay_steps`, then its peak times
  sqrt(decay_steps / step) (T5, 1910.10683); "cosine" down to `final_fraction`
  of it at the last step; "wsd": stable, then linear to `final_fraction` over
  the last `decay_steps`.

  Args:
    n: from `numbers`.
  """

  def schedule(step):
    past, after = step - n["warmup"], n["peak"]
    if "angle" in n:
      cosine = jnp.cos(jnp.minimum(past, n["steps"]) * n["angle"])
      after = ((cosine + 1) * n["half"] + n["floor"]) * n["peak"]
    if "down" in n:
      down = _on_line(n["down"], past - n["stable"])
      after = jnp.where(past < n["stable"], n["peak"], down)
    if "root" in n:
      after = n["root"] * jax.lax.rsqrt(jnp.maximum(step + 1.0, n["held"]))
    return jnp.where(past < 0, _on_line(n["warm"], step), after)

  return schedule


def _line(first, last, steps):
  """A line from `first` to `last` in this many steps, at least 1."""
  steps, scalar = max(steps, 1), _scalar()
  inverse = float(scalar(1) / scalar(steps))
  return {"steps": steps, "inverse": inverse, "by": first - last, "last": last}


def _on_line(line, step):
  left = 1 - jnp.clip(step, 0, line["steps"]) * line["inverse"]
  return left * line["by"] + line["last"]


def _scalar():
  """The type of a float in a program: float32, or float64 with x64."""
  return jax.dtypes.canonicalize_dtype(float).type
