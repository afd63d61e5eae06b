"""An encoder-decoder transformer (1706.03762; T5, 1910.10683)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.models import attention
from moe_jax.models.parts import embedding, layers, norms, stack
from moe_jax.models.parts import section as section_lib
from moe_jax.moe.types import Array, Sublayer


class Text(NamedTuple):
  """Tokens of one side.

  token_BL: int32 in [0, V).
  mask_BL: bool, False for padding; None: no padding.
  document_BL: int32, number of the text that a token belongs to; tokens of
    either side see those with the same number only. None: each row is one text.
  """

  token_BL: Array
  mask_BL: Array | None = None
  document_BL: Array | None = None

  def filled(self) -> "Text":
    """Returns the text with arrays in the place of None."""
    shape, mask_BL, document_BL = self.token_BL.shape, *self[1:]
    mask_BL = jnp.ones(shape, bool) if mask_BL is None else mask_BL
    if document_BL is None:
      document_BL = jnp.zeros(shape, jnp.int32)
    return Text(self.token_BL, mask_BL, document_BL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(embedding.Vocabulary):
  """Everything about an encoder-decoder but its parameters. Hashable.

  encoder, decoder: their layers.
  source_vocab_size: V of the encoder's own embedding (GShard); None: it shares
    the decoder's.
  d_ff, source: see `decoder.Architecture`.
  """

  encoder: stack.Stack
  decoder: stack.Stack
  source_vocab_size: int | None = None
  d_ff: int = dataclasses.field(default=1, compare=False)
  source: Any = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    sizes = self.source_vocab_size or self.vocab_size, self.vocab_size
    for one, vocab_size in zip(self.stacks, sizes):
      one.check_features({"token_id": vocab_size, "position": None})

  @property
  def stacks(self) -> tuple[stack.Stack, ...]:
    """Encoder and decoder, in the order in which tokens pass them."""
    return self.encoder, self.decoder

  def flops(self, sizes: Mapping, lengths: Mapping) -> int:
    """Returns the operations of a forward pass of a pair.

    Args:
      sizes, lengths: as in `counts.flops_per_token`.
    """
    inputs, targets = (lengths[one.sequence] for one in self.stacks)
    weights = sizes["active_encoder"] * inputs
    weights += (
      sizes["active_decoder"] + self.vocab_size * self.d_model
    ) * targets
    # Keys and values are made of the encoder's tokens, not of the decoder's.
    across = [parts.attention.as_cross() for parts in self.decoder.each_layer]
    made = sum(one.cached_per_token for one in across) * self.d_model
    weights += made * (inputs - targets)
    flops = self.encoder.flops_per_pair * inputs**2
    flops += self.decoder.flops_per_pair * targets**2
    flops += sum(one.flops_per_pair for one in across) * inputs * targets
    return 2 * weights + flops

  @property
  def tables(self) -> dict[str, int]:
    """{parameter that has an entry for every token: number of tokens}."""
    own = {"source_embedding": self.source_vocab_size or self.vocab_size}
    return super().tables | own

  @property
  def mesh(self) -> jax.sharding.Mesh | None:
    """The devices to run on; None: one device."""
    return self.decoder.mesh


def build(
  section: Mapping,
  *,
  vocab_size: int,
  end_of_document: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  plugins: tuple[str, ...] = (),
) -> "EncoderDecoder":
  """Returns the model of `config.model`.

  Args:
    section: `config.model`, see `configs/base.py`. Its layers are the
      decoder's, and the encoder's too, except for the keys in `encoder`.
    vocab_size: V of the data; `section.vocab_size` takes its place.
    end_of_document: None; texts have numbers here.
    mesh, plugins: as in `models.build`.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  section_lib.check(section, "vocab_size", "source_vocab_size", "encoder")
  own = dict(section["encoder"])
  of_encoder = {**section, **own}
  of_encoder["moe"] = {**section["moe"], **own.get("moe", {})}
  fields = section_lib.fields(section, Architecture)
  del fields["encoder"]
  fields["vocab_size"] = embedding.size(section["vocab_size"], vocab_size)
  key = "source_vocab_size"
  if section[key]:
    embedding.size(section[key], vocab_size, key)

  def made(name, section, **more):
    layers.check(section, plugins)
    own = section_lib.fields(section, stack.Stack)
    names = f"{name}_prefix", name
    kinds = layers.kinds(section, mesh, plugins)
    return stack.Stack(
      **own | {"kinds": kinds, "mesh": mesh, "names": names, **more}
    )

  try:
    encoder = made("encoder", of_encoder, causal=False)
  except ConfigError as e:
    raise ConfigError(f"the layers of the encoder, model.encoder: {e}") from e
  encoder = encoder.seeing_all()
  more = {"sequence": "targets", "first_number": encoder.num_layers}
  fields["encoder"] = encoder
  fields["decoder"] = made("decoder", section, **more)
  for _, parts in fields["decoder"].kinds:
    parts.attention.as_cross()  # Raises if this kind has no such attention.
  del end_of_document
  return EncoderDecoder(Architecture(**fields))


class EncoderDecoder(nn.Module):
  """A module from two texts to the logits of the second, made by `build`."""

  arch: Architecture

  @property
  def sublayers(self) -> dict[str, Sublayer]:
    """The MoE layers by path, see `stack.Stack.sublayers`."""
    return self.arch.encoder.sublayers | self.arch.decoder.sublayers

  def arguments(self, tokens_BL: Array) -> tuple:
    """Returns the arguments of a call with these tokens on both sides."""
    return Text(tokens_BL), Text(tokens_BL)

  def example(self, batch: int) -> tuple:
    """Returns the arguments of a call for `batch` rows, see `models`."""
    return self.arguments(jnp.zeros((batch, 1), jnp.int32))

  @nn.compact
  def __call__(
    self,
    inputs: Text | None,
    targets: Text,
    rng: Array | None = None,
    *,
    first: int | Array = 0,
    train: bool = False,
    collect: str | None = None,
    cache_length: int | None = None,
  ) -> tuple[Array, dict]:
    """Returns the logits of the token after each of the targets, and aux.

    Args:
      inputs: the encoder's text; None: that of the first call of generation.
      targets: the decoder's text; the prediction at each token is the next one.
      rng: the key of a step, for noise and dropout; None: there is none.
      first: index of the first row in the batch of a step.
      train: the capacity and dropout of training.
      collect: "routing" adds the arrays of the choices to aux.
      cache_length: M, target tokens that generation may keep of a row in the
        mutable collection `cache`; padding then comes before them, and a row is
        one text. The encoder's output is kept in `memory`. None: no cache.

    Returns:
      logits_BLV in at least float32, of the targets.
      aux, see `stack.run`, of both stacks.
    """
    arch, mesh, aux = self.arch, self.arch.mesh, {}
    table_VD = embedding.table(self, arch)
    options = {"rng": rng, "first": first, "train": train, "collect": collect}
    memory, keys = None, None
    if inputs is not None:
      inputs, source_VD = inputs.filled(), table_VD
      if arch.source_vocab_size:
        name = "source_embedding"
        source_VD = embedding.table(self, arch, name, arch.source_vocab_size)
      context = attention.context.packed(*inputs[1:])
      memory, aux = self._run(
        arch.encoder, source_VD, inputs.token_BL, context, **options
      )
      memory, keys = context.real(memory), context.tokens
    targets = targets.filled()
    context = self._of_targets(targets, cache_length)
    keys = self._remembered(keys, cache_length)
    cross = attention.context.cross(context.tokens, keys, memory)
    options["cross"] = cross
    x_BLD, of_decoder = self._run(
      arch.decoder, table_VD, targets.token_BL, context, **options
    )
    logits_BLV = embedding.logits(self, arch, table_VD, x_BLD, mesh)
    return logits_BLV, aux | of_decoder

  def _of_targets(self, targets, cache_length):
    if cache_length is None:
      return attention.context.packed(*targets[1:])
    return attention.context.make(self, *targets[:2], None, cache_length)

  def _remembered(self, keys, cache_length):
    """The encoder's tokens, of this call or of the first call of generation."""
    if cache_length is None:
      return keys
    names = (
      keys._fields if keys is not None else attention.context.Tokens._fields
    )

    def kept(name):
      return self.variable("memory", name, getattr, keys, name).value

    return attention.context.Tokens(*map(kept, names))

  def _run(
    self,
    side,
    table_VD,
    tokens_BL,
    context,
    *,
    rng,
    first,
    train,
    collect,
    cross=None,
  ):
    """(x_BLD after the last norm, aux) of one stack."""
    arch = self.arch
    if not self.is_initializing():
      side.check_causal(tokens_BL.shape[1], train)
    features = {"token_id": tokens_BL, "position": context.tokens.position_BL}
    experts = {"mask_BL": context.tokens.mask_BL, "features": features}
    call = stack.Call(context, {**experts, "rng": rng, "first": first}, cross)
    call, drop = stack.dropping(side, call, rng, first, train)
    x_BLD = embedding.vectors(arch, table_VD, tokens_BL, context, arch.mesh)
    x_BLD = drop(x_BLD, "embedding")
    x_BLD, aux = stack.run(self, side, x_BLD, call, train, collect)
    norm = norms.Norm(side.norm, side.norm_eps, name=f"{side.names[1]}_norm")
    return drop(norm(x_BLD), "norm"), aux
