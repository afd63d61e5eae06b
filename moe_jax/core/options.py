"""Descriptions of the values that are allowed: type, range, choices, or None.

A description stands beside the code that uses the value: as the annotation of
an argument, of a part's `build` for instance, or in a table of a section of a
config, OPTIONS = {"num_steps": integer(1), ...}. In both, int, float, bool and
str stand for `integer()`, `number()`, `flag()` and `text()`.
"""

import dataclasses
import inspect
import operator
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from moe_jax.core.errors import ConfigError, did_you_mean, nearest

# The ranges of int32 and float32, in which every number is used at the end.
_LARGEST_INT = 2**31 - 1
_LARGEST, _SMALLEST = (2 - 2**-23) * 2.0**127, 2.0**-126
_LABEL = re.compile(r"[\w-]+")


@dataclasses.dataclass(frozen=True, eq=False)
class Option:
  """A description of a value.

  words: a noun phrase for it, such as "a number of 0 or more".
  fits: value -> whether the value itself is right.
  inside: (value, key) -> None, checks the values that it holds.
  choices: the words that it may be.
  is_number: whether it is, or may be, a float that changes no shape.
  table: {key: description} of a section.
  """

  words: str
  fits: Callable[[Any], bool]
  inside: Callable[[Any, str], None] = lambda value, key: None
  choices: tuple[str, ...] = ()
  is_number: bool = False
  table: Mapping[str, "Option"] = dataclasses.field(default_factory=dict)

  def check(self, value, key: str) -> None:
    """Raises ConfigError for a value that does not fit.

    Args:
      value: from the config.
      key: its full key, for the message.
    """
    if not self.fits(value):
      near = nearest(value, self.choices) if isinstance(value, str) else ""
      # A lone word where several may stand.
      lone = isinstance(value, str) and self.fits((value,))
      one = f"({shown(value)},)" if lone else "one"
      raise ConfigError(
        f"{key} = {shown(value)} is not {self.words}{near or f'; give {one}'}"
      )
    self.inside(value, key)


def integer(low: int = -_LARGEST_INT, high: int = _LARGEST_INT) -> Option:
  """A whole number of int32.

  Args:
    low, high: the bounds, both included.
  """
  words = f"a whole number from {low} to {high}" if low < high else str(low)
  return Option(words, lambda x: _is(x, int) and low <= x <= high)


def number(low=None, high=None, above=None, below=None) -> Option:
  """A finite number of float32, within the bounds that are given.

  Args:
    low, high: bounds that are included; None: no such bound.
    above, below: bounds that are excluded; None: no such bound.
  """
  bounds = (
    ("of {:g} or more", operator.ge, low),
    ("above {:g}", operator.gt, above),
    ("at most {:g}", operator.le, high),
    ("below {:g}", operator.lt, below),
  )
  bounds = [bound for bound in bounds if bound[2] is not None]
  words = " and ".join(words.format(end) for words, _, end in bounds)

  def fits(x):
    in_float32 = _is(x, int | float) and _SMALLEST <= abs(x or 1) <= _LARGEST
    return in_float32 and all(compare(x, end) for _, compare, end in bounds)

  words = " ".join(["a number", *words.split(), "in float32"])
  return Option(words, fits, is_number=True)


def word(*choices: str) -> Option:
  """A word among `choices`."""
  words = ", ".join(f'"{choice}"' for choice in choices)
  words = f"one of {words}" if len(choices) > 1 else words
  fits = lambda x: isinstance(x, str) and x in choices  # noqa: E731
  return Option(words, fits, choices=choices)


def flag() -> Option:
  """True or False."""
  return Option("True or False", lambda x: isinstance(x, bool))


def text() -> Option:
  """Any text."""
  return Option("a text", lambda x: isinstance(x, str) and "\0" not in x)


def optional(option) -> Option:
  """None, or a value that `option` describes."""
  return either(option, types.NoneType)


def either(*options) -> Option:
  """A value that any of the `options` describes, such as a number or a word."""
  options = [*map(_described, options)]
  return Option(
    " or ".join(o.words for o in options),
    lambda x: any(o.fits(x) for o in options),
    lambda x, key: next(o for o in options if o.fits(x)).inside(x, key),
    choices=sum((o.choices for o in options), ()),
    is_number=any(o.is_number for o in options),
  )


def items(option, length: int | None = None, shortest: int = 0) -> Option:
  """A tuple of values.

  Args:
    option: the description of every value; or a tuple with a description for
      each of them.
    length: how many values; None: any number.
    shortest: the least number of values, if `length` is None.
  """
  length = len(option) if isinstance(option, tuple) else length

  def inside(values, key):
    each = option if isinstance(option, tuple) else (option,) * len(values)
    for i, (annotation, value) in enumerate(zip(each, values)):
      _described(annotation).check(value, f"{key}[{i}]")

  words = "a tuple" if length is None else f"a tuple of {length} values"
  words += f" with {shortest} or more values" if shortest else ""

  def fits(x):
    right = _is(x, tuple | list) and length in (None, len(x))
    return right and len(x) >= shortest

  return Option(words, fits, inside)


def section(table: Mapping[str, Any], required=None) -> Option:
  """A section of a config, with the keys of a table.

  Args:
    table: {key: description}.
    required: the keys that must be there; None: all of them.
  """
  table = {name: _described(option) for name, option in table.items()}

  def inside(values, key):
    for name in values:
      if name not in table:
        raise ConfigError(f'{key} has no "{name}"' + did_you_mean(name, table))
    for name in table if required is None else required:
      if name not in values:
        raise ConfigError(f'{key} needs "{name}", {table[name].words}')
    for name, value in values.items():
      table[name].check(value, f"{key}.{name}".removeprefix("config."))

  return Option("a section", _is_section, inside, table=table)


def labelled(option: Option) -> Option:
  """A section of any number of labels, whose values `option` describes."""

  def inside(values, key):
    for label, value in values.items():
      if not (isinstance(label, str) and _LABEL.fullmatch(label)):
        raise ConfigError(
          f"{key} has the label {shown(label)}; give letters, digits, _ and -"
        )
      option.check(value, f"{key}.{label}")

  return Option("a section", _is_section, inside)


def part() -> Option:
  """A section for a part, whose options its own `build` describes."""
  words = "a dict with the name of a part and its options"
  return Option(words, lambda x: _is_section(x) and "name" in x)


def named(sections: Mapping[str, Option]) -> Option:
  """A section whose "name" says which of the `sections` has its other keys."""

  def inside(values, key):
    word(*sections).check(values["name"], f"{key}.name")
    rest = {k: v for k, v in values.items() if k != "name"}
    sections[values["name"]].check(rest, key)

  return dataclasses.replace(part(), inside=inside)


def arguments(function: Callable) -> Option:
  """A section with the arguments of a function, or the fields of a record."""
  arguments = inspect.signature(function, eval_str=True).parameters
  needed = [name for name, a in arguments.items() if a.default is a.empty]
  return section({k: a.annotation for k, a in arguments.items()}, needed)


def of(function: Callable) -> Mapping[str, Option]:
  """Returns {argument: its description} of a function, see `arguments`."""
  return arguments(function).table


def defaults(function: Callable) -> dict[str, Any]:
  """Returns {argument: its default} of a function's optional arguments."""
  parameters = inspect.signature(function).parameters.values()
  return {p.name: p.default for p in parameters if p.default is not p.empty}


_PLAIN = {
  int: integer(),
  float: number(),
  bool: flag(),
  str: text(),
  types.NoneType: Option("None", lambda x: x is None),
}
_ANY = Option("a number, word or tuple", lambda x: isinstance(x, Hashable))


def _described(annotation) -> Option:
  """The `Option` that an annotation is or stands for; any value for none."""
  if isinstance(annotation, Option):
    return annotation
  union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
  kinds = typing.get_args(annotation) if union else (annotation,)
  if not all(kind in _PLAIN for kind in kinds):
    return _ANY
  return either(*kinds) if union else _PLAIN[annotation]


def shown(value) -> str:
  """Returns a value for a message, on one line and not too long."""
  try:
    words = " ".join(repr(value).split())
  except (ValueError, RecursionError):  # A number of a million digits.
    words = f"{type(value).__name__}(…)"
  return words if len(words) <= 100 else f"{words[:100]}…"


def _is(value, kind):
  """Whether a value is of a kind; True is not a number."""
  return isinstance(value, kind) and not isinstance(value, bool)


def _is_section(value):
  return hasattr(value, "items")
