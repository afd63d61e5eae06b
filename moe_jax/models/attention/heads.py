"""What all kinds of attention are made of: projections, a softmax, the output."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import linear, parallel, roles
from moe_jax.models import norms
from moe_jax.models.attention.context import Context, store, visible
from moe_jax.models.attention.options import Options
from moe_jax.moe.types import Array


class Heads(nn.Module):
  """The base of the modules; they call these methods in their `__call__`."""

  options: Options
  mesh: jax.sharding.Mesh | None = None

  def parameter(self, name: str, shape, axes, inputs: int = 0) -> Array:
    """A matrix from its first axes to the others, or zeros.

    Args:
      name, shape: of the parameter.
      axes: logical axes of the parameter.
      inputs: number of axes that a product sums over; 0: it begins at zero.
    """
    numbers, init = tuple(range(len(shape))), nn.initializers.zeros
    if inputs:
      init = nn.initializers.lecun_normal(numbers[:inputs], numbers[inputs:])
    return self.param(name, roles.declared(init, axes, "attention"), shape)

  def project(self, x_BLC, name: str, shape, axes, bias=False) -> Array:
    """x times the matrix `name` [C, *shape], plus `name`_bias if there is one.

    Args:
      x_BLC: any vectors of the tokens.
      name, shape: of the matrix.
      axes: logical axes of the matrix.
      bias: whether there is one.
    """
    w = self.parameter(name, (x_BLC.shape[-1], *shape), axes, inputs=1)
    y = linear.product(x_BLC, w.astype(x_BLC.dtype))
    if bias:
      b = self.parameter(f"{name}_bias", shape, axes[1:])
      y += b.astype(y.dtype)[None, None]
    return self.pinned(y, axes[1:])

  def pinned(self, y, axes) -> Array:
    """y [B, L, ...] on the devices that hold the matrix of these axes."""
    return parallel.constrain(y, ("batch", None, *axes), self.mesh)

  def norm(self, x, name: str, eps: float) -> Array:
    """RMS norm of the last axis, with a scale of its own."""
    return norms.Norm("rms", eps, None, "attention", name=name)(x)

  def cached(self, context: Context, **parts: Array) -> list[Array]:
    """Parts [B, L, ...] of these tokens, or [B, M, ...] of all in the cache."""
    if context.cache is None:
      return list(parts.values())
    first, keys = context.cache
    places = keys.mask_BL.shape[1]
    return [store(self, *part, first, places) for part in parts.items()]

  def attend(self, q_BLHh, k_BMJh, v_BMJv, context, divisor) -> Array:
    """`attend` to the visible places, with the layer's sinks."""
    sinks_H, sees_BLM = None, visible(self.options, context)
    if self.options.sinks:
      sinks_H = self.parameter("sinks", (self.options.num_heads,), ("heads",))
    return attend(q_BLHh, k_BMJh, v_BMJv, sees_BLM, divisor, sinks_H)

  def project_out(self, y_BLHh, d_model: int) -> Array:
    """All heads to the residual stream."""
    shape, axes = (*y_BLHh.shape[2:], d_model), ("heads", None, "embed")
    w = self.parameter("out", shape, axes, inputs=2).reshape(-1, d_model)
    y_BLD = y_BLHh.reshape(*y_BLHh.shape[:2], -1)
    y_BLD = linear.product(y_BLD, w.astype(y_BLD.dtype))
    if self.options.bias == "all":
      bias_D = self.parameter("out_bias", (d_model,), ("embed",))
      y_BLD += bias_D.astype(y_BLD.dtype)[None, None]
    return y_BLD


def attend(q_BLHh, k_BMJh, v_BMJv, visible_BLM, divisor, sinks_H=None):
  """softmax(q k / divisor) v; scores in float32 or more.

  Args:
    q_BLHh, k_BMJh, v_BMJv: J divides H, and h/J heads of queries share one of
      keys and values.
    visible_BLM: from `visible`.
    divisor: of the scores.
    sinks_H: scores that take part in the softmax, with values of zero.
  """
  batch, length, heads, _ = q_BLHh.shape
  groups = k_BMJh.shape[2]
  q = q_BLHh.reshape(batch, length, groups, heads // groups, -1)
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum(
    "BLJjh,BMJh->BJjLM", q, k_BMJh, preferred_element_type=dtype
  )
  scores = jnp.where(
    visible_BLM[:, None, None], scores / divisor, jnp.finfo(dtype).min
  )
  if sinks_H is None:
    weights = jax.nn.softmax(scores, axis=-1)
  else:
    sinks = sinks_H.astype(dtype).reshape(1, groups, -1, 1, 1)
    most = jax.lax.stop_gradient(
      jnp.maximum(scores.max(-1, keepdims=True), sinks)
    )
    weights = jnp.exp(scores - most)
    weights /= weights.sum(-1, keepdims=True) + jnp.exp(sinks - most)
  weights = weights.astype(v_BMJv.dtype)
  y = jnp.einsum("BJjLM,BMJv->BLJjv", weights, v_BMJv)
  return y.reshape(batch, length, heads, -1)
