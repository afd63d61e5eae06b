"""The rows of a family's table, each read in both directions.

A row says which field of config.json is which key of ours. Our keys are those
of `config.model`, with a dot between a section and its key, as in "d_model" or
"moe.router.renormalize". Every row has two functions:

  read(fields, ours) -> {key: value}, given the keys read so far;
  write(ours) -> {field: value}, empty where nothing of ours says it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.core.errors import ConfigError
from moe_jax.hf.fields import REQUIRED, SAME, Fields


class Row(NamedTuple):
  """A field whose value is that of a key of ours, or stands for it.

  field: its name, after that of its section and a dot where it is in one.
  key: of ours; "": none. That of a variant is written as layers have it.
  kind: int, float, bool, str, list or dict.
  default: what the reference's config class gives an absent field, or a
    function of the keys read so far.
  null: the same for null; `SAME`: null means the default.
  values: {value of theirs: value of ours}; None: they are equal.
  also: another name of the field.
  fixed: only the default is supported.
  least: the smallest whole number.
  bounded: files must have room for it, see `Fields`.
  """

  field: str
  key: str
  kind: type
  default: Any = REQUIRED
  null: Any = SAME
  values: Mapping[Any, Any] | None = None
  also: str = ""
  fixed: bool = False
  least: int = 1
  bounded: bool = False

  def read(self, fields: Fields, ours: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value}."""
    default, null = (
      x(ours) if callable(x) else x for x in (self.default, self.null)
    )
    how = null, self.least, self.bounded
    if self.also:
      default = fields.take(self.also, self.kind, default, *how)
    value = fields.take(self.field, self.kind, default, *how)
    supported = [default] if self.fixed else self.values
    if supported is not None and value not in supported:
      words = ", ".join(map(str, supported))
      reason = f"is not supported; supported: {words}"
      raise fields.error(self.field, value, reason)
    value = value if self.values is None else self.values[value]
    return {self.key: value} if self.key else {}

  def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
    """{field: value}."""
    key = re.sub(r"variants\.\w+", "attention", self.key)
    if key not in ours:
      return {}
    for theirs, value in (self.values or {ours[key]: ours[key]}).items():
      if value == ours[key]:
        return {self.field: theirs}
    raise ConfigError(f"{key} is {ours[key]!r}, and {self.field} cannot be")


class Pair(NamedTuple):
  """A row with functions of its own."""

  read: Callable[[Fields, Mapping[str, Any]], dict[str, Any]]
  write: Callable[[Mapping[str, Any]], dict[str, Any]]


def size(field: str, key: str, default: Any, **more) -> Row:
  """A number that is no larger than an axis of a tensor, or layers."""
  return Row(field, key, int, default, bounded=True, **more)


def whole(field: str, key: str, default: Any, **more) -> Row:
  """Another whole number."""
  return Row(field, key, int, default, **more)


def number(field: str, key: str, default: Any = REQUIRED, **more) -> Row:
  """Any number."""
  return Row(field, key, float, default, **more)


def flag(field: str, key: str, default: bool, **more) -> Row:
  """True or false."""
  return Row(field, key, bool, default, **more)


def fixed(field: str, value: Any, key: str = "") -> Row:
  """A field with one supported value."""
  return Row(field, key, type(value), value, fixed=True)


def heads(ours: Mapping[str, Any]) -> int:
  """The number of query heads."""
  return ours["num_heads"]


def per_head(ours: Mapping[str, Any]) -> int:
  """The width of a head if the heads share out d_model."""
  return ours["d_model"] // ours["num_heads"]


_BIASES = {True: "all", False: "none"}
BIAS = flag("attention_bias", "attention.bias", False, values=_BIASES)
RENORMALIZE = flag("norm_topk_prob", "moe.router.renormalize", False)


def common(vocab_size, hidden_size, layers, num_heads, eps) -> tuple[Row, ...]:
  """Fields that most families have, with the defaults of one."""
  acts = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
  return (
    size("vocab_size", "vocab_size", vocab_size),
    size("hidden_size", "d_model", hidden_size),
    size("num_hidden_layers", "num_layers", layers),
    size("num_attention_heads", "num_heads", num_heads),
    number("rms_norm_eps", "norm_eps", eps),
    flag("tie_word_embeddings", "tie_embeddings", False),
    fixed("partial_rotary_factor", 1.0),
    Row("hidden_act", "activation", str, "silu", values=acts),
  )


def grouped(
  kv_heads: Any = heads, head_dim: Any = per_head, **more
) -> tuple[Row, ...]:
  """Heads of keys and values, and the width of all heads."""
  return (
    size("num_key_value_heads", "num_kv_heads", kv_heads, null=heads),
    size("head_dim", "head_dim", head_dim, null=per_head, **more),
  )


def experts(field, number, top_k, width_field, width) -> tuple[Row, ...]:
  """Fields of the experts, with the defaults of one family."""
  # A file may have either.
  also = {"num_experts": "num_local_experts"}.get(field, "num_experts")
  return (
    size(field, "moe.num_experts", number, also=also),
    whole("num_experts_per_tok", "moe.top_k", top_k),
    size(width_field, "moe.d_expert", width),
  )


_FACTOR = number("factor", "factor")
_STRETCH = _FACTOR._replace(null=lambda o: o["most"] / o["original_length"])
_LENGTH = whole(
  "original_max_position_embeddings", "original_length", lambda o: o["most"]
)
_YARN = ("beta_fast", "beta_slow", "attention_factor")
_YARN += ("mscale", "mscale_all_dim")
# Their rope_type: our name of the scaling, and its rows.
_SCALINGS = {
  "default": (None,),
  "linear": ("linear", _FACTOR),
  "yarn": (
    *("yarn", _LENGTH, _STRETCH, *(number(x, x, None) for x in _YARN)),
    flag("truncate", "truncate", True, null=False),
  ),
  "llama3": (
    *("wavelength", _LENGTH, _FACTOR),
    *(number(x, x) for x in ("low_freq_factor", "high_freq_factor")),
  ),
}
_TYPE = Row("rope_type", "type", str, "default", values=_SCALINGS, also="type")


class Rope(NamedTuple):
  """rope_parameters, or the older rope_theta and rope_scaling.

  theta: the base that the reference takes without one.
  longest: the default of max_position_embeddings.
  default: rope_parameters where there are none.
  older: the field that has theta beside rope_scaling.
  length: the field that has the longest context.
  """

  theta: float
  longest: int
  default: Mapping[str, Any] = {}
  older: str = "rope_theta"
  length: str = "max_position_embeddings"

  def read(self, fields: Fields, ours: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value}."""
    theta = fields.take(self.older, float, self.theta)
    older = fields.take("rope_scaling", dict, {})
    newer = fields.take("rope_parameters", dict, {})
    where = f"{fields.where}, rope_parameters"
    rope = Fields(older or newer or self.default, where)
    theta = rope.take("rope_theta", float, theta)
    name, *table = _TYPE.read(rope, {})["type"]
    most = fields.take(self.length, int, self.longest)
    scaling = {}
    for row in (*table, fixed("partial_rotary_factor", 1.0)):
      scaling |= row.read(rope, scaling | {"most": most})
    rope.rest()
    scaling = {k: x for k, x in scaling.items() if x is not None}
    scaling = {"name": name, **scaling} if name else None
    return {"rope_theta": theta, "attention.rope_scaling": scaling}

  def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
    """{field: value}."""
    scaling = ours.get("attention.rope_scaling") or {"name": None}
    for kind, (name, *table) in _SCALINGS.items():
      if name == scaling["name"]:
        theta = ours.get("rope_theta", self.theta)
        rope = {"rope_type": kind, "rope_theta": theta}
        for row in table:
          rope |= row.write(scaling)
        return {"rope_parameters": rope, self.older: theta}
    raise ConfigError(f"there is no rope_type for {scaling['name']}")


FULL, SLIDING = "full_attention", "sliding_attention"


def listed(kinds: list[str]) -> dict[str, tuple[str, ...]]:
  """prefix and pattern of a list of layers, with as few names as there can be.

  Args:
    kinds: of every layer, at least one.
  """
  # The shortest period of every tail, by the prefix function of the reverse.
  turned, borders = kinds[::-1], [0]
  for kind in turned[1:]:
    k = borders[-1]
    while k and kind != turned[k]:
      k = borders[k - 1]
    borders.append(k + (kind == turned[k]))
  tails = []
  for n, border in enumerate(borders, start=1):
    length = n if n % (n - border) else n - border
    tails.append((len(kinds) - n + length, len(kinds) - n, length))
  _, first, length = min(tails)
  prefix, pattern = kinds[:first], kinds[first : first + length]
  return {"prefix": tuple(prefix), "pattern": tuple(pattern)}
