"""Causal self-attention with grouped queries and rotary positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import parallel, products
from moe_jax.types import Array


class Attention(nn.Module):
  """Grouped-query attention (2305.13245).

  num_heads: H query heads; num_kv_heads divides it.
  head_dim: width of a head, even.
  rope_theta: base of the rotary frequencies (2104.09864).
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  mesh: jax.sharding.Mesh | None = None

  @nn.compact
  def __call__(
    self, x_BLD: Array, mask_BL: Array, document_BL: Array | None = None
  ) -> Array:
    """Each position attends to itself and to unpadded earlier ones.

    document_BL: int32, only those of the same document; None: of all.
    """
    d_model = x_BLD.shape[-1]
    q = self._project(x_BLD, "query", self.num_heads)
    k = self._project(x_BLD, "key", self.num_kv_heads)
    v = self._project(x_BLD, "value", self.num_kv_heads)
    position_L = jnp.arange(x_BLD.shape[1])
    q = rotate(q, position_L, self.rope_theta)
    k = rotate(k, position_L, self.rope_theta)
    y = attend(q, k, v, mask_BL, document_BL)
    out = self.param(
      "out",
      nn.with_logical_partitioning(
        nn.initializers.variance_scaling(
          1.0, "fan_in", "truncated_normal", in_axis=(0, 1)
        ),
        ("heads", None, "embed"),
      ),
      (self.num_heads, self.head_dim, d_model),
    )
    y_BLD = y.reshape(*y.shape[:2], -1)
    out = out.reshape(-1, d_model).astype(y.dtype)
    return products.product(y_BLD, out)

  def _project(self, x_BLD, name, heads):
    logical = "heads" if heads == self.num_heads else "kv_heads"
    w = self.param(
      name,
      nn.with_logical_partitioning(
        nn.initializers.variance_scaling(
          1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2)
        ),
        ("embed", logical, None),
      ),
      (x_BLD.shape[-1], heads, self.head_dim),
    )
    y = products.product(x_BLD, w.astype(x_BLD.dtype))
    return parallel.constrain(y, ("batch", None, logical, None), self.mesh)


def attend(q_BLHh, k, v, mask_BL, document_BL=None):
  """softmax(q k / sqrt(h)) v with a causal mask; scores in float32 or more."""
  batch, length, heads, head_dim = q_BLHh.shape
  groups = k.shape[2]
  q = q_BLHh.reshape(batch, length, groups, heads // groups, head_dim)
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("BLJjh,BMJh->BJjLM", q, k, preferred_element_type=dtype)
  causal_1LM = jnp.tril(jnp.ones((1, length, length), bool))
  seen_BLM = mask_BL[:, None, :]
  if document_BL is not None:
    seen_BLM &= document_BL[:, :, None] == document_BL[:, None, :]
  # A padded query still sees itself, so that no softmax is empty.
  itself_1LM = jnp.eye(length, dtype=bool)[None]
  visible_BLM = causal_1LM & (seen_BLM | itself_1LM)
  scores = jnp.where(
    visible_BLM[:, None, None], scores / head_dim**0.5, jnp.finfo(dtype).min
  )
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  y = jnp.einsum("BJjLM,BMJh->BLJjh", weights, v)
  return y.reshape(batch, length, heads, head_dim)


def rotate(x_BLHh, position_L, theta):
  """Rotates the pairs (i, i + h/2) by position * theta^(-2i/h)."""
  half = x_BLHh.shape[-1] // 2
  dtype = jnp.promote_types(x_BLHh.dtype, jnp.float32)
  frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
  angle = position_L[:, None].astype(dtype) * frequency[None, :]
  cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
  a, b = x_BLHh[..., :half], x_BLHh[..., half:]
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BLHh.dtype)
