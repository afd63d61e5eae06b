"""The tables of docs/routing.md are those that the files make."""

import ast
import re

import pytest

from configs import tiny
from moe_jax.core import registry
from moe_jax.data.text import mixed
from moe_jax.moe import types
from moe_jax.moe.routers import hash as hash_router
from moe_jax.training import program
from tests import routing_page, small
from tests.house import ROOT

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


def test_every_config_line_is_one():
  """Pasted into a config of 16 experts they build a decoder."""
  lines = [
    (name, ast.literal_eval(line))
    for name, line in re.findall(r"^\| `(\w+)` .*\| `(\{.*\})` \|$", PAGE, re.M)
  ]
  names = [*registry.names("routers"), *registry.names("balancers")]
  assert sorted(name for name, _ in lines) == sorted(names)
  for name, section in lines:
    c = tiny.get_config()
    c.model.allow_noncausal = True
    c.model.moe.update(num_experts=16, top_k=2, capacity_factor=None)
    c.model.moe.dispatcher = {"name": "sorted"}
    if name in registry.names("routers"):
      needs = {"t": {"name": "threshold", "share": 2 / 16}}
      c.model.moe.balancers = needs if name == "expert_threshold" else {}
      c.model.moe.router = section
    else:
      c.model.moe.router = {"name": "relu" if name == "l1" else "top_k"}
      c.model.moe.balancers = {name: section}
    program.build_model(c, small.task())


def test_counts_for_hash_are_made_as_the_page_says(tmp_path, monkeypatch):
  monkeypatch.setattr(mixed, "prepare", lambda *_: small.SmallCorpus())
  source = re.search(r"<!-- run: counts -->\n```python\n(.*?)```", PAGE, re.S)[
    1
  ]
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)
  exec(source, {})
  count_V = hash_router.read_counts("counts.npy", small.V)
  assert count_V.sum() == sum(
    len(small.SmallCorpus().tokens("train", x)) for x in ("a", "b")
  )


def test_every_fact_is_explained():
  explained = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", PAGE, re.M))
  for name, words in types.FACTS.items():
    if name != "thresholds":  # Routers need it, not balancers.
      assert explained[name] == words
