"""A decoder-only transformer whose layers are dense or MoE in any pattern."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.models import attention
from moe_jax.models.parts import embedding, layers, norms, stack
from moe_jax.models.parts import section as section_lib
from moe_jax.moe.types import Array, Sublayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(stack.Stack, embedding.Vocabulary):
  """Everything about a decoder but its parameters. Hashable.

  It is a `stack.Stack` of layers and an `embedding.Vocabulary`, and has

  end_of_document: the token that ends a document; a token attends to its own
    document only. None: to all earlier tokens.
  d_ff: width of dense layers, given even if there are none. It is written on
    export only, and ignored when models are compared.
  source: other fields of the files that the model was read from. They are
    written on export only, and ignored when models are compared.
  """

  end_of_document: int | None = None
  d_ff: int = dataclasses.field(default=1, compare=False)
  source: Any = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    super().__post_init__()
    self.check_features({"token_id": self.vocab_size, "position": None})

  @property
  def stacks(self) -> tuple[stack.Stack, ...]:
    """The stacks of layers: this one."""
    return (self,)

  def flops(self, sizes: Mapping, lengths: Mapping) -> int:
    """Returns the operations of a forward pass of a text.

    Args:
      sizes, lengths: as in `counts.flops_per_token`.
    """
    weights, length = sizes["active"] - sizes.get("norm", 0), lengths["inputs"]
    if not self.tie_embeddings:  # Looked up; tied, it is the output layer.
      weights -= sizes["embedding"]
    return 2 * weights * length + self.flops_per_pair * length**2


def build(
  section: Mapping,
  *,
  vocab_size: int,
  end_of_document: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  plugins: tuple[str, ...] = (),
) -> "Decoder":
  """Returns the decoder of `config.model`.

  Args:
    section: `config.model`, see `configs/base.py`.
    vocab_size: V of the data; `section.vocab_size` takes its place.
    end_of_document: a token across which there is no attention; None: none.
    mesh, plugins: as in `models.build`.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  section_lib.check(section, "vocab_size")
  own = section_lib.fields(section, Architecture)
  own["vocab_size"] = embedding.size(section["vocab_size"], vocab_size)
  own["kinds"] = layers.kinds(section, mesh, plugins)
  own |= {"end_of_document": end_of_document, "mesh": mesh}
  return Decoder(Architecture(**own))


class Decoder(nn.Module):
  """A module from tokens to logits, made by `build`."""

  arch: Architecture

  @property
  def sublayers(self) -> dict[str, Sublayer]:
    """The MoE layers by path, see `stack.Stack.sublayers`."""
    return self.arch.sublayers

  def arguments(self, tokens_BL: Array) -> tuple:
    """Returns the arguments of a call with these tokens."""
    return (tokens_BL,)

  def example(self, batch: int) -> tuple:
    """Returns the arguments of a call for `batch` rows, see `models`."""
    return self.arguments(jnp.zeros((batch, 1), jnp.int32))

  @nn.compact
  def __call__(
    self,
    tokens_BL: Array,
    mask_BL: Array | None = None,
    rng: Array | None = None,
    *,
    first: int | Array = 0,
    train: bool = False,
    collect: str | None = None,
    replayed: Array | None = None,
    cache_length: int | None = None,
  ) -> tuple[Array, dict]:
    """Returns next-token logits, and aux.

    Args:
      tokens_BL: int32 in [0, V).
      mask_BL: bool, False for padding; None: no padding.
      rng: the key of a step, for the noise of the layers; None: no noise.
      first: index of the first sequence in the batch of a step.
      train: whether capacity is that of training; False: that of evaluation.
      collect: "routing" adds the arrays of the choices to aux.
      replayed: experts [B, L, layers, K] of a trace, see `linen.MoE`.
      cache_length: M, tokens that generation may keep of a sequence in the
        mutable collection `cache`; padding then comes before it. None: no
        cache.

    Returns:
      logits_BLV in at least float32.
      aux: {segment: {position in the pattern: {"moe": {"stats": Stats, ...}}}},
        each array with a leading axis of repeats; {} for a dense layer.
    """
    arch, mesh = self.arch, self.arch.mesh
    if not self.is_initializing():
      arch.check_causal(tokens_BL.shape[1], train)
    mask_BL = jnp.ones(tokens_BL.shape, bool) if mask_BL is None else mask_BL
    context = attention.context.make(
      self, tokens_BL, mask_BL, arch.end_of_document, cache_length
    )
    features = {"token_id": tokens_BL, "position": context.tokens.position_BL}
    experts = dict(mask_BL=mask_BL, features=features, rng=rng, first=first)
    experts |= {"replayed": replayed}
    call = stack.Call(context, experts)
    call, drop = stack.dropping(arch, call, rng, first, train)
    table_VD = embedding.table(self, arch)
    x_BLD = embedding.vectors(arch, table_VD, tokens_BL, context, mesh)
    x_BLD = drop(x_BLD, "embedding")
    x_BLD, aux = stack.run(self, arch, x_BLD, call, train, collect)
    x_BLD = norms.Norm(arch.norm, arch.norm_eps, name="final_norm")(x_BLD)
    x_BLD = drop(x_BLD, "norm")
    return embedding.logits(self, arch, table_VD, x_BLD, mesh), aux
