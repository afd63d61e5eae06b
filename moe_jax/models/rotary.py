"""Rotary positions (2104.09864), and how they are stretched to long contexts."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.moe.types import Array


@dataclasses.dataclass(frozen=True)
class Plain:
  """theta^(-2i/h) for the pair i of h/2."""

  magnitude = 1.0
  softmax = 1.0

  def frequencies(self, theta: float, width: int, dtype) -> Array:
    half = width // 2
    return theta ** (-jnp.arange(half, dtype=dtype) / half)


@dataclasses.dataclass(frozen=True)
class Yarn(Plain):
  """Slow pairs turn `factor` times slower, fast ones as before (2309.00071).

  factor: of the context's length over the original one.
  original_length: tokens that the model was trained with before.
  beta_fast, beta_slow: a pair is fast from so many turns over the original
    length on, and slow up to so many; a ramp lies between them.
  truncate: round the ends of the ramp outwards to whole pairs.
  attention_factor: of the rotated vectors; None: 0.1 ln(factor) + 1.
  mscale, mscale_all_dim: DeepSeek's way to say it instead: rotated vectors
    times m(mscale) / m(mscale_all_dim), scores times m(mscale_all_dim)^2, where
    m(s) = 0.1 s ln(factor) + 1.
  """

  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None

  def frequencies(self, theta, width, dtype):
    plain = super().frequencies(theta, width, dtype)

    def pair_with(turns):
      length = self.original_length / (turns * 2 * math.pi)
      return width * math.log(length) / (2 * math.log(theta))

    low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (jnp.arange(width // 2, dtype=dtype) - low) / max(high - low, 1e-3)
    slow = jnp.clip(ramp, 0, 1)
    return plain * (1 - slow) + plain / self.factor * slow

  @property
  def magnitude(self):
    """Factor of the rotated vectors."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return self._m(self.mscale) / self._m(self.mscale_all_dim)
    return self._m(1.0)

  @property
  def softmax(self):
    """Factor of the scores of latent attention."""
    return self._m(self.mscale_all_dim or 0.0) ** 2

  def _m(self, scale):
    return 0.1 * scale * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Wavelength(Plain):
  """Long waves become `factor` times longer (Llama 3, 2407.21783).

  factor: how much slower.
  original_length: tokens that the model was trained with before.
  low_freq_factor, high_freq_factor: a pair is slow up to so many turns over the
    original length, and fast from so many on; a ramp lies between them.
  """

  factor: float
  original_length: int
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  def frequencies(self, theta, width, dtype):
    plain = super().frequencies(theta, width, dtype)
    turns = self.original_length * plain / (2 * math.pi)
    width_of_ramp = self.high_freq_factor - self.low_freq_factor
    fast = jnp.clip((turns - self.low_freq_factor) / width_of_ramp, 0, 1)
    return plain * fast + plain / self.factor * (1 - fast)


SCALINGS = {"yarn": Yarn, "wavelength": Wavelength}


def scaling(section: Mapping | None) -> Plain:
  """The scaling that a config describes: {"name": "yarn", options}, or None.

  Raises:
    ConfigError: an unknown name or option, or a missing one.
  """
  if not section:
    return Plain()
  options = dict(section)
  name = options.pop("name", None)
  if name not in SCALINGS:
    raise ConfigError(
      f'there is no rope_scaling "{name}"' + did_you_mean(str(name), SCALINGS)
    )
  known = {f.name for f in dataclasses.fields(SCALINGS[name])}
  for key in options:
    if key not in known:
      raise ConfigError(
        f'the rope_scaling {name} has no "{key}"' + did_you_mean(key, known)
      )
  for key in ("factor", "original_length"):
    if not options.get(key, 0) > 0:
      raise ConfigError(f"the rope_scaling {name} needs {key} > 0")
  return SCALINGS[name](**options)


def rotate(
  x_BLHh: Array,
  position_BL: Array,
  theta: float,
  *,
  interleaved: bool = False,
  scaling: Plain = Plain(),
) -> Array:
  """Rotates pairs by position * frequency, in at least float32.

  Args:
    x_BLHh: h is even.
    position_BL: or [1, L].
    theta: base of the frequencies.
    interleaved: pairs are (2i, 2i + 1), and not (i, i + h/2).
    scaling: of the frequencies.
  """
  half = x_BLHh.shape[-1] // 2
  dtype = jnp.promote_types(x_BLHh.dtype, jnp.float32)
  frequency = scaling.frequencies(theta, 2 * half, dtype)
  angle = position_BL[..., None].astype(dtype) * frequency[None, None, :]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  if scaling.magnitude != 1:
    cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
  if interleaved:
    a, b = x_BLHh[..., ::2], x_BLHh[..., 1::2]
  else:
    a, b = x_BLHh[..., :half], x_BLHh[..., half:]
  rotated = a * cos - b * sin, b * cos + a * sin
  if interleaved:
    rotated = jnp.stack(rotated, axis=-1).reshape(x_BLHh.shape)
  else:
    rotated = jnp.concatenate(rotated, axis=-1)
  return rotated.astype(x_BLHh.dtype)
