"""Tokens to vectors, and vectors to logits."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from moe_jax.core import parallel, roles
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, optional, word
from moe_jax.moe import kernels
from moe_jax.moe.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """The tokens of a model, and how vectors are made of them. Hashable.

  vocab_size, d_model: V, D.
  tie_embeddings: the output layer is the transposed embedding.
  scale_embedding: embeddings are multiplied by sqrt(D) (1706.03762, 3.4).
  scale_output: vectors are divided by sqrt(D) before the output layer (T5,
    1910.10683, where it is tied).
  embedding_variance: variance of the embedding at the start (T5: 1); None: 1 /
    D.
  positions: vectors that are added for positions: "none", or "sinusoidal"
    (1706.03762, 3.5, as M2M-100 counts: sines first, and the first position is
    2).
  dtype: of activations; parameters are float32.
  """

  vocab_size: integer(1)
  d_model: integer(1)
  tie_embeddings: bool
  scale_embedding: bool
  scale_output: bool = False
  embedding_variance: optional(number(above=0)) = None
  positions: word("none", "sinusoidal") = "none"
  dtype: word("float32", "bfloat16", "float64")

  @property
  def tables(self) -> dict[str, int]:
    """{parameter that has an entry for every token: number of tokens}."""
    return dict.fromkeys(("embedding", "head"), self.vocab_size)


def size(own: int | None, needed: int, key: str = "vocab_size") -> int:
  """Returns V of a model.

  Args:
    own: `model.vocab_size`, which takes the place of the data's V.
    needed: V of the data.
    key: in the section `model` that `own` stands under.

  Raises:
    ConfigError: the data has more tokens than the model.
  """
  if own is not None and own < needed:
    raise ConfigError(
      f"model.{key} = {own} is less than the {needed} tokens of the"
      " data; raise it, or set it to None"
    )
  return own or needed


def table(
  module: nn.Module,
  arch: Vocabulary,
  name: str = "embedding",
  vocab_size: int | None = None,
) -> Array:
  """Returns the parameter [V, D] of this name.

  Args:
    module: linen module that has it.
    arch: of the model.
    name: of the parameter.
    vocab_size: V; None: that of the model.
  """
  axes = "vocab", "embed"
  return _matrix(module, arch, name, axes, "embedding", vocab_size)


def vectors(arch: Vocabulary, table_VD, tokens_BL, context, mesh) -> Array:
  """Returns the vectors x_BLD of tokens.

  Args:
    arch: of the model.
    table_VD: from `table`.
    tokens_BL: int32.
    context: of the call, see `attention.context`.
    mesh: of the model.
  """
  # Every device has the whole table: a gather of parts would move all tokens.
  table_VD = parallel.constrain(table_VD, (None, None), mesh)
  x_BLD = context.real(table_VD[tokens_BL].astype(arch.dtype))
  if arch.scale_embedding:
    x_BLD *= jnp.asarray(arch.d_model**0.5, x_BLD.dtype)
  if arch.positions == "sinusoidal":
    waves_BLD = _sinusoids(context.tokens.position_BL + 2, arch.d_model)
    x_BLD += context.real(waves_BLD.astype(x_BLD.dtype))
  return parallel.constrain(x_BLD, ("batch", None, None), mesh)


def logits(module: nn.Module, arch: Vocabulary, table_VD, x_BLD, mesh) -> Array:
  """Returns logits_BLV in at least float32, from the last vectors.

  Args:
    module: linen module that has the output layer, if it is not the embedding.
    arch, table_VD, mesh: as in `vectors`.
    x_BLD: after the last norm.
  """
  if arch.scale_output:
    x_BLD *= jnp.asarray(arch.d_model**-0.5, x_BLD.dtype)
  head_DV = table_VD.T
  if not arch.tie_embeddings:
    head_DV = _matrix(module, arch, "head", ("embed", "vocab"), "head")
  head_DV = head_DV.astype(x_BLD.dtype)
  head_DV = parallel.constrain(head_DV, (None, "vocab"), mesh)
  dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
  return kernels.product(x_BLD, head_DV, dtype)


def _matrix(module, arch, name, axes, part, vocab_size=None):
  sizes = {"vocab": vocab_size or arch.vocab_size, "embed": arch.d_model}
  variance = 1 / arch.d_model
  if part == "embedding" and arch.embedding_variance is not None:
    variance = arch.embedding_variance
  init = roles.declared(nn.initializers.normal(variance**0.5), axes, part)
  return module.param(name, init, [sizes[axis] for axis in axes])


def _sinusoids(position_BL, d_model):
  """[B, L, D]: sines, then cosines, of D/2 frequencies from 1 to 1e-4."""
  half = d_model // 2
  step = math.log(10_000) / max(half - 1, 1)
  frequency = jnp.exp(-step * jnp.arange(half, dtype=jnp.float32))
  angle_BLd = position_BL[..., None] * frequency[None, None, :]
  waves = jnp.concatenate([jnp.sin(angle_BLd), jnp.cos(angle_BLd)], axis=-1)
  return jnp.pad(waves, ((0, 0), (0, 0), (0, d_model % 2)))
