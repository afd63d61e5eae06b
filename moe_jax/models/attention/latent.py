"""Latent attention: keys and values are made of a small vector per token."""

import dataclasses

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, optional
from moe_jax.models.attention import heads, options, positions
from moe_jax.models.attention.context import Context
from moe_jax.moe.types import Array

_EPS = 1e-6  # Epsilon in the norms of both latent vectors.


class LatentAttention(heads.Heads):
  """Multi-head latent attention (2405.04434, 2.1).

  Keys and values of all heads are made of one latent c of a token, and of one
  key with a position. Generation keeps these two, and multiplies the query and
  the result by the matrices that would make keys and values of them.
  """

  def mixed(self, x_BLD: Array, context: Context) -> Array:
    """Returns the results of all heads, y_BLHv.

    Args:
      x_BLD: vectors of the tokens.
      context: of the call.
    """
    m, nope = self.options, self.options.head_dim
    q, q_turned = self._query(x_BLD, context.tokens)
    c, k_turned = self._latent(x_BLD, context.tokens)
    shape, axes = (m.num_heads, nope + m.v_head_dim), ("latent", "heads", None)
    if context.keys is None:
      kv = self.project(c, "kv_up", shape, axes)
      k, v = kv[..., :nope], kv[..., nope:]
      k_turned = jnp.broadcast_to(k_turned, (*k.shape[:3], m.rope_head_dim))
    else:
      up = self.parameter("kv_up", (m.kv_lora_rank, *shape), axes, inputs=1)
      up = up.astype(x_BLD.dtype)
      q = jnp.einsum("BLHh,lHh->BLHl", q, up[..., :nope])
      # All heads share the latent and the key.
      k, k_turned = self.cached(context, latent=c[:, :, None], key=k_turned)
      v = k
    q = jnp.concatenate([q, q_turned], axis=-1)
    k = jnp.concatenate([k, k_turned], axis=-1)
    divisor = (nope + m.rope_head_dim) ** 0.5 / m.rope_scaling.softmax
    y = self.attend(q, k, v, context, divisor)
    if context.keys is not None:
      y = jnp.einsum("BLHl,lHv->BLHv", y, up[..., nope:])
    return y

  def _query(self, x_BLD, tokens):
    """The parts of all heads without and with a position."""
    m, first = self.options, "embed"
    if m.q_lora_rank is not None:
      x_BLD = self._down(x_BLD, "query_down", m.q_lora_rank)
      x_BLD, first = self.norm(x_BLD, "query_norm", _EPS), "latent"
    shape = (m.num_heads, m.head_dim + m.rope_head_dim)
    q = self.project(x_BLD, "query", shape, (first, "heads", None))
    q, turned = q[..., : m.head_dim], q[..., m.head_dim :]
    turned = positions.rotate(turned, tokens.relative_BL, m)
    return (positions.tempered(x, tokens.position_BL, m) for x in (q, turned))

  def _latent(self, x_BLD, tokens):
    """The latent [B, L, l], and the key with a position [B, L, 1, h]."""
    m, width = self.options, self.options.kv_lora_rank
    c = self._down(x_BLD, "kv_down", width + m.rope_head_dim)
    c, key = c[..., :width], c[..., None, width:]
    key = positions.rotate(key, tokens.relative_BL, m)
    return self.norm(c, "kv_norm", _EPS), key

  def _down(self, x_BLD, name, width):
    return self.project(x_BLD, name, (width,), ("embed", None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.Options):
  """The options of latent attention.

  kv_lora_rank: width of the latent that keys and values are made of.
  q_lora_rank: width of the latent that queries are made of; None: they are
    made of x.
  rope_head_dim: width of the part of a head that has a position.
  v_head_dim: width of a value.
  """

  kv_lora_rank: integer(1)
  q_lora_rank: optional(integer(1)) = None
  rope_head_dim: integer(1)
  v_head_dim: integer(1)

  module = LatentAttention
  turned = "rope_head_dim"

  def __post_init__(self):
    super().__post_init__()
    if not self.scale_scores or self.position_bias != "none":
      raise ConfigError(
        "latent attention has scale_scores = True and no position_bias; change these,"
        ' or take attention.name = "grouped"'
      )
    if self.num_kv_heads != self.num_heads or self.rope == "none":
      raise ConfigError(
        "latent attention has num_kv_heads = num_heads and a rope; change these,"
        ' or take attention.name = "grouped"'
      )

  @property
  def cached_per_token(self) -> int:
    """Numbers of the latent, and of the key with a position."""
    return self.kv_lora_rank + self.rope_head_dim

  @property
  def flops_per_pair(self) -> int:
    """A score and a share of y for each head, as training computes them."""
    key = self.head_dim + self.rope_head_dim
    return 2 * self.num_heads * (key + self.v_head_dim)


build = Options
