"""Attention in which groups of query heads share keys and values."""

import dataclasses
import functools

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, optional, word
from moe_jax.models.attention import heads, options, positions
from moe_jax.models.attention.context import Context
from moe_jax.models.parts import norms
from moe_jax.moe.types import Array


class Attention(heads.Heads):
  """Attention with grouped queries (2305.13245)."""

  @property
  def out_bias(self) -> bool:
    """Whether the output has a bias."""
    return self.options.bias == "all"

  def mixed(self, x_BLD: Array, context: Context) -> Array:
    """Returns the results of all heads, y_BLHv.

    Args:
      x_BLD: vectors of the tokens.
      context: of the call.
    """
    m, tokens = self.options, context.tokens
    divisor = m.head_dim**0.5 if m.scale_scores else 1.0
    # Scores begin with the same variance, whether they are scaled or not (T5).
    scale = divisor**2 / m.head_dim
    q = self._heads(x_BLD, "query", "heads", m.num_heads, scale)
    if context.is_cross:
      k, v = (
        self.kept(name, functools.partial(self._of_memory, name, context))
        for name in ("key", "value")
      )
      q = self._normed(q, "query")
      return self.attend(q, k, v, context, divisor)
    k = self._heads(x_BLD, "key", "kv_heads", m.num_kv_heads)
    v = self._heads(x_BLD, "value", "kv_heads", m.num_kv_heads)
    q, k = self._normed(q, "query"), self._normed(k, "key")
    if m.clip is not None:
      q, k, v = (jnp.clip(x, -m.clip, m.clip) for x in (q, k, v))
    q, k = (self._turned(x, context) for x in (q, k))
    if m.qk_norm == "l2":
      q, k = (norms.unit(x, m.norm_eps).astype(x.dtype) for x in (q, k))
    q = positions.tempered(q, tokens.position_BL, m)
    k, v = self.cached(context, key=k, value=v)
    return self.attend(q, k, v, context, divisor)

  def _of_memory(self, name, context):
    """Keys or values of another sequence."""
    heads = "kv_heads", self.options.num_kv_heads
    made = self._heads(context.memory_BMD, name, *heads)
    return self._normed(made, name) if name == "key" else made

  def _turned(self, x_BLHh, context):
    """Turns queries or keys with their position, all of a head or its start."""
    m, turned = self.options, self.options.rotary_dim
    if m.rope_axes > 1:
      return self._turned_by_axes(x_BLHh, context.axes_1L)
    tokens = context.tokens
    if turned is None:
      return positions.rotate(x_BLHh, tokens.relative_BL, m)
    first = positions.rotate(x_BLHh[..., :turned], tokens.relative_BL, m)
    return jnp.concatenate([first, x_BLHh[..., turned:]], axis=-1)

  def _turned_by_axes(self, x_BLHh, axes_1L):
    """Turns parts of a head, each with the place along an axis (Wan)."""
    number = self.options.rope_axes
    pairs = x_BLHh.shape[-1] // 2
    size = 2 * (pairs // number)
    ends = [2 * pairs - size * left for left in range(number - 1, 0, -1)]
    parts = zip(jnp.split(x_BLHh, ends, axis=-1), axes_1L)
    turned = [positions.rotate(x, place, self.options) for x, place in parts]
    return jnp.concatenate(turned, axis=-1)

  def _heads(self, x_BLD, name, logical, number, scale=1.0):
    shape, axes = (number, self.options.head_dim), ("embed", logical, None)
    bias = self.options.bias != "none"
    return self.project(x_BLD, name, shape, axes, bias, scale)

  def _normed(self, x_BLHh, name):
    """Queries or keys after the norm that comes before they turn."""
    if self.options.qk_norm in ("none", "l2"):
      return x_BLHh
    m, shape = self.options, x_BLHh.shape
    kind, name = "layer" if m.qk_norm == "head_layer" else "rms", f"{name}_norm"
    if m.qk_norm == "projection":
      x_BLHh = x_BLHh.reshape(*shape[:2], -1)
    return self.norm(x_BLHh, name, m.norm_eps, kind).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
  """The options of attention with grouped queries.

  bias: after which projections: "none", "qkv", "all" (also the output).
  qk_norm: norm of queries and keys. RMS norm before rotation: "head", of every
    head; "projection", of all heads as one vector. "l2": of every head, after
    rotation and without a scale. "head_layer": layer norm of every head, before
    rotation. "none".
  clip: queries, keys and values are clipped to [-clip, clip]; None: they are
    not.
  rope_axes: number of axes of the tokens' grid; a part of a head's pairs turns
    with the place along each, and the model must have such places. 1: tokens
    stand in a row.
  rotary_dim: how many of a head's numbers turn with the position, an even
    number; None: all.
  """

  bias: word("none", "qkv", "all") = "none"
  qk_norm: word("none", "head", "head_layer", "projection", "l2") = "none"
  clip: optional(number(above=0)) = None
  rotary_dim: optional(integer(2)) = None
  rope_axes: integer(1, 3) = 1

  module = Attention

  def __post_init__(self):
    super().__post_init__()
    turned = self.rotary_dim
    if turned is not None and (turned % 2 or turned > self.head_dim):
      raise ConfigError(
        f"rotary_dim = {turned} is odd or more than head_dim = {self.head_dim}"
      )

  def as_cross(self) -> "Options":
    """These options without positions: a query sees all of another sequence."""
    own = {"rope": "none", "position_bias": "none", "causal": False}
    own |= {"window": None, "chunk": None, "temperature": None, "sinks": False}
    own |= {"clip": None, "rotary_dim": None, "rope_axes": 1}
    if self.qk_norm == "l2":
      own["qk_norm"] = "none"
    return dataclasses.replace(self, **own)

  @property
  def cached_per_token(self) -> int:
    """Numbers of a key and a value for each of their heads."""
    return 2 * self.num_kv_heads * self.head_dim

  @property
  def flops_per_pair(self) -> int:
    """A score and a share of y for each head."""
    return 4 * self.num_heads * self.head_dim


build = Options
