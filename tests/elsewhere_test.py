"""docs/elsewhere.md names tests that are there."""

import ast
import re

from tests.house import ROOT

PAGE = (ROOT / "docs" / "elsewhere.md").read_text()


def test_named_tests_exist():
  named = set(re.findall(r"`(\w+_test\.py)::(test_\w+)`", PAGE))
  assert len(named) > 10
  for file, name in sorted(named):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    found = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
    assert name in found, f"{file} has no {name}"


def test_every_report_has_its_number():
  """A link says what it leads to."""
  links = re.findall(
    r"\[#(\d+)\]\(https://github\.com/[\w.-]+/[\w.-]+/\w+/(\d+)\)", PAGE
  )
  assert len(links) == PAGE.count("](https://") and links
  assert all(shown == number for shown, number in links)
