"""Normalisations, computed in at least float32."""

import flax.linen as nn
import jax.numpy as jnp

from moe_jax.core import roles
from moe_jax.moe.types import Array

KINDS = ("rms", "layer", "layer_bias", "plain")


class Norm(nn.Module):
  """x / rms(x) * scale (1910.07467), or the same of x - mean(x) (1607.06450).

  kind: "rms", "layer", "layer_bias", which adds a bias, or "plain", a layer
    norm without parameters (OLMo, 2402.00838).
  eps: added to the mean square.
  part: of the model that the scale is counted to.
  """

  kind: str
  eps: float
  part: str = "norm"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns the normalised x, in its dtype; the norm is of the last axis."""
    if self.kind == "plain":
      return unit(x, self.eps, centred=True).astype(x.dtype)
    ones = roles.declared(nn.initializers.ones, (None,), self.part)
    scale = self.param("scale", ones, x.shape[-1:])
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    y = unit(x, self.eps, centred=self.kind != "rms") * scale
    if self.kind == "layer_bias":
      zeros = roles.declared(nn.initializers.zeros, (None,), self.part)
      bias = self.param("bias", zeros, x.shape[-1:])
      y += bias.reshape(scale.shape)
    return y.astype(x.dtype)


def unit(x: Array, eps: float, centred: bool = False) -> Array:
  """Returns x, or x - mean(x), over its root mean square, in at least float32.

  Args:
    x: [..., width].
    eps: added to the mean square.
    centred: whether the mean is subtracted.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if centred:
    x -= x.mean(-1, keepdims=True)
  return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps)
