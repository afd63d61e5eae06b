"""Videos from noise, along the velocity that a diffusion transformer predicts.

These are Euler's steps of d x / d t = v from t = 1, noise alone, to t = 0. With
guidance g, v = v_none + g (v_condition - v_none) (2207.12598). Where networks
are for ranges of timesteps, as in Wan2.2, only the one in use is kept in
memory.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models.diffusion import Condition
from moe_jax.moe.types import Array

_ROUNDING = 1e-6  # At a boundary the network for more noise makes the step.


class Network(NamedTuple):
  """A network, and the timesteps that it is for.

  name: for reports.
  lowest: its timesteps are this and above, up to those of the network before.
  read: () -> its variables, called when its first step comes.
  guidance: g of its steps.
  """

  name: str
  lowest: float
  read: Callable[[], dict]
  guidance: float = 1.0


class Sampling(NamedTuple):
  """Steps of a sampler.

  steps: number of steps.
  shift: of their timesteps, see `tasks.denoise`.
  predict: the model's prediction, "velocity" or "noise".
  """

  steps: int = 40
  shift: float = 1.0
  predict: str = "velocity"

  @property
  def times(self) -> np.ndarray:
    """The timesteps [steps + 1], from 1 to 0."""
    u = np.linspace(1, 0, self.steps + 1)
    return self.shift * u / (1 + (self.shift - 1) * u)


def at(networks: tuple[Network, ...], time: float) -> Network:
  """Returns the network of a timestep: the first with `lowest` not above it.

  Args:
    networks: from those for the most noise to those for the least.
    time: from 0 to 1.
  """
  return next(one for one in networks if time >= one.lowest - _ROUNDING)


def sample(
  model,
  networks: tuple[Network, ...],
  noise_BFHWC: Array,
  condition: Condition,
  how: Sampling,
  more_BFHWC: Array | None = None,
  none: Condition | None = None,
  tell: Callable[[int, float, str], None] = lambda *step: None,
  at_once: int | None = None,
) -> np.ndarray:
  """Returns videos, as numbers from about -1 to 1, or latents, [B, F, H, W, C].

  Args:
    model: a `diffusion.Diffusion`; all networks have its sizes.
    networks: see `at`; the last one has 0 as its lowest.
    noise_BFHWC: of variance 1.
    condition: the class and the text of the videos.
    how: the steps.
    more_BFHWC: further channels that the model reads; None: there are none.
    none: the condition that guidance leads away from; None: `condition.none`.
    tell: called with the number of a step, its timestep and its network's name.
    at_once: number of videos that are computed together, which divides B; None:
      all. Each network is read once for all of them.
  """
  step = _compiled(model, how.predict)
  given = condition, condition.none if none is None else none, more_BFHWC
  number = at_once or len(noise_BFHWC)
  x, beside = zip(*_parts((noise_BFHWC, given), len(noise_BFHWC), number))
  steps = enumerate(zip(how.times, how.times[1:]))
  for own, group in itertools.groupby(steps, lambda s: at(networks, s[1][0])):
    its, variables = [*group], jax.device_put(own.read())
    for n, (time, _) in its:
      tell(n, float(time), own.name)
    run = functools.partial(step, variables, guided=own.guidance != 1)
    moved = functools.partial(_moved, run, its, own.guidance)
    x = [*map(moved, x, beside)]
    del variables, run, moved  # They make room for the next network.
  return np.concatenate(x)


def _parts(arrays, length, number):
  """Arrays [B, ...] in parts of `length` rows."""
  for first in range(0, length, number):
    part = slice(first, first + number)
    yield jax.tree.map(operator.itemgetter(part), arrays)


def _moved(step, steps, guidance, x, beside):
  """x after the steps of one network, on the host."""
  for _, times in steps:
    x = step(x, times, *beside, guidance)
  return np.asarray(x)


@functools.lru_cache(maxsize=8)  # A hook samples many times in a run.
def _compiled(model, predict):
  step = functools.partial(_step, model, predict)
  return jax.jit(step, static_argnames="guided")


def _step(
  model,
  predict,
  variables,
  x,
  times,
  condition,
  none,
  more_BFHWC,
  guidance,
  *,
  guided,
):
  """x at the second of two timesteps; it is at the first."""
  time, after = times

  def predicted(conditions):
    number = len(conditions)
    given = x
    if more_BFHWC is not None:
      given = jnp.concatenate([x, more_BFHWC], axis=-1)
    given = jnp.concatenate([given] * number)
    together = jax.tree.map(lambda *xs: jnp.concatenate(xs), *conditions)
    time_B = jnp.full(number * len(x), time, x.dtype)
    found, _ = model.apply(variables, given, time_B, together)
    return jnp.split(found, number)

  if guided:
    without, with_it = predicted([none, condition])
    v = without + guidance * (with_it - without)
  else:
    (v,) = predicted([condition])
  if predict == "noise":
    # v = noise - x_0, and x = (1 - t) x_0 + t noise. At t = 1, where x does not
    # depend on x_0, v is taken at the middle of the step.
    v = (v - x) / jnp.maximum(1 - time, (time - after) / 2)
  return x + (after - time) * v
