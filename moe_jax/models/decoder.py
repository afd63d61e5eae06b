"""A decoder-only transformer whose layers are dense or MoE in any pattern."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import linear, parallel, roles
from moe_jax.core import options as options_lib
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, of, optional, word
from moe_jax.models import attention, layers, norms
from moe_jax.models.layers import Layer
from moe_jax.moe import dispatchers, exchange, linen
from moe_jax.moe.types import Array, Mlp, Sublayer

_only = jax.checkpoint_policies.save_only_these_names
REMAT = {
  "none": None,
  "dispatch": _only(*dispatchers.SAVED, *exchange.SAVED),
  "block": _only(*dispatchers.SAVED),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Everything about a decoder but its parameters. Hashable.

  vocab_size, d_model, num_layers: V, D, layers in all.
  kinds: (kind, Layer) of every kind in prefix and pattern.
  prefix, pattern: kinds of the first layers, and of the ones that repeat
    after them: "dense" or "moe", or with keys of their own "dense@VARIANT",
    "moe@VARIANT".
  norm, norm_eps: see `norms.Norm`.
  tie_embeddings: the output layer is the transposed embedding.
  scale_embedding: embeddings are multiplied by sqrt(D) (1706.03762, 3.4).
  remat: what of a block the backward pass computes again. "block": all but the
    plan's integers; "dispatch": the rows that experts got and gave are kept
    too, so that nothing is sent twice; "none": nothing.
  dtype: of activations; parameters are float32.
  allow_noncausal: build a decoder though its routing looks ahead.
  end_of_document: the token that ends a document, of which a token attends to
    its own only; None: to all that came before.
  mesh: what to run on; None: one device.
  d_ff: width of dense layers. It is written with the model, though it may have
    none; no part of what the model is.
  source: what the model was read from says beside these options, for writing it
    again; no part of what the model is.

  Raises:
    ConfigError: options that do not fit together, with the remedy.
  """

  vocab_size: integer(1)
  d_model: integer(1)
  num_layers: integer(1, 10_000)
  kinds: tuple[tuple[str, Layer], ...]
  prefix: items(str)
  pattern: items(str)
  norm: word(*norms.KINDS)
  norm_eps: number(above=0)
  tie_embeddings: bool
  scale_embedding: bool
  remat: word(*REMAT)
  dtype: word("float32", "bfloat16", "float64")
  allow_noncausal: bool
  end_of_document: int | None = None
  mesh: jax.sharding.Mesh | None = None
  d_ff: int = dataclasses.field(default=1, compare=False)
  source: Any = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    rest = self.num_layers - len(self.prefix)
    if not self.pattern or rest < 0 or rest % len(self.pattern):
      raise ConfigError(
        f"num_layers = {self.num_layers} is not the prefix {self.prefix} plus a"
        f" whole number of patterns {self.pattern}"
      )

  @property
  def segments(self) -> tuple[tuple[str, tuple[str, ...], int, int], ...]:
    """(name, pattern, repeats, index of its first layer) of each segment."""
    first = len(self.prefix)
    repeats = (self.num_layers - first) // len(self.pattern)
    segments = (
      ("prefix", self.prefix, 1, 0),
      ("decoder", self.pattern, repeats, first),
    )
    return tuple(s for s in segments if s[1] and s[2])

  @property
  def layers(self) -> tuple[str, ...]:
    """The kind of every layer, from the first to the last."""
    return sum((p * repeats for _, p, repeats, _ in self.segments), ())

  def layer(self, kind: str) -> Layer:
    """The layer of this kind."""
    return dict(self.kinds)[kind]

  @property
  def sublayers(self) -> dict[str, Sublayer]:
    """{"SEGMENT/POSITION/moe": ...}: where the parameters, the balancers' state
    and the statistics of the MoE layers are."""
    return {
      f"{segment}/{i}/moe": Sublayer(
        parts.recipe,
        parts.grouping,
        tuple(first + i + r * len(pattern) for r in range(repeats)),
      )
      for segment, pattern, repeats, first in self.segments
      for i, parts in enumerate(map(self.layer, pattern))
      if parts.recipe is not None
    }

  def check_causal(self, length: int, train: bool) -> None:
    """A decoder refuses routing that looks at later tokens."""
    if self.allow_noncausal:
      return
    for kind, layer_of_kind in self.kinds:
      if layer_of_kind.recipe is None:
        continue
      _, recipe = layer_of_kind.grouping.resolve(
        layer_of_kind.recipe, length, train
      )
      if not recipe.causal:
        raise ConfigError(
          f'in layers "{kind}" this router with this dispatcher and capacity'
          " lets a token's experts depend on later tokens, so a decoder would"
          ' see the future; use dispatcher.order = "token" and router.priority ='
          ' "none", or set model.allow_noncausal = True'
        )


# Every key of `config.model`.
OPTIONS = {
  key: option
  for key, option in of(Architecture).items()
  if key not in ("kinds", "end_of_document", "mesh", "source")
}
OPTIONS |= layers.OPTIONS | {"name": str, "vocab_size": optional(integer(1))}


def build(
  section: Mapping,
  *,
  vocab_size: int,
  end_of_document: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  plugins: tuple[str, ...] = (),
) -> "Decoder":
  """The decoder of `config.model`.

  Args:
    section: `config.model`, see `configs/base.py`.
    vocab_size: V of the data; `section.vocab_size` takes its place.
    end_of_document: a token across which there is no attention; None: none.
    mesh, plugins: as in `models.build`.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  options_lib.section(OPTIONS).check(section, "model")
  options = {k: layers.hashable(v) for k, v in dict(section).items()}
  own = options["vocab_size"]
  if own is not None and own < vocab_size:
    raise ConfigError(
      f"model.vocab_size = {own} is less than the {vocab_size} tokens of the"
      " data; raise it, or set it to None"
    )
  kinds = sorted({*options["prefix"], *options["pattern"]})
  options |= {
    "vocab_size": own or vocab_size,
    "kinds": tuple(
      (kind, layers.make(kind, options, mesh, plugins)) for kind in kinds
    ),
    "end_of_document": end_of_document,
    "mesh": mesh,
  }
  known = {f.name for f in dataclasses.fields(Architecture)} - {"source"}
  return Decoder(Architecture(**{k: options[k] for k in known}))


class Dense(nn.Module):
  """An ordinary feed-forward network."""

  mlp: Mlp

  @nn.compact
  def __call__(self, x_BLD):
    params = {}
    init = self.mlp.init
    for name, axes in self.mlp.axes.items():
      params[name] = self.param(
        name,
        roles.declared(
          lambda rng, name=name: init(rng, x_BLD.shape[-1])[name], axes, "dense"
        ),
      ).astype(x_BLD.dtype)
    return self.mlp.apply(params, x_BLD)


class Call(NamedTuple):
  """What the layers of one call have in common.

  context: see `attention.context.Context`.
  features: per-token arrays that routers may look at.
  rng, first: see `Decoder.__call__`.
  """

  context: attention.context.Context
  features: dict[str, Array]
  rng: Array | None
  first: int | Array


class Block(nn.Module):
  """x + attention(norm(x)), then x + ffn(norm(x)). Returns (x, aux)."""

  kind: str
  arch: Architecture

  @nn.compact
  def __call__(self, x_BLD, call, layer_index, train, collect):
    m, parts = self.arch, self.arch.layer(self.kind)
    names = ("batch", None, None)
    h = norms.Norm(m.norm, m.norm_eps, name="attention_norm")(x_BLD)
    attend = attention.build(parts.attention, m.mesh, "attention")
    x_BLD += attend(h, call.context)
    x_BLD = parallel.constrain(x_BLD, names, m.mesh)
    h = norms.Norm(m.norm, m.norm_eps, name="ffn_norm")(x_BLD)
    if parts.recipe is None:
      y, aux = Dense(parts.mlp, name="mlp")(h), {}
    else:
      y, stats, collected = linen.MoE(
        parts.recipe, parts.grouping, m.mesh, name="moe"
      )(
        h,
        call.context.tokens.mask_BL,
        call.features,
        call.rng,
        first=call.first,
        layer_index=layer_index,
        train=train,
        collect=collect,
      )
      aux = {"moe": {"stats": stats, **collected}}
    return parallel.constrain(x_BLD + y, names, m.mesh), aux


class Repeat(nn.Module):
  """One repeat of a segment's pattern, the body of a scan over repeats."""

  pattern: tuple[str, ...]
  arch: Architecture

  @nn.compact
  def __call__(self, x_BLD, layer_index, call, train, collect):
    block = Block
    policy = REMAT[self.arch.remat]
    if policy is not None:
      block = nn.remat(
        Block, policy=policy, prevent_cse=False, static_argnums=(4, 5)
      )
    aux = {}
    for i, kind in enumerate(self.pattern):
      x_BLD, found = block(kind, self.arch, name=str(i))(
        x_BLD, call, layer_index + i, train, collect
      )
      if found:
        aux[str(i)] = found
    return x_BLD, aux


class Decoder(nn.Module):
  """Tokens to logits. Made by `build`."""

  arch: Architecture

  @property
  def sublayers(self) -> dict[str, Sublayer]:
    """The MoE layers, see `Architecture.sublayers`."""
    return self.arch.sublayers

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
    cache_length: int | None = None,
  ) -> tuple[Array, dict]:
    """Next-token logits.

    Args:
      tokens_BL: int32 in [0, V).
      mask_BL: bool, False for padding; None: no padding.
      rng: the key of a step, for the noise of the layers; None: no noise.
      first: index of the first sequence in the batch of a step.
      train: the capacity of training instead of that of evaluation.
      collect: "routing" adds the arrays of the choices to aux.
      cache_length: M, how many tokens generation may keep of a sequence, as the
        mutable collection `cache`: these tokens follow those of earlier calls.
        Padding comes before a sequence then, and not after it. None: no cache.

    Returns:
      logits_BLV in at least float32.
      aux: {segment: {position in the pattern: {"moe": {"stats": Stats, ...}}}}
        of the MoE layers, each array with a leading axis of repeats.
    """
    arch = self.arch
    if not self.is_initializing():
      arch.check_causal(tokens_BL.shape[1], train)
    if mask_BL is None:
      mask_BL = jnp.ones(tokens_BL.shape, bool)
    context = attention.context.make(
      self, tokens_BL, mask_BL, arch.end_of_document, cache_length
    )
    features = {
      "token_id": tokens_BL,
      "position": context.tokens.position_BL,
    }
    embedding_VD = self.param(
      "embedding",
      roles.declared(
        nn.initializers.normal(arch.d_model**-0.5),
        ("vocab", "embed"),
        "embedding",
      ),
      (arch.vocab_size, arch.d_model),
    )
    # Whole on every device, as a gather of its parts would move all tokens.
    embedding_VD = parallel.constrain(embedding_VD, (None, None), arch.mesh)
    x_BLD = context.real(embedding_VD[tokens_BL].astype(arch.dtype))
    if arch.scale_embedding:
      x_BLD *= jnp.asarray(arch.d_model**0.5, x_BLD.dtype)
    x_BLD = parallel.constrain(x_BLD, ("batch", None, None), arch.mesh)
    aux = {}
    for name, pattern, repeats, first_layer in arch.segments:
      x_BLD, found = nn.scan(
        Repeat,
        variable_axes={"params": 0, "balance": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=(0,) + (nn.broadcast,) * 3,
        length=repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(pattern, arch, name=name)(
        x_BLD,
        first_layer + len(pattern) * jnp.arange(repeats),
        Call(context, features, rng, first),
        train,
        collect,
      )
      if found:
        aux[name] = found
    x_BLD = norms.Norm(arch.norm, arch.norm_eps, name="final_norm")(x_BLD)
    return self._logits(x_BLD, embedding_VD), aux

  def _logits(self, x_BLD, embedding_VD):
    arch, head_DV = self.arch, embedding_VD.T
    if not arch.tie_embeddings:
      head_DV = self.param(
        "head",
        roles.declared(
          nn.initializers.normal(arch.d_model**-0.5), ("embed", "vocab"), "head"
        ),
        (arch.d_model, arch.vocab_size),
      )
      head_DV = parallel.constrain(head_DV, (None, None), arch.mesh)
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    return linear.product(x_BLD, head_DV.astype(x_BLD.dtype), dtype)
