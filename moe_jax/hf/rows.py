"""The rows of a family's table, each read in both directions.

A row says which field of config.json is which key of ours. Our keys are those
of `config.model`, with a dot between a section and its key, as in "d_model" or
"moe.router.renormalize". Every row has two functions:

  read(fields, ours) -> {key: value}, given the keys read so far;
  write(ours) -> {field: value}, empty where nothing of ours says it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.core.errors import ConfigError
from moe_jax.hf.fields import REQUIRED, SAME, Fields


class Row(NamedTuple):
  """A field whose value is that of a key of ours, or stands for it.

  field: its name, after that of its section and a dot where it is in one.
  key: of ours; "": none.
  kind: int, float, bool, str, list or dict.
  default: what the reference's config class gives an absent field, or a
    function of the keys read so far.
  null: the same for null; `SAME`: null means the default.
  values: {value of theirs: value of ours}; None: they are equal.
  also: another name of the field.
  fixed: only the default is supported.
  least: the smallest whole number.
  limit: "size" or "layers": files must have room for it, see `Fields`.
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
  limit: str = ""

  def read(self, fields: Fields, ours: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value}."""
    default = self.default(ours) if callable(self.default) else self.default
    null = self.null(ours) if callable(self.null) else self.null
    if self.also:
      default = fields.take(self.also, self.kind, default, null, self.least)
    value = fields.take(self.field, self.kind, default, null, self.least)
    supported = [default] if self.fixed else self.values
    if supported is not None and value not in supported:
      reason = f"is not supported; supported: {[*supported]}"
      raise fields.error(self.field, value, reason)
    fields.check(self.field, value, self.limit)
    value = value if self.values is None else self.values[value]
    return {self.key: value} if self.key else {}

  def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
    """{field: value}."""
    if self.key not in ours:
      return {}
    value, pairs = (
      ours[self.key],
      self.values or {ours[self.key]: ours[self.key]},
    )
    theirs = [x for x, meaning in pairs.items() if meaning == value]
    if not theirs:
      raise ConfigError(f"{self.key} is {value!r}, and {self.field} cannot be")
    return {self.field: theirs[0]}


class Pair(NamedTuple):
  """A row with functions of its own."""

  read: Callable[[Fields, Mapping[str, Any]], dict[str, Any]]
  write: Callable[[Mapping[str, Any]], dict[str, Any]]


def size(field: str, key: str, default: Any, **more) -> Row:
  """The length of an axis of some tensor."""
  return Row(field, key, int, default, limit="size", **more)


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


def common(vocab_size, hidden_size, layers, num_heads, eps) -> tuple[Row, ...]:
  """Fields that most families have, with the defaults of one."""
  acts = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
  return (
    size("vocab_size", "vocab_size", vocab_size),
    size("hidden_size", "d_model", hidden_size),
    whole("num_hidden_layers", "num_layers", layers, limit="layers"),
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
  names = ["num_experts", "num_local_experts"]  # A file may have either.
  also = names[field == names[0]]
  return (
    whole(field, "moe.num_experts", number, also=also),
    whole("num_experts_per_tok", "moe.top_k", top_k),
    whole(width_field, "moe.d_expert", width),
  )


_FACTOR = number("factor", "factor")
_STRETCH = _FACTOR._replace(null=lambda o: o["most"] / o["original_length"])
_LENGTH = whole(
  "original_max_position_embeddings", "original_length", lambda o: o["most"]
)
_OPTIONS = "beta_fast", "beta_slow", "attention_factor"
_OPTIONS += "mscale", "mscale_all_dim"
_OF_YARN = [number(name, name, None) for name in _OPTIONS]
_OF_YARN.append(flag("truncate", "truncate", True, null=False))
_BANDS = [
  number(f"{x}_freq_factor", f"{x}_freq_factor") for x in ("low", "high")
]
# Their rope_type: our name of the scaling, and its rows.
_SCALINGS = {
  "default": (None,),
  "linear": ("linear", _FACTOR),
  "yarn": ("yarn", _LENGTH, _STRETCH, *_OF_YARN),
  "llama3": ("wavelength", _LENGTH, _FACTOR, *_BANDS),
}


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
    name = rope.take("type", str, "default")
    name = rope.take("rope_type", str, name)
    if name not in _SCALINGS:
      reason = f"is not supported; supported: {', '.join(_SCALINGS)}"
      raise rope.error("rope_type", name, reason)
    called, *table = _SCALINGS[name]
    found = {"most": fields.peek(self.length, int, self.longest)}
    for row in (*table, fixed("partial_rotary_factor", 1.0)):
      found |= row.read(rope, found)
    rope.rest()
    scaling = {k: x for k, x in found.items() if k != "most" and x is not None}
    scaling = {"name": called, **scaling} if called else None
    return {"rope_theta": theta, "attention.rope_scaling": scaling}

  def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
    """{field: value}."""
    scaling = ours.get("attention.rope_scaling") or {"name": None}
    for name, (called, *table) in _SCALINGS.items():
      if called == scaling["name"]:
        theta = ours.get("rope_theta", self.theta)
        rope = {"rope_type": name, "rope_theta": theta}
        for row in table:
          rope |= row.write(scaling)
        return {"rope_parameters": rope, self.older: theta}
    raise ConfigError(f"there is no rope_type for {scaling['name']}")


FULL, SLIDING = "full_attention", "sliding_attention"


def types_of_layers(
  fields: Fields, rule: list[str], known=(FULL,)
) -> list[str]:
  """layer_types, a word for every layer, or a rule's where there are none."""
  types = fields.list_of("layer_types", str, rule)
  if len(types) == len(rule) and {*types} <= {*known}:
    return types
  reason = f"is not one of {known} for each of {len(rule)} layers"
  raise fields.error("layer_types", types, reason)


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
