"""Projections, softmax and output, shared by all kinds of attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import parallel, roles
from moe_jax.models.attention import positions
from moe_jax.models.attention.context import Context, store, visible
from moe_jax.models.attention.options import Options
from moe_jax.models.parts import dropout, norms
from moe_jax.moe import kernels
from moe_jax.moe.types import Array


class Heads(nn.Module):
  """Attention without the queries, keys and values, which each kind makes.

  A kind has a method `mixed(x_BLD, context) -> y_BLHv`, the results of all
  heads, for which it calls the methods below.

  dropout: chance that a weight is 0 in training.
  out_bias: whether the output has a bias.
  """

  options: Options
  mesh: jax.sharding.Mesh | None = None
  dropout: float = 0.0
  out_bias = False

  @nn.compact
  def __call__(self, x_BLD: Array, context: Context) -> Array:
    """Returns the output of attention, y_BLD.

    Args:
      x_BLD: vectors of the tokens.
      context: of the call.
    """
    y_BLHv = self.mixed(context.real(x_BLD), context)
    axes = ("heads", None, "embed")
    return self.project(y_BLHv, "out", x_BLD.shape[2:], axes, self.out_bias)

  def parameter(
    self, name: str, shape, axes, inputs: int = 0, scale: float = 1.0
  ) -> Array:
    """Returns a weight that is initialised by its fan-in, or as zeros.

    Args:
      name, shape: of the parameter.
      axes: logical axes of the parameter.
      inputs: number of axes that a product sums over; 0: it begins at zero.
      scale: factor of its variance at the start, times `init_scale`.
    """
    numbers, init = tuple(range(len(shape))), nn.initializers.zeros
    if inputs:
      how = self.options.init_scale * scale, "fan_in", "truncated_normal"
      sides = numbers[:inputs], numbers[inputs:]
      init = nn.initializers.variance_scaling(*how, *sides)
    return self.param(name, roles.declared(init, axes, "attention"), shape)

  def project(
    self, x, name: str, shape, axes, bias: bool = False, scale: float = 1.0
  ) -> Array:
    """Returns x times the matrix `name`, plus `name`_bias if there is one.

    Args:
      x: vectors [B, L, C], or those of all heads [B, L, H, h].
      name: of the matrix [C, *shape] or [H, h, *shape].
      shape: of the result, after B and L.
      axes: logical axes of the matrix.
      bias: whether there is a bias.
      scale: see `parameter`.
    """
    inputs = x.ndim - 2
    w = self.parameter(name, (*x.shape[2:], *shape), axes, inputs, scale)
    w = parallel.gathered(w.astype(x.dtype), axes, self.mesh)
    x = x.reshape(*x.shape[:2], -1)
    y = kernels.product(x, w.reshape(-1, *shape))
    if bias:
      b = self.parameter(f"{name}_bias", shape, axes[inputs:])
      y += b.astype(y.dtype)[None, None]
    if axes[-1] == "embed":  # A block pins the sharding of its own output.
      return y
    return parallel.constrain(y, ("batch", None, *axes[inputs:]), self.mesh)

  def norm(self, x, name: str, eps: float, kind: str = "rms") -> Array:
    """Returns the norm of the last axis, with a scale of its own.

    Args:
      x: [..., width].
      name: of the module.
      eps, kind: see `norms.Norm`.
    """
    return norms.Norm(kind, eps, "attention", name=name)(x)

  def cached(self, context: Context, **parts: Array) -> list[Array]:
    """Returns arrays [B, L, ...]; with a cache, those of all its places.

    Args:
      context, **parts: of the call; a cache keeps the parts by their names.
    """
    if context.keys is None:
      return list(parts.values())
    places = context.keys.mask_BL.shape[1]
    return [store(self, *part, context.first, places) for part in parts.items()]

  def kept(self, name: str, make) -> Array:
    """Returns the result of `make()`, which generation calls in its first step.

    Args:
      name: under which later steps find the result.
      make: () -> an array.
    """
    generates = self.is_mutable_collection("memory")
    if not generates or self.is_initializing():
      return make()
    return self.variable("memory", name, make).value

  def attend(self, q_BLHh, k_BMJh, v_BMJv, context, divisor) -> Array:
    """softmax(q k / divisor) v over visible places; scores in float32 or more.

    Args:
      q_BLHh, k_BMJh, v_BMJv: J divides H, and H/J heads of queries share a head
        of keys and values.
      context: of the call.
      divisor: of the scores.
    """
    batch, length, heads, _ = q_BLHh.shape
    groups = k_BMJh.shape[2]
    q = q_BLHh.reshape(batch, length, groups, heads // groups, -1)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(
      "BLJjh,BMJh->BJjLM", q, k_BMJh, preferred_element_type=dtype
    )
    scores /= divisor
    kind = self.options.position_bias
    bias = context.bias if kind == "shared" else None
    if kind == "layer":
      bias = positions.bias(self, "position_bias", self.options, context)
    if bias is not None:
      shape = len(bias), groups, heads // groups, *bias.shape[2:]
      scores += bias.astype(dtype).reshape(shape)
    sees = visible(self.options, context)[:, None, None]
    scores = jnp.where(sees, scores, jnp.finfo(dtype).min)
    if self.options.sinks:
      sinks_H = self.parameter("sinks", (heads,), ("heads",))
      sinks = sinks_H.astype(dtype).reshape(1, groups, -1, 1, 1)
      most = jnp.maximum(scores.max(-1, keepdims=True), sinks)
      most = jax.lax.stop_gradient(most)
      weights = jnp.exp(scores - most)
      weights /= weights.sum(-1, keepdims=True) + jnp.exp(sinks - most)
    else:
      weights = jax.nn.softmax(scores, axis=-1)
    weights = dropout.drop(weights, self.dropout, context.rng_B)
    weights = weights.astype(v_BMJv.dtype)
    y = jnp.einsum("BJjLM,BMJv->BLJjv", weights, v_BMJv)
    return y.reshape(batch, length, heads, -1)
