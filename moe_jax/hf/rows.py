"""The rows of a family's table, each read in both directions.

A row relates a field of config.json to a key of ours. Our keys are those of
`config.model`, with a dot between a section and its key, as in "d_model" or
"moe.router.renormalize". Every row has two functions:

  read(fields, ours) -> {key: value}, given the keys read so far;
  write(ours) -> {field: value}, {} where no key of ours decides the field.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.core.errors import ConfigError
from moe_jax.hf.fields import REQUIRED, SAME, Fields


class Row(NamedTuple):
  """A field whose value is that of a key of ours, or stands for it.

  kind: int, float, bool, str, list or dict.
  field: its name; in a section, the section's name, a dot and its name.
  key: of ours; "": none. A key of a variant is written as layers have it.
  default: the value that the reference's config class gives an absent field, or
    a function of the keys read so far.
  null: the same for null; `SAME`: null means the default.
  values: {value of theirs: value of ours}; {}: they are equal.
  also: another name of the field.
  fixed: only the default is supported.
  least: the smallest whole number.
  bounded: files must have room for it, see `Fields`.
  """

  kind: type
  field: str
  key: str = ""
  default: Any = REQUIRED
  null: Any = SAME
  values: Mapping[Any, Any] = {}
  also: str = ""
  fixed: bool = False
  least: int = 1
  bounded: bool = False

  def read(self, fields: Fields, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {key: value}, or {} for a field without a key.

    Args:
      fields: of the config.json.
      ours: keys read so far.
    """
    default, null = (
      x(ours) if callable(x) else x for x in (self.default, self.null)
    )
    how = null, self.least, self.bounded
    if self.also:
      default = fields.take(self.also, self.kind, default, *how)
    value = fields.take(self.field, self.kind, default, *how)
    supported = [default] if self.fixed else self.values
    if supported and value not in supported:
      words = ", ".join(map(str, supported))
      reason = f"is not supported; supported: {words}"
      raise fields.error(self.field, value, reason)
    return {self.key: self.values.get(value, value)} if self.key else {}

  def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {field: value}; raises ConfigError for an impossible value."""
    key = re.sub(r"variants\.\w+", "attention", self.key)
    if key not in ours:
      return {}
    for theirs, value in (self.values or {ours[key]: ours[key]}).items():
      if value == ours[key]:
        return {self.field: theirs}
    raise ConfigError(f"{self.field} cannot express {key} = {ours[key]!r}")


class Pair(NamedTuple):
  """A row with functions of its own."""

  read: Callable[[Fields, Mapping[str, Any]], dict[str, Any]]
  write: Callable[[Mapping[str, Any]], dict[str, Any]]


# A number that is at most the longest axis of a tensor, or their number.
size = functools.partial(Row, int, bounded=True)
whole = functools.partial(Row, int)
number = functools.partial(Row, float)
flag = functools.partial(Row, bool)


def fixed(field: str, value: Any) -> Row:
  """Returns the row of a field with one supported value.

  Args:
    field, value: its name, and the value.
  """
  return Row(type(value), field, default=value, fixed=True)


def heads(ours: Mapping[str, Any]) -> int:
  """Returns the number of query heads."""
  return ours["num_heads"]


def per_head(ours: Mapping[str, Any]) -> int:
  """Returns the width of a head if the heads share out d_model."""
  return ours["d_model"] // ours["num_heads"]


# Activations of a network of two matrices.
TWO_MATRICES = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
_WHOLE_HEADS = fixed("partial_rotary_factor", 1.0)
_BIASES = {True: "all", False: "none"}
BIAS = flag("attention_bias", "attention.bias", False, values=_BIASES)
RENORMALIZE = flag("norm_topk_prob", "moe.router.renormalize", False)


def shortest(value: float, good: Callable[[float], bool]) -> float:
  """Returns the good number with the fewest digits near a value; or the value.

  Args:
    value: the number.
    good: number -> whether it may take the value's place.
  """
  numbers = (float(f"{value:.{digits}g}") for digits in range(1, 17))
  return next(filter(good, numbers), value)


def common(
  vocab_size,
  hidden_size,
  layers,
  num_heads,
  eps,
  *,
  tied: bool = False,
  whole_heads: bool = True,
) -> tuple[Row, ...]:
  """Returns rows that most families have, with the defaults of one family.

  Args:
    vocab_size, hidden_size, layers, num_heads, eps: defaults.
    tied: the default of tied embeddings.
    whole_heads: whether all of a head turns with the position; if not, `Rope`
      reads which part does.
  """
  acts = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
  return (
    size("vocab_size", "vocab_size", vocab_size),
    size("hidden_size", "d_model", hidden_size),
    size("num_hidden_layers", "num_layers", layers),
    size("num_attention_heads", "num_heads", num_heads),
    number("rms_norm_eps", "norm_eps", eps),
    flag("tie_word_embeddings", "tie_embeddings", tied),
    *([_WHOLE_HEADS] if whole_heads else []),
    Row(str, "hidden_act", "activation", "silu", values=acts),
  )


def grouped(kv_heads: Any, head_dim: Any = per_head, **more) -> tuple[Row, ...]:
  """Returns rows of the heads of keys and values, and of the width of heads.

  Args:
    kv_heads, head_dim, **more: defaults; and of the row of head_dim.
  """
  return (
    size("num_key_value_heads", "num_kv_heads", kv_heads, null=heads),
    size("head_dim", "head_dim", head_dim, null=per_head, **more),
  )


def experts(field, number, top_k, width_field, width) -> tuple[Row, ...]:
  """Returns rows of the experts, with the defaults of one family.

  Args:
    field, width_field: names of the fields.
    number, top_k, width: defaults of E, K and F.
  """
  # A file may have either of the two names.
  also = "num_local_experts" if field == "num_experts" else "num_experts"
  return (
    size(field, "moe.num_experts", number, also=also),
    whole("num_experts_per_tok", "moe.top_k", top_k),
    size(width_field, "moe.d_expert", width),
  )


def _dense(fields, ours):
  # The numbers of experts are of no layer.
  idle = {"moe.num_experts": 1, "moe.top_k": 1, "moe.d_expert": 1}
  return {"layers": ["dense"] * ours["num_layers"], **idle}


def dense(width: int) -> tuple[Row | Pair, ...]:
  """Returns rows of networks without experts; `width` is a family's default."""
  nothing = Pair(_dense, lambda ours: {})
  return (whole("intermediate_size", "d_ff", width), nothing)


# {rope_type of the files: our name of the scaling}.
_TYPES = {"default": None, "linear": "linear", "yarn": "yarn"}
_TYPES["llama3"] = "wavelength"
_TYPE = Row(str, "rope_type", "name", "default", values=_TYPES, also="type")
_FACTOR = number("factor", "factor")
_LENGTH = whole(
  "original_max_position_embeddings", "original_length", lambda o: o["longest"]
)
_STRETCH = _FACTOR._replace(null=lambda o: o["longest"] / o["original_length"])
_YARN = ("beta_fast", "beta_slow", "attention_factor")
_YARN += ("mscale", "mscale_all_dim")
_WAVES = ("low_freq_factor", "high_freq_factor")
_SCALINGS = {
  None: (),
  "linear": (_FACTOR,),
  "yarn": (
    *(_LENGTH, _STRETCH, *(number(name, name, None) for name in _YARN)),
    flag("truncate", "truncate", True, null=False),
  ),
  "wavelength": (_LENGTH, _FACTOR, *(number(name, name) for name in _WAVES)),
}


class Rope(NamedTuple):
  """rope_parameters, or the older rope_theta and rope_scaling.

  theta: the reference's base for files without one.
  longest: the default of max_position_embeddings.
  default: rope_parameters where there are none.
  older: the field that has theta beside rope_scaling.
  length: the field that has the longest context.
  part: the default of the part of a head that turns with the position; None:
    all of it turns.
  """

  theta: float
  longest: int
  default: Mapping[str, Any] = {}
  older: str = "rope_theta"
  length: str = "max_position_embeddings"
  part: float | None = None

  def read(self, fields: Fields, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {key: value}.

    Args:
      fields, ours: as in `Row.read`.
    """
    theta = fields.take(self.older, float, self.theta)
    older = fields.take("rope_scaling", dict, {})
    newer = fields.take("rope_parameters", dict, {})
    where = f"{fields.where}, rope_parameters"
    rope = Fields(older or newer or self.default, where)
    theta = rope.take("rope_theta", float, theta)
    scaling = _TYPE.read(rope, {})
    scaling["longest"] = fields.take(self.length, int, self.longest)
    turned = {}
    if self.part is None:
      _WHOLE_HEADS.read(rope, scaling)
    else:
      part = fields.take("partial_rotary_factor", float, self.part)
      part = rope.take("partial_rotary_factor", float, part)
      turned["attention.rotary_dim"] = int(ours["head_dim"] * part)
    for row in _SCALINGS[scaling["name"]]:
      scaling |= row.read(rope, scaling)
    rope.rest()
    del scaling["longest"]
    scaling = {k: x for k, x in scaling.items() if x is not None}
    scaling = {"attention.rope_scaling": scaling or None}
    return {"rope_theta": theta, **scaling, **turned}

  def write(self, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {field: value}."""
    scaling = ours.get("attention.rope_scaling") or {"name": None}
    theta = ours.get("rope_theta", self.theta)
    rope = _TYPE.write(scaling) | {"rope_theta": theta}
    for row in _SCALINGS[scaling["name"]]:
      rope |= row.write(scaling)
    if self.part is not None:
      turned = ours.get("attention.rotary_dim") or ours["head_dim"]
      rope["partial_rotary_factor"] = turned / ours["head_dim"]
    return {"rope_parameters": rope, self.older: theta}


FULL, SLIDING = "full_attention", "sliding_attention"


def listed(kinds: list[str]) -> dict[str, tuple[str, ...]]:
  """Returns prefix and pattern of a list of layers, with the fewest names.

  Args:
    kinds: of every layer, at least one.
  """
  best = (len(kinds), 0, len(kinds))
  for length in range(1, len(kinds)):
    if length > best[0]:
      break
    first, pattern = len(kinds) - length, kinds[-length:]
    while first >= length and kinds[first - length : first] == pattern:
      first -= length
    best = min(best, (first + length, first, length))
  _, first, length = best
  prefix, pattern = kinds[:first], kinds[first : first + length]
  return {"prefix": tuple(prefix), "pattern": tuple(pattern)}
