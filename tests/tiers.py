"""Chooses a test's cases for the quick tier; `tests.long` runs the others."""

from collections.abc import Iterable

import pytest


def only(quick: Iterable, cases: Iterable, several: bool = False) -> list:
  """Parameters of a test: all cases, those that are not in `quick` marked long.

  Args:
    quick: cases that together show each idea once.
    cases: all of them.
    several: whether a case holds the values of several arguments.

  Raises:
    ValueError: a quick case is none of them.
  """
  quick, cases = list(quick), list(cases)
  unknown = [case for case in quick if case not in cases]
  if unknown:
    raise ValueError(f"no cases of this test: {unknown}")
  return [
    case
    if case in quick
    else pytest.param(*(case if several else (case,)), marks=pytest.mark.long)
    for case in cases
  ]
