"""Videos from noise, along the velocity that a diffusion transformer predicts.

Euler's steps of d x / d t = v from t = 1, noise alone, to t = 0. With guidance g
v = v_none + g (v_condition - v_none) (2207.12598). Where networks are for ranges of
timesteps, as in Wan2.2, only the one in use is kept.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models.diffusion import Condition
from moe_jax.moe.types import Array

_ROUNDING = 1e-6  # A step at the boundary is of the network for more noise.


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

  steps: how many there are.
  shift: of their timesteps, see `tasks.denoise`.
  predict: what the model says, "velocity" or "noise".
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
  """The network of a timestep: the first whose lowest it has reached.

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
  tell: Callable[[int, float, str], None] = lambda *step: None,
) -> Array:
  """Videos, as numbers from about -1 to 1, or latents.

  Args:
    model: a `diffusion.Diffusion`; all networks have its sizes.
    networks: see `at`; the last one has 0 as its lowest.
    noise_BFHWC: of variance 1.
    condition: what the videos are to show.
    how: the steps.
    more_BFHWC: channels that the model reads beside; None: there are none.
    tell: called with the number of a step, its timestep and its network's name.
  """
  step = jax.jit(functools.partial(_step, model, how.predict))
  x, name, variables = noise_BFHWC, None, None
  for number, (time, after) in enumerate(zip(how.times, how.times[1:])):
    own = at(networks, time)
    if own.name != name:
      variables = None  # The one before is let go of first.
      name, variables = own.name, own.read()
    tell(number, float(time), name)
    x = step(variables, x, time, after, condition, own.guidance, more_BFHWC)
  return x


def _step(
  model, predict, variables, x, time, after, condition, guidance, more_BFHWC
):
  """x at the timestep after this one."""
  batch, x2 = len(x), jnp.concatenate([x, x])
  if more_BFHWC is not None:
    x2 = jnp.concatenate([x2, jnp.concatenate([more_BFHWC] * 2)], axis=-1)
  none = Condition(
    None if condition.label_B is None else jnp.full_like(condition.label_B, -1),
    None if condition.text_BMT is None else jnp.zeros_like(condition.text_BMT),
    condition.mask_BM,
  )
  both = jax.tree.map(lambda *pair: jnp.concatenate(pair), condition, none)
  time_B = jnp.full(2 * batch, time, x.dtype)
  with_it, without = jnp.split(model.apply(variables, x2, time_B, both)[0], 2)
  v = without + guidance * (with_it - without)
  if predict == "noise":  # v = noise - x_0, and x = (1 - t) x_0 + t noise.
    v = (v - x) / jnp.maximum(1 - time, 1e-3)
  return x + (after - time) * v
