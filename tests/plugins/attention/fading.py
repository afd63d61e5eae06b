"""Attention that fades with the distance, whatever the tokens are."""

import dataclasses

import jax.numpy as jnp

from moe_jax.core.options import number
from moe_jax.models.attention import context, heads, options


class Fading(heads.Heads):
  """A mean of the values that a token sees, with weights exp(-rate distance)."""

  def mixed(self, x_BLD, about):
    m, tokens = self.options, about.tokens
    shape, axes = (m.num_heads, m.head_dim), ("embed", "heads", None)
    v = self.project(x_BLD, "value", shape, axes)
    (v,) = self.cached(about, value=v)
    keys = about.keys or tokens
    distance_BLM = tokens.position_BL[:, :, None] - keys.position_BL[:, None]
    weight_BLM = jnp.exp(-m.rate * distance_BLM.astype(v.dtype))
    weight_BLM *= context.visible(m, about)
    weight_BLM /= weight_BLM.sum(-1, keepdims=True)
    return jnp.einsum("BLM,BMHv->BLHv", weight_BLM, v)


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
  """The options of attention that fades.

  rate: how fast weights fall: a token's weight is exp(rate) times that of the
    token before it.
  """

  rate: number(0) = 0.1

  module = Fading

  @property
  def cached_per_token(self):
    return self.num_heads * self.head_dim

  @property
  def flops_per_pair(self):
    return 2 * self.num_heads * self.head_dim


build = Options
