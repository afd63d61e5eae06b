"""Causal self-attention: grouped queries, or latent keys and values.

Training sees whole sequences. Generation passes a `Cache` whose keys and values
come from earlier calls, as the linen collection `cache`.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import linear, parallel
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.models import norms, rotary
from moe_jax.moe.types import Array

_CHOICES = {
  "rope": ("half", "interleaved", "none"),
  "bias": ("none", "qkv", "all"),
  "qk_norm": ("none", "head", "projection", "l2"),
}
_LATENT_EPS = 1e-6  # Of the norms inside of latent attention.


@dataclasses.dataclass(frozen=True)
class Options:
  """What attention is in one kind of layer. Hashable.

  num_heads: H query heads.
  num_kv_heads: heads of keys and values; divides H (2305.13245). Latent
    attention has H.
  head_dim: width of a head; of latent attention, that without a position.
  rope: which pairs turn with the position (2104.09864): "half", (i, i + h/2);
    "interleaved", (2i, 2i + 1); "none": no positions (NoPE).
  rope_theta: base of the frequencies.
  rope_scaling: see `rotary`.
  bias: after which projections: "none", "qkv", "all" (also the output).
  qk_norm: RMS norm of queries and keys, before rotation: "head", of every
    head; "projection", of all heads as one vector; "l2": of every head, after
    rotation and without a scale; "none".
  clip: queries, keys and values are clipped to [-clip, clip]; None: not.
  window: a token sees so many, itself included; None: all before it.
  chunk: a token sees its own chunk of so many positions only; None: all.
  temperature: (s, n, o): queries times 1 + s ln(1 + floor((position + o) / n))
    (2501.19399), or None.
  sinks: a learned score per head that takes part in the softmax, and whose
    value is zero.
  kv_lora_rank: width of the latent that keys and values are made of
    (multi-head latent attention, 2405.04434 2.1); None: no latent attention,
    and none of the next three.
  q_lora_rank: the same of queries; None: directly from x.
  rope_head_dim: width of the part of a head that has a position.
  v_head_dim: width of a value.
  norm_eps: of qk_norm.

  Raises:
    ConfigError: options that do not fit together, with the remedy.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: str = "half"
  rope_theta: float = 10_000.0
  rope_scaling: rotary.Plain = rotary.Plain()
  bias: str = "none"
  qk_norm: str = "none"
  clip: float | None = None
  window: int | None = None
  chunk: int | None = None
  temperature: tuple[float, int, int] | None = None
  sinks: bool = False
  kv_lora_rank: int | None = None
  q_lora_rank: int | None = None
  rope_head_dim: int | None = None
  v_head_dim: int | None = None
  norm_eps: float = 1e-6

  def __post_init__(self):
    for name, known in _CHOICES.items():
      value = getattr(self, name)
      if value not in known:
        raise ConfigError(
          f'attention has no {name} "{value}"' + did_you_mean(str(value), known)
        )
    latent = ("rope_head_dim", "v_head_dim")
    positive = ["num_heads", "num_kv_heads", "head_dim"]
    positive += [n for n in ("window", "chunk") if getattr(self, n) is not None]
    if self.kv_lora_rank is not None:
      positive += ["kv_lora_rank", *latent]
      positive += ["q_lora_rank"] if self.q_lora_rank is not None else []
    elif any(getattr(self, n) is not None for n in (*latent, "q_lora_rank")):
      raise ConfigError(
        "q_lora_rank, rope_head_dim and v_head_dim belong to latent attention;"
        " set kv_lora_rank too, or leave them out"
      )
    for name in positive:
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} = {value!r} of attention is not 1 or more")
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_kv_heads = {self.num_kv_heads} does not divide num_heads ="
        f" {self.num_heads}"
      )
    turned = "head_dim" if self.kv_lora_rank is None else "rope_head_dim"
    if self.rope != "none" and getattr(self, turned) % 2:
      raise ConfigError(
        f"{turned} = {getattr(self, turned)} is odd; rotary positions need"
        ' pairs, or rope = "none"'
      )
    if self.kv_lora_rank is not None:
      self._check_latent()

  def _check_latent(self):
    if self.num_kv_heads != self.num_heads:
      raise ConfigError(
        f"latent attention has as many heads of keys as of queries: set"
        f" num_kv_heads = {self.num_heads}"
      )
    for name in ("bias", "qk_norm"):
      if getattr(self, name) != "none":
        raise ConfigError(f'latent attention takes {name} = "none" only')
    if self.clip is not None or self.rope == "none":
      raise ConfigError("latent attention takes no clip, and needs a rope")

  @property
  def cached_per_token(self) -> int:
    """Numbers that generation keeps of a token, in a layer."""
    if self.kv_lora_rank is not None:
      return self.kv_lora_rank + self.rope_head_dim
    return 2 * self.num_kv_heads * self.head_dim

  @property
  def flops_per_pair(self) -> int:
    """Of a token that looks at one place: scores, and the sum of values."""
    if self.kv_lora_rank is None:
      return 4 * self.num_heads * self.head_dim
    width = self.head_dim + self.rope_head_dim + self.v_head_dim
    return 2 * self.num_heads * width


def options(section: Mapping, **common) -> Options:
  """The options that a config has in `section`, and beside it.

  Args:
    section: keys of `Options`; rope_scaling as `rotary.scaling` takes it.
    **common: the same.

  Raises:
    ConfigError: an unknown option, or some that do not fit together.
  """
  known = [f.name for f in dataclasses.fields(Options)]
  for key in section:
    if key not in known:
      raise ConfigError(
        f'model.attention has no "{key}"' + did_you_mean(key, known)
      )
  values = common | dict(section)
  values["rope_scaling"] = rotary.scaling(values.get("rope_scaling"))
  if values.get("temperature") is not None:
    values["temperature"] = tuple(values["temperature"])
  return Options(**values)


class Context(NamedTuple):
  """What the layers of one call have in common.

  mask_BL: bool, False for padding.
  document_BL: int32, a token attends to the same document only; None: to all.
  position_BL: int32, or [1, L].
  cache: None, or where the tokens of this call go.
  """

  mask_BL: Array
  document_BL: Array | None
  position_BL: Array
  cache: "Cache | None" = None


class Cache(NamedTuple):
  """Which of M places hold a token, before this call and with it.

  first: place of the first token of this call.
  mask_BM: bool, unpadded tokens, those of this call included.
  position_BM: int32.
  """

  first: Array
  mask_BM: Array
  position_BM: Array


class Attention(nn.Module):
  """Attention with grouped queries (2305.13245)."""

  options: Options
  mesh: jax.sharding.Mesh | None = None

  @nn.compact
  def __call__(self, x_BLD: Array, context: Context) -> Array:
    m = self.options
    q = self._project(x_BLD, "query", m.num_heads)
    k = self._project(x_BLD, "key", m.num_kv_heads)
    v = self._project(x_BLD, "value", m.num_kv_heads)
    if m.qk_norm in ("head", "projection"):
      q, k = self._norm(q, "query_norm"), self._norm(k, "key_norm")
    if m.clip is not None:
      q, k, v = (jnp.clip(x, -m.clip, m.clip) for x in (q, k, v))
    if m.rope != "none":
      q, k = (turned(x, context.position_BL, m) for x in (q, k))
    if m.qk_norm == "l2":
      q, k = (unscaled(x, m.norm_eps) for x in (q, k))
    if m.temperature is not None:
      q = tempered(q, context.position_BL, m.temperature)
    k, v = cached(self, context.cache, key=k, value=v)
    y = attend(
      q,
      k,
      v,
      visible(m, context),
      m.head_dim**0.5,
      sinks(self),
    )
    return project_out(self, y, x_BLD.shape[-1])

  def _project(self, x_BLD, name, heads):
    m = self.options
    logical = "heads" if heads == m.num_heads else "kv_heads"
    w = self.param(
      name,
      nn.with_logical_partitioning(
        nn.initializers.variance_scaling(
          1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2)
        ),
        ("embed", logical, None),
      ),
      (x_BLD.shape[-1], heads, m.head_dim),
    )
    y = linear.product(x_BLD, w.astype(x_BLD.dtype))
    if m.bias != "none":
      y += bias(self, name, (logical, None), (heads, m.head_dim), y.dtype)
    return parallel.constrain(y, ("batch", None, logical, None), self.mesh)

  def _norm(self, x_BLHh, name):
    if self.options.qk_norm == "head":
      return norms.Norm("rms", self.options.norm_eps, None, name=name)(x_BLHh)
    x = x_BLHh.reshape(*x_BLHh.shape[:2], -1)
    x = norms.Norm("rms", self.options.norm_eps, None, name=name)(x)
    return x.reshape(x_BLHh.shape)


class LatentAttention(nn.Module):
  """Multi-head latent attention (2405.04434, 2.1).

  Keys and values of all heads are made of one latent c of a token, and of one
  key with a position. Generation keeps these two, and multiplies the query and
  the result by the matrices that would make keys and values of them.
  """

  options: Options
  mesh: jax.sharding.Mesh | None = None

  @nn.compact
  def __call__(self, x_BLD: Array, context: Context) -> Array:
    m, dtype = self.options, x_BLD.dtype
    heads, nope, latent = m.num_heads, m.head_dim, m.kv_lora_rank
    c_BLD = x_BLD
    if m.q_lora_rank is not None:
      c_BLD = self._down(x_BLD, "query", m.q_lora_rank)
    q = self._up(c_BLD, "query", nope + m.rope_head_dim)
    q, q_turned = q[..., :nope], q[..., nope:]
    q_turned = turned(q_turned, context.position_BL, m)
    c = self._matrix("kv_down", (x_BLD.shape[-1], latent + m.rope_head_dim))
    c = linear.product(x_BLD, c.astype(dtype))
    c, k_turned = c[..., :latent], c[..., None, latent:]
    c = norms.Norm("rms", _LATENT_EPS, None, name="kv_norm")(c)
    k_turned = turned(k_turned, context.position_BL, m)
    if m.temperature is not None:
      q, q_turned = (
        tempered(x, context.position_BL, m.temperature) for x in (q, q_turned)
      )
    up = self._matrix(
      "kv_up", (latent, heads, nope + m.v_head_dim), (None, "heads", None)
    ).astype(dtype)
    scale = (nope + m.rope_head_dim) ** 0.5 / m.rope_scaling.softmax
    sees_BLM = visible(m, context)
    sinks_H = sinks(self)
    if context.cache is None:
      kv = linear.product(c, up)
      kv = parallel.constrain(kv, ("batch", None, "heads", None), self.mesh)
      k, v = kv[..., :nope], kv[..., nope:]
      k_turned = jnp.broadcast_to(k_turned, (*k.shape[:3], m.rope_head_dim))
      k = jnp.concatenate([k, k_turned], axis=-1)
      q = jnp.concatenate([q, q_turned], axis=-1)
      y = attend(q, k, v, sees_BLM, scale, sinks_H)
    else:
      c, k_turned = cached(
        self, context.cache, latent=c[:, :, None], key=k_turned
      )
      q = jnp.einsum("BLHh,lHh->BLHl", q, up[..., :nope])
      q = jnp.concatenate([q, q_turned], axis=-1)
      k = jnp.concatenate([c, k_turned], axis=-1)  # One, for all heads.
      y = attend(q, k, c, sees_BLM, scale, sinks_H)
      y = jnp.einsum("BLHl,lHv->BLHv", y, up[..., nope:])
    return project_out(self, y, x_BLD.shape[-1])

  def _down(self, x_BLD, name, width):
    w = self._matrix(f"{name}_down", (x_BLD.shape[-1], width))
    y = linear.product(x_BLD, w.astype(x_BLD.dtype))
    return norms.Norm("rms", _LATENT_EPS, None, name=f"{name}_norm")(y)

  def _up(self, c_BLC, name, width):
    first = "embed" if self.options.q_lora_rank is None else None
    w = self._matrix(
      name,
      (c_BLC.shape[-1], self.options.num_heads, width),
      (first, "heads", None),
    )
    y = linear.product(c_BLC, w.astype(c_BLC.dtype))
    return parallel.constrain(y, ("batch", None, "heads", None), self.mesh)

  def _matrix(self, name, shape, axes=("embed", None)):
    initializer = nn.initializers.variance_scaling(
      1.0,
      "fan_in",
      "truncated_normal",
      in_axis=0,
      out_axis=tuple(range(1, len(shape))),
    )
    return self.param(
      name, nn.with_logical_partitioning(initializer, axes), shape
    )


def build(options: Options, mesh, name: str) -> nn.Module:
  """The module with these options."""
  latent = options.kv_lora_rank is not None
  return (LatentAttention if latent else Attention)(options, mesh, name=name)


def project_out(module, y_BLHh, d_model: int):
  """All heads to the residual stream."""
  heads, width = y_BLHh.shape[2:]
  out = module.param(
    "out",
    nn.with_logical_partitioning(
      nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=(0, 1)
      ),
      ("heads", None, "embed"),
    ),
    (heads, width, d_model),
  )
  y_BLD = y_BLHh.reshape(*y_BLHh.shape[:2], -1)
  y_BLD = linear.product(y_BLD, out.reshape(-1, d_model).astype(y_BLD.dtype))
  if module.options.bias == "all":
    y_BLD += bias(module, "out", ("embed",), (d_model,), y_BLD.dtype)
  return y_BLD


def bias(module, name: str, axes, shape, dtype):
  """A parameter NAME_bias that is added to [B, L, *shape]."""
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
  return module.param(f"{name}_bias", zeros, shape).astype(dtype)[None, None]


def sinks(module):
  """A score per head, or None."""
  if not module.options.sinks:
    return None
  zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
  return module.param("sinks", zeros, (module.options.num_heads,))


def turned(x_BLHh, position_BL, options: Options):
  """`rotary.rotate` with these options."""
  return rotary.rotate(
    x_BLHh,
    position_BL,
    options.rope_theta,
    interleaved=options.rope == "interleaved",
    scaling=options.rope_scaling,
  )


def unscaled(x, eps):
  """RMS norm of the last axis, in at least float32, without a scale."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return norms.unit(x.astype(dtype), eps).astype(x.dtype)


def tempered(q_BLHh, position_BL, temperature):
  """Queries grow with the logarithm of their position."""
  scale, length, offset = temperature
  dtype = jnp.promote_types(q_BLHh.dtype, jnp.float32)
  steps_BL = (position_BL + offset) // length
  factor_BL = 1 + scale * jnp.log1p(steps_BL.astype(dtype))
  return (q_BLHh * factor_BL[:, :, None, None]).astype(q_BLHh.dtype)


def cached(module: nn.Module, cache: Cache | None, **parts: Array):
  """Parts [B, L, ...] of these tokens, or [B, M, ...] of all in the cache."""
  if cache is None:
    return parts.values()
  found = []
  for name, part in parts.items():
    shape = (len(part), cache.mask_BM.shape[1], *part.shape[2:])
    variable = module.variable("cache", name, jnp.zeros, shape, part.dtype)
    variable.value = jax.lax.dynamic_update_slice_in_dim(
      variable.value, part, cache.first, axis=1
    )
    found.append(variable.value)
  return found


def visible(options: Options, context: Context) -> Array:
  """[B, L, M]: whether a token of this call may look at a place.

  At itself and at unpadded ones before it, of the same document, window and
  chunk. A padded one still sees itself, so that no softmax is empty.
  """
  place_L = jnp.arange(context.mask_BL.shape[1])
  place_M, mask_BM, position_BM = place_L, context.mask_BL, context.position_BL
  if context.cache is not None:
    first, mask_BM, position_BM = context.cache
    place_L = first + place_L
    place_M = jnp.arange(mask_BM.shape[1])
  seen_BLM = mask_BM[:, None, :]
  if context.document_BL is not None:
    document_BL = context.document_BL
    seen_BLM &= document_BL[:, :, None] == document_BL[:, None, :]
  back_BLM = context.position_BL[:, :, None] - position_BM[:, None, :]
  if options.window is not None:
    seen_BLM &= back_BLM < options.window
  if options.chunk is not None:
    chunk_BL = context.position_BL // options.chunk
    seen_BLM &= chunk_BL[:, :, None] == (position_BM // options.chunk)[:, None]
  before_1LM = (place_M[None, :] <= place_L[:, None])[None]
  itself_1LM = (place_M[None, :] == place_L[:, None])[None]
  return before_1LM & (seen_BLM | itself_1LM)


def attend(q_BLHh, k_BMJh, v_BMJv, visible_BLM, divisor, sinks_H=None):
  """softmax(q k / divisor) v; scores in float32 or more."""
  batch, length, heads, _ = q_BLHh.shape
  groups = k_BMJh.shape[2]
  q = q_BLHh.reshape(batch, length, groups, heads // groups, -1)
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum(
    "BLJjh,BMJh->BJjLM", q, k_BMJh, preferred_element_type=dtype
  )
  scores = jnp.where(
    visible_BLM[:, None, None], scores / divisor, jnp.finfo(dtype).min
  )
  if sinks_H is None:
    weights = jax.nn.softmax(scores, axis=-1)
  else:
    sinks = sinks_H.astype(dtype).reshape(1, groups, -1, 1, 1)
    most = jax.lax.stop_gradient(
      jnp.maximum(scores.max(-1, keepdims=True), sinks)
    )
    weights = jnp.exp(scores - most)
    weights /= weights.sum(-1, keepdims=True) + jnp.exp(sinks - most)
  weights = weights.astype(v_BMJv.dtype)
  y = jnp.einsum("BJjLM,BMJv->BLJjv", weights, v_BMJv)
  return y.reshape(batch, length, heads, -1)
