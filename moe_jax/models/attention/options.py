"""The options that all kinds of attention share, checked."""

import dataclasses

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, optional, word
from moe_jax.models.attention import positions


@dataclasses.dataclass(frozen=True)
class Options:
  """The options that attention has in one kind of layer. Hashable.

  A kind of attention is a file of this folder, or of a plugin. Its `build` is a
  subclass with options of its own, and with

    module: (options, mesh) -> the linen module (x_BLD, Context) -> y_BLD;
    turned: name of the width whose pairs turn with the position;
    cached_per_token: numbers that generation keeps of a token, in a layer;
    flops_per_pair: FLOPs of one query and one key: their score, and the
      value's share of the result;
    as_cross(): the options of attention to another stack's output, where the
      kind has this.

  num_heads: H query heads.
  num_kv_heads: heads of keys and values; divides H (2305.13245).
  head_dim: width of a head; in latent attention, of the part without a
    position.
  rope_theta: base of the frequencies.
  norm_eps: of the norms of queries and keys.
  init_scale: variance of the weights times their fan-in.
  rope: which pairs turn with the position (2104.09864): "half", (i, i + h/2);
    "interleaved", (2i, 2i + 1); "none": no positions (NoPE).
  rope_scaling: see `positions`.
  window: number of positions that a token sees, its own included; None: all
    before it.
  chunk: number of positions in a chunk; a token sees its own chunk only; None:
    all.
  temperature: (s, n, o): queries times 1 + s ln(1 + floor((position + o) / n))
    (2501.19399), or None.
  position_bias: "shared" or "layer": a learned number of each head and bucket of
    distances is added to the scores (T5, 1910.10683), from one table for all
    layers of a stack or one for each layer; "none": nothing.
  bias_buckets: number of buckets of distances; half of them have a single
    distance, the others grow logarithmically up to bias_distance. Where tokens
    see later ones too, half of the buckets are for these.
  bias_distance: the distance from which on all are in the last bucket.
  scale_scores: scores are divided by the root of a head's width (1706.03762);
    T5 does not divide, and its query matrix begins smaller by this factor instead.
  causal: whether a token sees no later ones.
  sinks: a learned score per head that takes part in the softmax, and whose
    value is zero.
  name: the file of the kind.

  Raises:
    ConfigError: options that do not fit together, with the remedy.
  """

  num_heads: integer(1)
  num_kv_heads: integer(1)
  head_dim: integer(1)
  rope_theta: number(above=1)
  norm_eps: number(above=0)
  init_scale: number(above=0) = 1.0
  rope: word("half", "interleaved", "none") = "half"
  rope_scaling: positions.OPTION = positions.Plain()
  window: optional(integer(1)) = None
  chunk: optional(integer(1)) = None
  temperature: optional(items((number(0), integer(1), integer(0)))) = None
  position_bias: word("none", "shared", "layer") = "none"
  bias_buckets: integer(4) = 32
  bias_distance: integer(1) = 128
  scale_scores: bool = True
  causal: bool = True
  sinks: bool = False
  name: str = "grouped"

  turned = "head_dim"

  def __post_init__(self):
    width = getattr(self, self.turned)
    if self.rope != "none" and width % 2:
      raise ConfigError(
        f"{self.turned} = {width} is odd; rotary positions need pairs, or rope ="
        ' "none"'
      )
    exact = self.bias_buckets // (2 if self.causal else 4)
    if self.position_bias != "none" and self.bias_distance <= exact:
      raise ConfigError(
        f"bias_distance = {self.bias_distance} is not above the {exact} buckets of"
        f" distances that are one apart; raise it, or lower bias_buckets ="
        f" {self.bias_buckets}"
      )
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_kv_heads = {self.num_kv_heads} does not divide num_heads ="
        f" {self.num_heads}"
      )

  @property
  def bias_table(self) -> tuple[int, int, int, bool]:
    """Options that are equal in layers with one table of position biases."""
    sizes = self.bias_buckets, self.num_heads, self.bias_distance
    return *sizes, self.causal

  def seeing_all(self) -> "Options":
    """These options for tokens that attend to later ones too."""
    return dataclasses.replace(self, causal=False)

  def as_cross(self) -> "Options":
    """These options for attention to another stack's output, without positions.

    Raises:
      ConfigError: this kind has no such attention.
    """
    raise ConfigError(
      f'attention "{self.name}" cannot attend to an encoder; take'
      ' attention.name = "grouped"'
    )
