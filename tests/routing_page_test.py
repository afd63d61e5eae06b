"""The tables of docs/routing.md are those that the files make."""

import re

import pytest

from moe_jax.core import registry
from moe_jax.moe import types
from tests import routing_page

PAGE = routing_page.PAGE.read_text()


def test_the_tables_are_up_to_date():
  assert routing_page.rewritten(PAGE) == PAGE, (
    "run python -m tests.routing_page and commit docs/routing.md"
  )


@pytest.mark.parametrize("kind", ["routers", "balancers"])
def test_every_part_says_what_it_is(kind):
  """A rule that is an equation or a choice, and a paper where there is one."""
  for name in registry.names(kind):
    head, papers, rule = routing_page.about(registry.find(kind, name))
    assert rule and len(head) > 20, name
    if name not in ("random", "forced", "by_feature", "adaptive", "quantile"):
      assert papers, name


def test_every_fact_is_explained():
  explained = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", PAGE, re.M))
  for name, words in types.FACTS.items():
    if name != "thresholds":  # Routers need it, not balancers.
      assert explained[name] == words
