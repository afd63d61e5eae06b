"""A decoder-only transformer whose layers are dense or MoE in any pattern."""

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import dispatchers, exchange, experts, layer, parallel, products
from moe_jax.errors import ConfigError
from moe_jax.models import attention, moe
from moe_jax.types import Array, Mlp

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
  num_heads, num_kv_heads, head_dim, rope_theta: see `attention.Attention`.
  d_ff, activation: of the dense layers.
  prefix, pattern: kinds of the first layers, and of the ones that repeat
    after them: "dense" or "moe".
  norm_eps: of RMSNorm.
  tie_embeddings: the output layer is the transposed embedding.
  remat: what of a block the backward pass computes again. "block": all but the
    plan's integers; "dispatch": the rows that experts got and gave are kept
    too, so that nothing is sent twice; "none": nothing.
  dtype: of activations; parameters are float32.
  allow_noncausal: build a decoder though its routing looks ahead.
  separate_documents: attend to the same document only; the last token of the
    vocabulary ends one.
  recipe, grouping: of the MoE layers; None without any.
  mesh: what to run on; None: one device.

  Raises:
    ConfigError: options that do not fit together, with the remedy.
  """

  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  activation: str = "swiglu"
  prefix: tuple[str, ...] = ()
  pattern: tuple[str, ...] = ("moe",)
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  remat: str = "none"
  dtype: str = "float32"
  allow_noncausal: bool = False
  separate_documents: bool = False
  recipe: layer.Recipe | None = None
  grouping: moe.Grouping | None = None
  mesh: jax.sharding.Mesh | None = None

  def __post_init__(self):
    for kind in (*self.prefix, *self.pattern):
      if kind not in ("dense", "moe"):
        raise ConfigError(f'a layer is "dense" or "moe", not "{kind}"')
    for name in (
      "vocab_size",
      "d_model",
      "num_layers",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "d_ff",
    ):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ConfigError(f"model.{name} = {value!r} is not 1 or more")
    rest = self.num_layers - len(self.prefix)
    if not self.pattern or rest < 0 or rest % len(self.pattern):
      raise ConfigError(
        f"num_layers = {self.num_layers} is not the prefix {self.prefix} plus a"
        f" whole number of patterns {self.pattern}"
      )
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_kv_heads = {self.num_kv_heads} does not divide num_heads ="
        f" {self.num_heads}"
      )
    if self.head_dim % 2:
      raise ConfigError(
        f"head_dim = {self.head_dim} is odd; rotary positions need pairs"
      )
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


class RMSNorm(nn.Module):
  """x / rms(x) * scale (1910.07467), computed in at least float32."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
      (x.shape[-1],),
    )
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    rms = jnp.sqrt((wide**2).mean(-1, keepdims=True) + self.eps)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return (wide / rms * scale).astype(x.dtype)


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
    m, (mask_BL, document_BL, features, rng_G) = self.arch, inputs
    names = ("batch", None, None)
    h = RMSNorm(m.norm_eps, name="attention_norm")(x_BLD)
    x_BLD += attention.Attention(
      m.num_heads,
      m.num_kv_heads,
      m.head_dim,
      m.rope_theta,
      m.mesh,
      name="attention",
    )(h, mask_BL, document_BL)
    x_BLD = parallel.constrain(x_BLD, names, m.mesh)
    h = RMSNorm(m.norm_eps, name="ffn_norm")(x_BLD)
    if self.kind == "dense":
      y, aux = Dense(experts.dense(m.d_ff, m.activation), name="mlp")(h), {}
    else:
      if rng_G is not None:
        rng_G = jax.vmap(jax.random.fold_in, (0, None))(rng_G, layer_index)
      y, stats, collected = moe.MoE(m.recipe, m.grouping, m.mesh, name="moe")(
        h, mask_BL, features, rng_G, train=train, collect=collect
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
  ) -> tuple[Array, dict]:
    """Next-token logits.

    Args:
      tokens_BL: int32 in [0, V).
      mask_BL: bool, False for padding; None: no padding.
      rng_G: one key per group (`moe.keys`); None: no noise in the router.
      train: the capacity of training instead of that of evaluation.
      collect: "routing" adds expert_GTK and weight_GTK to aux.

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
    if arch.separate_documents:
      # The end of a document is its own last token.
      ends_BL = (tokens_BL == arch.vocab_size - 1).astype(jnp.int32)
      document_BL = jnp.cumsum(ends_BL, axis=1) - ends_BL
    position_1L = jnp.arange(tokens_BL.shape[1])[None, :]
    features = {
      "token_id": tokens_BL,
      "position": jnp.broadcast_to(position_1L, tokens_BL.shape),
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
    x_BLD *= jnp.asarray(arch.d_model**0.5, x_BLD.dtype)
    x_BLD = parallel.constrain(x_BLD, ("batch", None, None), arch.mesh)
    aux = {}
    for name, pattern, repeats, first in arch.segments:
      x_BLD, found = nn.scan(
        Repeat,
        variable_axes={"params": 0, "balance": 0},
        split_rngs={"params": True},
        in_axes=(0,) + (nn.broadcast,) * 3,
        length=repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(pattern, arch, name=name)(
        x_BLD,
        first + len(pattern) * jnp.arange(repeats),
        (mask_BL, document_BL, features, rng_G),
        train,
        collect,
      )
      if found:
        aux[name] = found
    x_BLD = RMSNorm(arch.norm_eps, name="final_norm")(x_BLD)
    return self._logits(x_BLD, embedding_VD), aux

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
    return products.product(x_BLD, head_DV.astype(x_BLD.dtype), dtype)
