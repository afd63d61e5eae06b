"""Descriptions of values: what fits, and what a message says of the rest."""

import math

import pytest

from moe_jax.core import options
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import (
  either,
  flag,
  integer,
  items,
  labelled,
  named,
  number,
  optional,
  part,
  section,
  text,
  word,
)

LONG = 10**5000  # Too long for repr.
YARN = section({"factor": number(above=0), "truncate": bool}, ["factor"])


@pytest.mark.parametrize(
  ("option", "right", "wrong"),
  [
    (
      integer(1),
      (1, 2**31 - 1),
      (0, -1, 1.0, True, "1", None, 2**31, 10**19, math.nan),
    ),
    (integer(-1, -1), (-1,), (0, 1)),
    (
      number(),
      (0, 0.0, -1.5, 3, 3.4e38, 1.2e-38),
      (True, "1", None, math.nan, math.inf, -math.inf, 1e39, LONG, 1e-39),
    ),
    (number(0), (0, 1.5), (-1e-9, math.nan)),
    (number(0, 1), (0, 1), (-0.1, 1.1)),
    (number(0, below=1), (0, 0.99), (1, -0.1)),
    (number(above=0, high=1), (1, 1e-9), (0, 0.0, 1.1)),
    (word("a", "b"), ("a", "b"), ("c", "", None, 1, ("a",))),
    (flag(), (True, False), (0, 1, None, "True")),
    (text(), ("", "x"), (1, None, "a\0b")),
    (optional(integer(1)), (None, 1), (0, "none")),
    (either(integer(1), word("all")), (1, "all"), (0, "any", None)),
    (items(integer(1)), ((), (1, 2), [3]), (1, "ab", None, (0,), (None,))),
    (items(str, 2), (("a", "b"),), (("a",), "ab", ("a", None))),
    (items((number(0), integer(1))), ((0.5, 1),), ((1, 0.5), (1,), (1, 1, 1))),
    (
      section({"a": int, "b": str | None}),
      ({"a": 1, "b": None},),
      ({"a": 1}, {"a": 1, "b": None, "c": 1}, 1, None, {"a": None, "b": "x"}),
    ),
    (section({"a": int}, required=()), ({}, {"a": 1}), ({"b": 1},)),
    (
      labelled(section({"a": int})),
      ({}, {"x-1": {"a": 1}}),
      ({"a.b": {"a": 1}}, {"a/b": {"a": 1}}, {"x": {"a": "1"}}, {"x": 1}),
    ),
    (part(), ({"name": "x", "any": 1},), ({}, {"nme": "x"}, "x", None)),
    (
      named({"yarn": YARN}),
      ({"name": "yarn", "factor": 2.0},),
      ({"name": "yarm", "factor": 2.0}, {"factor": 2.0}, {"name": "yarn"}),
    ),
  ],
)
def test_what_fits_and_what_does_not(option, right, wrong):
  for value in right:
    option.check(value, "key")
  for value in wrong:
    with pytest.raises(ConfigError, match="key"):
      option.check(value, "key")


@pytest.mark.parametrize(
  ("option", "value", "message"),
  [
    (integer(1), 0, "a.b = 0 is not a whole number from 1 to 2147483647; give"),
    (
      number(0),
      math.nan,
      "a.b = nan is not a number of 0 or more in float32; give",
    ),
    (
      number(0, below=1),
      1.5,
      "a.b = 1.5 is not a number of 0 or more and below",
    ),
    (number(above=0), 1e300, r"a.b = 1e\+300 .* above 0 in float32"),
    (word("sum", "mean"), "summ", 'one of "sum", "mean"; did you mean "sum"'),
    (optional(flag()), 3, "a.b = 3 is not True or False or None; give one"),
    (
      either(integer(1), word("sequence")),
      "seqence",
      'from 1 to 2147483647 or "sequence"; did you mean "sequence"',
    ),
    (items(integer(1)), (1, None), r"a.b\[1\] = None is not a whole number"),
    (section({"c": int}), {"d": 1}, 'a.b has no "d"; known: c'),
    (section({"c": int}), {}, 'a.b needs "c", a whole number from'),
    (section({"c": section({"d": int})}), {"c": {"d": ""}}, "a.b.c.d = '' is"),
    (labelled(part()), {"x": 1}, "a.b.x = 1 is not a dict with the name of a"),
    (named({"yarn": YARN}), {"name": "yarm"}, 'name = .*did you mean "yarn"'),
    (integer(), LONG, r"a.b = int\(…\) is not a whole number"),
    (integer(), "x" * 1000, "a.b = 'xxx.*x… is not a whole number"),
  ],
  ids=lambda x: None if x is not LONG else "long",
)
def test_messages(option, value, message):
  with pytest.raises(ConfigError, match=message) as e:
    option.check(value, "a.b")
  assert "\n" not in str(e.value) and len(str(e.value)) < 250


def test_annotations_are_descriptions():
  def build(
    a: number(0), b: int, c: "float | None" = None, d=(), e: tuple = ()
  ):
    pass

  table = options.of(build)
  assert list(table) == ["a", "b", "c", "d", "e"]
  for value in (object(), 1.5, None, ("a", 1)):
    table["d"].check(value, "d")  # Anything, but what cannot be hashed.
    table["e"].check(value, "e")
  assert table["a"].is_number and table["c"].is_number
  assert table["c"].fits(None) and not table["b"].is_number
  described = options.arguments(build)
  described.check({"a": 1.0, "b": 2}, "x")
  described.check({"a": 1.0, "b": 2, "c": None, "d": object()}, "x")
  for wrong in ({"a": 1.0}, {"a": -1.0, "b": 2}, {"a": 1.0, "b": 2, "d": {}}):
    with pytest.raises(ConfigError):
      described.check(wrong, "x")
