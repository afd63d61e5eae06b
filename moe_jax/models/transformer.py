"""A decoder-only transformer whose layers are dense or MoE in any pattern."""

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import linear, parallel
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.models import attention, norms
from moe_jax.moe import dispatchers, exchange, experts, groups, layer, linen
from moe_jax.moe.types import Array, Mlp

_only = jax.checkpoint_policies.save_only_these_names
REMAT = {
  "none": None,
  "dispatch": _only(*dispatchers.SAVED, *exchange.SAVED),
  "block": _only(*dispatchers.SAVED),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Everything about a Transformer but its parameters. Hashable.

  vocab_size, d_model, num_layers: V, D, layers in all.
  attention: see `attention.Options`.
  variants: (name, options) of other attention that some layers have.
  d_ff, activation: of the dense layers.
  prefix, pattern: kinds of the first layers, and of the ones that repeat
    after them: "dense" or "moe", or with attention of their own
    "dense@VARIANT", "moe@VARIANT".
  norm, norm_eps: see `norms.Norm`.
  tie_embeddings: the output layer is the transposed embedding.
  scale_embedding: what is looked up is multiplied by sqrt(D) (1706.03762, 3.4).
  remat: what of a block the backward pass computes again. "block": all but the
    plan's integers; "dispatch": the rows that experts got and gave are kept
    too, so that nothing is sent twice; "none": nothing.
  dtype: of activations; parameters are float32.
  allow_noncausal: build a decoder though its routing looks ahead.
  end_of_document: the token that ends a document, of which a token attends to
    its own only; None: to all that came before.
  recipe, grouping: of the MoE layers; None without any.
  mesh: what to run on; None: one device.

  Raises:
    ConfigError: options that do not fit together, with the remedy.
  """

  vocab_size: int
  d_model: int
  num_layers: int
  attention: attention.Options
  d_ff: int
  activation: str = "swiglu"
  prefix: tuple[str, ...] = ()
  pattern: tuple[str, ...] = ("moe",)
  variants: tuple[tuple[str, attention.Options], ...] = ()
  norm: str = "rms"
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  scale_embedding: bool = True
  remat: str = "none"
  dtype: str = "float32"
  allow_noncausal: bool = False
  end_of_document: int | None = None
  recipe: layer.Recipe | None = None
  grouping: groups.Grouping | None = None
  mesh: jax.sharding.Mesh | None = None

  def __post_init__(self):
    for kind in (*self.prefix, *self.pattern):
      ffn, _, variant = kind.partition("@")
      if ffn not in ("dense", "moe"):
        raise ConfigError(f'a layer is "dense" or "moe", not "{kind}"')
      if variant and variant not in dict(self.variants):
        raise ConfigError(
          f'a layer is "{kind}", but model.variants has no "{variant}"'
          + did_you_mean(variant, dict(self.variants))
        )
    for name in ("vocab_size", "d_model", "num_layers", "d_ff"):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ConfigError(f"model.{name} = {value!r} is not 1 or more")
    rest = self.num_layers - len(self.prefix)
    if not self.pattern or rest < 0 or rest % len(self.pattern):
      raise ConfigError(
        f"num_layers = {self.num_layers} is not the prefix {self.prefix} plus a"
        f" whole number of patterns {self.pattern}"
      )
    norms.check(self.norm)
    if self.remat not in REMAT:
      raise ConfigError(f'remat is one of {tuple(REMAT)}, not "{self.remat}"')
    experts.check(self.activation)
    if self.dtype not in ("float32", "bfloat16", "float64"):
      raise ConfigError(
        f'dtype = "{self.dtype}" is not "float32", "bfloat16" or "float64"'
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

  def attention_of(self, kind: str) -> attention.Options:
    """Of a layer of this kind."""
    _, _, variant = kind.partition("@")
    return dict(self.variants)[variant] if variant else self.attention

  def check_causal(self, length: int, train: bool) -> None:
    """A decoder refuses routing that looks at later tokens."""
    if self.recipe is None or self.allow_noncausal:
      return
    _, recipe = self.grouping.resolve(self.recipe, length, train)
    if not recipe.causal:
      raise ConfigError(
        "this router with this dispatcher and capacity lets a token's experts"
        " depend on later tokens, so a decoder would see the future; use"
        ' dispatcher.order = "token" and router.priority = "none", or set'
        " model.allow_noncausal = True"
      )


def build(**options) -> "Transformer":
  """The model of an `Architecture` with these options."""
  return Transformer(Architecture(**options))


# So that the registry can name an unknown option.
build.__signature__ = inspect.signature(Architecture)


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
        nn.with_logical_partitioning(
          lambda rng, name=name: init(rng, x_BLD.shape[-1])[name], axes
        ),
      ).astype(x_BLD.dtype)
    return self.mlp.apply(params, x_BLD)


class Block(nn.Module):
  """x + attention(norm(x)), then x + ffn(norm(x)). Returns (x, aux)."""

  kind: str
  arch: Architecture

  @nn.compact
  def __call__(self, x_BLD, inputs, layer_index, train, collect):
    m, (context, features, rng_G) = self.arch, inputs
    names = ("batch", None, None)
    h = norms.Norm(m.norm, m.norm_eps, name="attention_norm")(x_BLD)
    options = m.attention_of(self.kind)
    attend = attention.build(options, m.mesh, "attention")
    x_BLD += attend(h, context)
    x_BLD = parallel.constrain(x_BLD, names, m.mesh)
    h = norms.Norm(m.norm, m.norm_eps, name="ffn_norm")(x_BLD)
    if self.kind.startswith("dense"):
      y, aux = Dense(experts.dense(m.d_ff, m.activation), name="mlp")(h), {}
    else:
      if rng_G is not None:
        rng_G = jax.vmap(jax.random.fold_in, (0, None))(rng_G, layer_index)
      y, stats, collected = linen.MoE(m.recipe, m.grouping, m.mesh, name="moe")(
        h, context.mask_BL, features, rng_G, train=train, collect=collect
      )
      aux = {"stats": stats, **collected}
    return parallel.constrain(x_BLD + y, names, m.mesh), aux


class Repeat(nn.Module):
  """One repeat of a segment's pattern, the body of a scan over repeats."""

  pattern: tuple[str, ...]
  arch: Architecture

  @nn.compact
  def __call__(self, x_BLD, layer_index, inputs, train, collect):
    block = Block
    policy = REMAT[self.arch.remat]
    if policy is not None:
      block = nn.remat(
        Block, policy=policy, prevent_cse=False, static_argnums=(4, 5)
      )
    aux = {}
    for i, kind in enumerate(self.pattern):
      x_BLD, found = block(kind, self.arch, name=str(i))(
        x_BLD, inputs, layer_index + i, train, collect
      )
      if found:
        aux[str(i)] = found
    return x_BLD, aux


class Transformer(nn.Module):
  """Tokens to logits. Made by `build`."""

  arch: Architecture

  @nn.compact
  def __call__(
    self,
    tokens_BL: Array,
    mask_BL: Array | None = None,
    rng_G: Array | None = None,
    *,
    train: bool = False,
    collect: str | None = None,
    cache_length: int | None = None,
  ) -> tuple[Array, dict]:
    """Next-token logits.

    Args:
      tokens_BL: int32 in [0, V).
      mask_BL: bool, False for padding; None: no padding.
      rng_G: one key per group (`groups.keys`); None: no noise in the router.
      train: the capacity of training instead of that of evaluation.
      collect: "routing" adds expert_GTK and weight_GTK to aux.
      cache_length: M, how many tokens generation may keep of a sequence, as the
        mutable collection `cache`: these tokens follow those of earlier calls.
        Padding comes before a sequence then, and not after it. None: no cache.

    Returns:
      logits_BLV in at least float32.
      aux: {segment: {position in the pattern: {"stats": Stats, ...}}} of the
        MoE layers, each array with a leading axis of repeats.
    """
    arch = self.arch
    arch.check_causal(tokens_BL.shape[1], train)
    if mask_BL is None:
      mask_BL = jnp.ones(tokens_BL.shape, bool)
    document_BL = None
    if arch.end_of_document is not None and cache_length is None:
      # The end of a document is its own last token.
      ends_BL = (tokens_BL == arch.end_of_document).astype(jnp.int32)
      document_BL = jnp.cumsum(ends_BL, axis=1) - ends_BL
    position_BL, cache = jnp.arange(tokens_BL.shape[1])[None, :], None
    if cache_length is not None:
      position_BL, cache = self._advance(mask_BL, cache_length)
    context = attention.Context(mask_BL, document_BL, position_BL, cache)
    features = {
      "token_id": tokens_BL,
      "position": jnp.broadcast_to(position_BL, tokens_BL.shape),
    }
    embedding_VD = self.param(
      "embedding",
      nn.with_logical_partitioning(
        nn.initializers.normal(arch.d_model**-0.5), ("vocab", "embed")
      ),
      (arch.vocab_size, arch.d_model),
    )
    # Whole on every device, as a gather of its parts would move all tokens.
    embedding_VD = parallel.constrain(embedding_VD, (None, None), arch.mesh)
    x_BLD = embedding_VD[tokens_BL].astype(arch.dtype)
    if arch.scale_embedding:
      x_BLD *= jnp.asarray(arch.d_model**0.5, x_BLD.dtype)
    x_BLD = parallel.constrain(x_BLD, ("batch", None, None), arch.mesh)
    aux = {}
    for name, pattern, repeats, first in arch.segments:
      x_BLD, found = nn.scan(
        Repeat,
        variable_axes={"params": 0, "balance": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=(0,) + (nn.broadcast,) * 3,
        length=repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(pattern, arch, name=name)(
        x_BLD,
        first + len(pattern) * jnp.arange(repeats),
        (context, features, rng_G),
        train,
        collect,
      )
      if found:
        aux[name] = found
    x_BLD = norms.Norm(arch.norm, arch.norm_eps, name="final_norm")(x_BLD)
    return self._logits(x_BLD, embedding_VD), aux

  def _advance(self, mask_BL, cache_length):
    """Positions of these tokens, and where they go: after earlier ones."""
    batch, length = mask_BL.shape
    first = self.variable("cache", "first", jnp.zeros, (), jnp.int32)
    mask_BM = self.variable(
      "cache", "mask", jnp.zeros, (batch, cache_length), bool
    )
    position_BM = self.variable(
      "cache", "position", jnp.zeros, (batch, cache_length), jnp.int32
    )
    before_B1 = mask_BM.value.sum(1, keepdims=True, dtype=jnp.int32)
    seen_BL = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32)
    position_BL = jnp.maximum(before_B1 + seen_BL - 1, 0)
    start = first.value
    for variable, new in ((mask_BM, mask_BL), (position_BM, position_BL)):
      variable.value = jax.lax.dynamic_update_slice_in_dim(
        variable.value, new, start, axis=1
      )
    first.value = start + length
    return position_BL, attention.Cache(start, mask_BM.value, position_BM.value)

  def _logits(self, x_BLD, embedding_VD):
    arch, head_DV = self.arch, embedding_VD.T
    if not arch.tie_embeddings:
      head_DV = self.param(
        "head",
        nn.with_logical_partitioning(
          nn.initializers.normal(arch.d_model**-0.5), ("embed", "vocab")
        ),
        (arch.d_model, arch.vocab_size),
      )
      head_DV = parallel.constrain(head_DV, (None, None), arch.mesh)
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    return linear.product(x_BLD, head_DV.astype(x_BLD.dtype), dtype)
