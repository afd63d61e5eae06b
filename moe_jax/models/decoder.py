"""A decoder-only transformer whose layers are dense or MoE in any pattern."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import options as options_lib
from moe_jax.core import parallel, roles
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, of, optional, word
from moe_jax.models import attention, layers, norms
from moe_jax.models.layers import Layer
from moe_jax.moe import dispatchers, exchange, kernels, linen
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
  end_of_document: the token that ends a document; a token attends to its own
    document only. None: to all earlier tokens.
  mesh: what to run on; None: one device.
  d_ff: width of dense layers, also where there are none. It is written on
    export only, and ignored when models are compared.
  source: other fields of the files that the model was read from. They are
    written on export only, and ignored when models are compared.

  Raises:
    ConfigError: options that do not fit together, with the remedy.
  """

  vocab_size: integer(1)
  d_model: integer(1)
  num_layers: integer(1, 10_000)
  kinds: tuple[tuple[str, Layer], ...]
  prefix: items(str)
  pattern: items(str)
  norm: word("rms", "layer")
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
    self._check_features({"token_id": self.vocab_size, "position": None})

  def _check_features(self, given):
    """Raises ConfigError for a router that looks at something else.

    Args:
      given: {feature: how many values it has; None: without end}.
    """
    for kind, parts in self.kinds:
      wanted = parts.recipe.router.features if parts.recipe else {}
      for feature, known in wanted.items():
        if feature not in given:
          raise ConfigError(
            f'the router of layers "{kind}" looks at the feature "{feature}", which'
            f" a decoder does not have; it has: {', '.join(sorted(given))}"
          )
        values = given[feature] or math.inf
        if known is not None and values > known:
          several = f"{values}" if given[feature] else "any number of them"
          raise ConfigError(
            f'the router of layers "{kind}" knows {known} values of the feature'
            f' "{feature}", and this model has {several}; raise the router\'s'
            " vocab_size or num_values, or set its boundaries"
          )

  @property
  def segments(self) -> tuple[tuple[str, tuple[str, ...], int, int], ...]:
    """(name, pattern, repeats, index of its first layer) of each segment."""
    first = len(self.prefix)
    repeats = (self.num_layers - first) // len(self.pattern)
    prefix = (("prefix", self.prefix, 1, 0),) if first else ()
    decoder = (("decoder", self.pattern, repeats, first),) if repeats else ()
    return prefix + decoder

  @property
  def layers(self) -> tuple[str, ...]:
    """The kind of every layer, from the first to the last."""
    return sum((p * repeats for _, p, repeats, _ in self.segments), ())

  def layer(self, kind: str) -> Layer:
    """The layer of this kind."""
    return dict(self.kinds)[kind]

  def check_causal(self, length: int, train: bool) -> None:
    """Raises ConfigError for routing that looks at later tokens."""
    for kind, parts in self.kinds:
      if parts.recipe is None or self.allow_noncausal:
        continue
      _, recipe = parts.grouping.resolve(parts.recipe, length, train)
      if not recipe.looking_ahead:
        continue
      key, spec = recipe.looking_ahead[0], recipe.router.spec
      remedy = f"choose another {key} that is causal (docs/routing.md)"
      if key == "dispatcher":
        remedy = 'set dispatcher.order = "token"'
      elif key == "router" and spec and "priority" in spec.options:
        remedy = 'set router.priority = "none"'
      raise ConfigError(
        f'{key} of the MoE layers "{kind}" lets the choice of a token depend on later'
        f" tokens, which a decoder must not see; {remedy}, or set"
        " model.allow_noncausal = True"
      )


# Every key of `config.model`.
OPTIONS = of(Architecture) | layers.OPTIONS
OPTIONS |= {"name": str, "vocab_size": optional(integer(1))}
# These fields are no config keys: `build` gets them as arguments or makes them.
for _name in ("kinds", "end_of_document", "mesh", "source"):
  del OPTIONS[_name]


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
  own = section["vocab_size"]
  if own is not None and own < vocab_size:
    raise ConfigError(
      f"model.vocab_size = {own} is less than the {vocab_size} tokens of the"
      " data; raise it, or set it to None"
    )
  options = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in section.items()
    if key in Architecture.__dataclass_fields__
  }
  kinds = sorted({*options["prefix"], *options["pattern"]})
  made = [layers.make(kind, section, mesh, plugins) for kind in kinds]
  options |= {"vocab_size": own or vocab_size, "kinds": tuple(zip(kinds, made))}
  options |= {"end_of_document": end_of_document, "mesh": mesh}
  return Decoder(Architecture(**options))


class Dense(nn.Module):
  """An ordinary feed-forward network."""

  mlp: Mlp
  mesh: jax.sharding.Mesh | None = None

  @nn.compact
  def __call__(self, x_BLD):
    def init(rng, name):
      return self.mlp.init(rng, x_BLD.shape[-1])[name]

    axes = self.mlp.axes
    params = {
      name: self.param(name, roles.declared(init, axes[name], "dense"), name)
      for name in axes
    }
    params = {
      name: parallel.gathered(w.astype(x_BLD.dtype), axes[name], self.mesh)
      for name, w in params.items()
    }
    return self.mlp.apply(params, x_BLD)


class Block(nn.Module):
  """x + attention(norm(x)), then x + ffn(norm(x)). Returns (x, aux).

  kind, arch: which of the architecture's layers it is.
  train, collect: as in `Decoder.__call__`. Its method takes the context of
    attention, and what `linen.MoE` gets in all layers of a call.
  """

  kind: str
  arch: Architecture
  train: bool
  collect: str | None

  @nn.compact
  def __call__(self, x_BLD, layer_index, context, call):
    m, parts = self.arch, self.arch.layer(self.kind)
    names, aux = ("batch", None, None), {}
    h = norms.Norm(m.norm, m.norm_eps, name="attention_norm")(x_BLD)
    attend = parts.attention.module(parts.attention, m.mesh, name="attention")
    x_BLD += attend(h, context)
    x_BLD = parallel.constrain(x_BLD, names, m.mesh)
    h = norms.Norm(m.norm, m.norm_eps, name="ffn_norm")(x_BLD)
    if parts.recipe is None:
      y = Dense(parts.mlp, m.mesh, name="mlp")(h)
    else:
      moe = linen.MoE(parts.recipe, parts.grouping, m.mesh, name="moe")
      more = {"train": self.train, "collect": self.collect}
      y, stats, collected = moe(h, **call, layer_index=layer_index, **more)
      aux["moe"] = {"stats": stats, **collected}
    return parallel.constrain(x_BLD + y, names, m.mesh), aux


class Repeat(nn.Module):
  """One repeat of a segment's pattern, the body of a scan over repeats.

  pattern: kinds of its layers.
  arch, train, collect: as in `Block`.
  alone: whether it is the only repeat. XLA then makes no loop of the scan, and
    would take the forward pass for what the backward pass computes again.
  """

  pattern: tuple[str, ...]
  arch: Architecture
  train: bool
  collect: str | None
  alone: bool

  @nn.compact
  def __call__(self, x_BLD, layer_index, context, call):
    block, policy, aux = Block, REMAT[self.arch.remat], {}
    if policy is not None:
      block = nn.remat(Block, policy=policy, prevent_cse=self.alone)
    for i, kind in enumerate(self.pattern):
      layer = block(kind, self.arch, self.train, self.collect, name=str(i))
      x_BLD, aux[str(i)] = layer(x_BLD, layer_index + i, context, call)
    return x_BLD, aux


# All repeats of a pattern, as one program over arrays of their parameters.
Segment = nn.scan(
  Repeat,
  variable_axes={"params": 0, "balance": 0, "cache": 0},
  split_rngs={"params": True},
  in_axes=(0, nn.broadcast, nn.broadcast),
  metadata_params={nn.PARTITION_NAME: "layers"},
)


class Decoder(nn.Module):
  """Tokens to logits. Made by `build`."""

  arch: Architecture

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
      for segment, pattern, repeats, first in self.arch.segments
      for i, parts in enumerate(map(self.arch.layer, pattern))
      if parts.recipe is not None
    }

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
    """Next-token logits.

    Args:
      tokens_BL: int32 in [0, V).
      mask_BL: bool, False for padding; None: no padding.
      rng: the key of a step, for the noise of the layers; None: no noise.
      first: index of the first sequence in the batch of a step.
      train: the capacity of training instead of that of evaluation.
      collect: "routing" adds the arrays of the choices to aux.
      replayed: experts [B, L, layers, K] of a trace, see `linen.MoE`.
      cache_length: M, tokens that generation may keep of a sequence in the mutable
        collection `cache`; padding then comes before it. None: no cache.

    Returns:
      logits_BLV in at least float32.
      aux: {segment: {position in the pattern: {"moe": {"stats": Stats, ...}}}},
        each array with a leading axis of repeats; {} for a dense layer.
    """
    arch, aux = self.arch, {}
    if not self.is_initializing():
      arch.check_causal(tokens_BL.shape[1], train)
    mask_BL = jnp.ones(tokens_BL.shape, bool) if mask_BL is None else mask_BL
    context = attention.context.make(
      self, tokens_BL, mask_BL, arch.end_of_document, cache_length
    )
    features = {"token_id": tokens_BL, "position": context.tokens.position_BL}
    call = dict(mask_BL=mask_BL, features=features, rng=rng, first=first)
    call |= {"replayed": replayed}
    embedding_VD = self._matrix("embedding", ("vocab", "embed"))
    # All of it on every device: a gather of its parts would move all tokens.
    table_VD = parallel.constrain(embedding_VD, (None, None), arch.mesh)
    x_BLD = context.real(table_VD[tokens_BL].astype(arch.dtype))
    if arch.scale_embedding:
      x_BLD *= jnp.asarray(arch.d_model**0.5, x_BLD.dtype)
    x_BLD = parallel.constrain(x_BLD, ("batch", None, None), arch.mesh)
    for name, pattern, repeats, start in arch.segments:
      options = pattern, arch, train, collect, repeats == 1
      segment = Segment(*options, name=name)
      index_R = start + len(pattern) * jnp.arange(repeats)
      x_BLD, aux[name] = segment(x_BLD, index_R, context, call)
    x_BLD = norms.Norm(arch.norm, arch.norm_eps, name="final_norm")(x_BLD)
    head_DV = embedding_VD.T
    if not arch.tie_embeddings:
      head_DV = self._matrix("head", ("embed", "vocab"))
    head_DV = head_DV.astype(x_BLD.dtype)
    head_DV = parallel.constrain(head_DV, (None, "vocab"), arch.mesh)
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    return kernels.product(x_BLD, head_DV, dtype), aux

  def _matrix(self, name, axes):
    arch = self.arch
    sizes = {"vocab": arch.vocab_size, "embed": arch.d_model}
    init = nn.initializers.normal(arch.d_model**-0.5)
    init = roles.declared(init, axes, name)
    return self.param(name, init, [sizes[axis] for axis in axes])
