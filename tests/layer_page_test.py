"""The examples of docs/layer.md: complete, short, and they learn."""

import re

import numpy as np
import pytest
from flax import nnx

import moe_jax
from tests.house import ROOT

PAGE = (ROOT / "docs" / "layer.md").read_text()
EXAMPLES = dict(
  re.findall(
    r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)^```", PAGE, re.M | re.S
  )
)


@pytest.fixture(autouse=True)
def eager_sharding():
  """Takes back a switch of Flax that an example turns off."""
  before = nnx.using_eager_sharding()
  yield
  nnx.use_eager_sharding(before)


def test_there_is_an_example_for_each_way_to_hold_parameters():
  ways = ["Plain functions", "Linen", "NNX", "The linen module in NNX"]
  assert list(EXAMPLES) == ways
  assert PAGE.count("```python") == 4
  for name in moe_jax._PLACES:
    assert f"`moe_jax.{name}`" in PAGE
    assert any(f"moe_jax.{name}(" in text for text in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_learns(name, capsys):
  """Its statistics count two experts for every token."""
  found = {"__name__": "example"}
  exec(compile(EXAMPLES[name], name, "exec"), found)
  losses, stats = found["losses"], found["stats"]
  assert len(losses) == 20 and losses[-1] < 0.8 * losses[0]
  count_E = np.asarray(stats.count_E).sum((0, 1))
  assert count_E.shape == (8,) and count_E.sum() == 4 * 16 * 2
  assert str(losses[0]) in capsys.readouterr().out


def test_an_example_is_about_twenty_lines():
  """But for its imports and blank lines."""
  for name, text in EXAMPLES.items():
    lines = [x for x in text.splitlines() if x.strip()]
    lines = [x for x in lines if not x.startswith(("import ", "from "))]
    assert len(lines) <= 30, (name, len(lines))
