"""Positions in attention: rotations (2104.09864), temperatures, biases."""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moe_jax.core import roles
from moe_jax.core.options import arguments, integer, named, number, optional
from moe_jax.moe.types import Array


@dataclasses.dataclass(frozen=True)
class Plain:
  """A frequency of theta^(-2i/h) for the pair i of h/2."""

  magnitude = 1.0
  softmax = 1.0

  def frequencies(self, theta: float, width: int, dtype) -> Array:
    """Returns the frequency of every pair, [width / 2], in radians a position.

    Args:
      theta: base of the frequencies.
      width: h, numbers of a head that turn.
      dtype: of the result.
    """
    half = width // 2
    return theta ** (-jnp.arange(half, dtype=dtype) / half)


@dataclasses.dataclass(frozen=True)
class Yarn(Plain):
  """Slow pairs turn `factor` times slower, fast ones as before (2309.00071).

  factor: the context's length over the original one.
  original_length: tokens that the model was trained with before.
  beta_fast, beta_slow: pairs that turn at least beta_fast times over the
    original length are fast, those that turn at most beta_slow times are slow,
    and a ramp lies between them.
  truncate: round the ends of the ramp outwards to whole pairs.
  attention_factor: factor of the rotated vectors; None: 0.1 ln(factor) + 1.
  mscale, mscale_all_dim: DeepSeek's numbers for these factors: rotated vectors
    times m(mscale) / m(mscale_all_dim), scores times m(mscale_all_dim)^2, where
    m(s) = 0.1 s ln(factor) + 1.
  """

  factor: number(above=0)
  original_length: integer(1)
  beta_fast: number(above=0) = 32.0
  beta_slow: number(above=0) = 1.0
  truncate: bool = True
  attention_factor: optional(number(above=0)) = None
  mscale: optional(number(0)) = None
  mscale_all_dim: optional(number(0)) = None

  def frequencies(self, theta, width, dtype):
    """Returns the frequency of every pair (2309.00071, 3.2).

    Args:
      theta, width, dtype: as in `Plain`.
    """
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

  factor: how much slower slow pairs turn.
  original_length: tokens that the model was trained with before.
  low_freq_factor, high_freq_factor: a pair is slow if it turns at most
    low_freq_factor times over the original length, and fast from
    high_freq_factor times on; a ramp lies between them.
  """

  factor: number(above=0)
  original_length: integer(1)
  low_freq_factor: number(above=0) = 1.0
  high_freq_factor: number(above=0) = 4.0

  def frequencies(self, theta, width, dtype):
    """Returns the frequency of every pair.

    Args:
      theta, width, dtype: as in `Plain`.
    """
    plain = super().frequencies(theta, width, dtype)
    turns = self.original_length * plain / (2 * math.pi)
    width_of_ramp = max(self.high_freq_factor - self.low_freq_factor, 1e-3)
    fast = jnp.clip((turns - self.low_freq_factor) / width_of_ramp, 0, 1)
    return plain * fast + plain / self.factor * (1 - fast)


@dataclasses.dataclass(frozen=True)
class Linear(Plain):
  """All pairs turn `factor` times slower (2306.15595)."""

  factor: number(above=0)

  def frequencies(self, theta, width, dtype):
    """Returns the frequency of every pair.

    Args:
      theta, width, dtype: as in `Plain`.
    """
    return super().frequencies(theta, width, dtype) / self.factor


SCALINGS = {"yarn": Yarn, "wavelength": Wavelength, "linear": Linear}
OPTION = optional(named({k: arguments(v) for k, v in SCALINGS.items()}))


def scaling(section: Mapping | None) -> Plain:
  """Returns the scaling of a config: {"name": "yarn", options}, or None."""
  options = dict(section or {})
  return SCALINGS[options.pop("name")](**options) if options else Plain()


def rotate(x_BLHh: Array, position_BL: Array, options) -> Array:
  """Rotates pairs by position * frequency, in at least float32 (2104.09864).

  Args:
    x_BLHh: queries or keys; h is even.
    position_BL: or [1, L].
    options: of attention: its rope, rope_theta and rope_scaling.
  """
  if options.rope == "none":
    return x_BLHh
  dtype = jnp.promote_types(x_BLHh.dtype, jnp.float32)
  scaling, width = options.rope_scaling, x_BLHh.shape[-1]
  frequency = scaling.frequencies(options.rope_theta, width, dtype)
  angle = position_BL[..., None].astype(dtype) * frequency[None, None, :]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  if scaling.magnitude != 1:
    cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
  if options.rope == "interleaved":
    a, b, join = x_BLHh[..., ::2], x_BLHh[..., 1::2], jnp.stack
  else:
    (a, b), join = jnp.split(x_BLHh, 2, axis=-1), jnp.concatenate
  rotated = join((a * cos - b * sin, b * cos + a * sin), axis=-1)
  return rotated.reshape(x_BLHh.shape).astype(x_BLHh.dtype)


def tempered(q_BLHh: Array, position_BL: Array, options) -> Array:
  """Scales queries with the logarithm of their position (2501.19399).

  Args:
    q_BLHh: queries.
    position_BL: own positions of their tokens.
    options: of attention; without a temperature, queries stay unchanged.
  """
  if options.temperature is None:
    return q_BLHh
  scale, length, offset = options.temperature
  dtype = jnp.promote_types(q_BLHh.dtype, jnp.float32)
  steps_BL = (position_BL + offset) // length
  factor_BL = 1 + scale * jnp.log1p(steps_BL.astype(dtype))
  return (q_BLHh * factor_BL[:, :, None, None]).astype(q_BLHh.dtype)


def bias(module: nn.Module, name: str, options, context) -> Array:
  """Returns a learned number for the distance of two tokens, [B or 1, H, L, M].

  The table begins with uniform numbers of variance 2 / (buckets + H), as in
  T5X.

  Args:
    module: linen module that has the table.
    name: of the table, a parameter [buckets, H].
    options: of attention.
    context: of the call.
  """
  shape = options.bias_buckets, options.num_heads
  init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
  init = roles.declared(init, (None, "heads"), "attention")
  table_NH = module.param(name, init, shape)
  keys = context.keys or context.tokens
  query, key = context.tokens.relative_BL, keys.relative_BL
  bucket_BLM = buckets(query[:, :, None] - key[:, None, :], options)
  return jnp.moveaxis(table_NH[bucket_BLM], -1, 1)


def buckets(back: Array, options) -> Array:
  """Returns the bucket of a distance (T5, 1910.10683, 2.1), in back's shape.

  Args:
    back: how many positions the key is before the query; < 0: after it.
    options: of attention.
  """
  number, later = options.bias_buckets, 0
  if not options.causal:
    number //= 2
    later = jnp.where(back < 0, number, 0)
    back = jnp.abs(back)
  exact, most = number // 2, options.bias_distance
  far = np.arange(exact, most + 1) / exact
  # Exact powers belong to the higher bucket.
  far = exact + (number - exact) * np.log(far) / math.log(most / exact) + 1e-9
  far = np.minimum(far.astype(np.int32), number - 1)
  bucket_D = jnp.asarray(np.append(np.arange(exact, dtype=np.int32), far))
  return later + bucket_D[jnp.clip(back, 0, most)]
