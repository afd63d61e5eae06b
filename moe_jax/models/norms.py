"""Normalisations, computed in at least float32."""

import flax.linen as nn
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.moe.types import Array

KINDS = ("rms", "layer")


def check(kind: str) -> None:
  """Raises ConfigError unless there is such a norm."""
  if kind not in KINDS:
    raise ConfigError(f'there is no norm "{kind}"' + did_you_mean(kind, KINDS))


class Norm(nn.Module):
  """x / rms(x) * scale (1910.07467), or of x - mean(x) (1607.06450), no bias.

  kind: "rms" or "layer".
  eps: added to the mean square.
  axis: logical axis of the scale.
  """

  kind: str
  eps: float
  axis: str | None = "embed"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)),
      (x.shape[-1],),
    )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if self.kind == "layer":
      wide -= wide.mean(-1, keepdims=True)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return (unit(wide, self.eps) * scale).astype(x.dtype)


def unit(x: Array, eps: float) -> Array:
  """x over its root mean square."""
  return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps)
