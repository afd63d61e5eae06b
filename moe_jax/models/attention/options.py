"""The options of attention in one kind of layer, checked."""

import dataclasses
from collections.abc import Mapping

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, of, optional, word
from moe_jax.models.attention import positions


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of attention in one kind of layer. Hashable.

  num_heads: H query heads.
  num_kv_heads: heads of keys and values; divides H (2305.13245). Latent
    attention has H.
  head_dim: width of a head; in latent attention, of the part without a
    position.
  rope_theta: base of the frequencies.
  norm_eps: of qk_norm.
  rope: which pairs turn with the position (2104.09864): "half", (i, i + h/2);
    "interleaved", (2i, 2i + 1); "none": no positions (NoPE).
  rope_scaling: see `positions`.
  bias: after which projections: "none", "qkv", "all" (also the output).
  qk_norm: RMS norm of queries and keys, before rotation: "head", of every
    head; "projection", of all heads as one vector; "l2": of every head, after
    rotation and without a scale; "none".
  clip: queries, keys and values are clipped to [-clip, clip]; None: not.
  window: number of positions that a token sees, its own included; None: all
    before it.
  chunk: number of positions in a chunk; a token sees its own chunk only; None:
    all.
  temperature: (s, n, o): queries times 1 + s ln(1 + floor((position + o) / n))
    (2501.19399), or None.
  sinks: a learned score per head that takes part in the softmax, and whose
    value is zero.
  kv_lora_rank: width of the latent that keys and values are made of
    (multi-head latent attention, 2405.04434 2.1); None: no latent attention,
    and none of the next three.
  q_lora_rank: width of the latent that queries are made of; None: they are
    made of x.
  rope_head_dim: width of the part of a head that has a position.
  v_head_dim: width of a value.

  Raises:
    ConfigError: options that do not fit together, with the remedy.
  """

  num_heads: integer(1)
  num_kv_heads: integer(1)
  head_dim: integer(1)
  rope_theta: number(above=1)
  norm_eps: number(above=0)
  rope: word("half", "interleaved", "none") = "half"
  rope_scaling: positions.Plain = positions.Plain()
  bias: word("none", "qkv", "all") = "none"
  qk_norm: word("none", "head", "projection", "l2") = "none"
  clip: optional(number(above=0)) = None
  window: optional(integer(1)) = None
  chunk: optional(integer(1)) = None
  temperature: optional(items((number(0), integer(1), integer(0)))) = None
  sinks: bool = False
  kv_lora_rank: optional(integer(1)) = None
  q_lora_rank: optional(integer(1)) = None
  rope_head_dim: optional(integer(1)) = None
  v_head_dim: optional(integer(1)) = None

  def __post_init__(self):
    latent, turns = self.kv_lora_rank is not None, self.rope != "none"
    widths = (self.rope_head_dim, self.v_head_dim)
    if None in widths if latent else any((*widths, self.q_lora_rank)):
      raise ConfigError(
        "latent attention needs kv_lora_rank, rope_head_dim and v_head_dim, and"
        " may have q_lora_rank; set the first three, or none of them"
      )
    turned = "rope_head_dim" if latent else "head_dim"
    if turns and getattr(self, turned) % 2:
      raise ConfigError(
        f"{turned} = {getattr(self, turned)} is odd; rotary positions need"
        ' pairs, or rope = "none"'
      )
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_kv_heads = {self.num_kv_heads} does not divide num_heads ="
        f" {self.num_heads}"
      )
    plain = turns and self.num_kv_heads == self.num_heads
    plain &= (self.bias, self.qk_norm, self.clip) == ("none", "none", None)
    if latent and not plain:
      raise ConfigError(
        "latent attention has num_kv_heads = num_heads and a rope, and no bias,"
        " qk_norm or clip; change these, or leave out kv_lora_rank"
      )

  @property
  def cached_per_token(self) -> int:
    """Numbers that generation keeps of a token, in a layer."""
    if self.kv_lora_rank is None:
      return 2 * self.num_kv_heads * self.head_dim
    return self.kv_lora_rank + self.rope_head_dim

  @property
  def flops_per_pair(self) -> int:
    """FLOPs of one query looking at one key: its score and its share of y."""
    key = self.head_dim + (self.rope_head_dim or 0)
    return 2 * self.num_heads * (key + (self.v_head_dim or self.head_dim))


OPTIONS = of(Options) | {"rope_scaling": positions.OPTION}


def read(section: Mapping) -> Options:
  """The options that a config describes.

  Args:
    section: keys of `Options`; rope_scaling as `positions.scaling` takes it,
      and lists, which JSON has for tuples.

  Raises:
    ConfigError: options that do not fit together.
  """
  scaling = positions.scaling(section.get("rope_scaling"))
  values = {
    k: tuple(v) if isinstance(v, list) else v for k, v in section.items()
  }
  return Options(**values | {"rope_scaling": scaling})
