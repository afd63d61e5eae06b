"""Tests the choices of a stage of tuning, against numbers made by hand."""

import pytest

from experiments import tuning
from moe_jax.core.errors import ConfigError

LOWEST = tuning.Stage("optim.learning_rate", (1e-3, 1e-2, 1e-1))
TARGET = tuning.Stage(
  {"a": "model.moe.x"}, {"a": (1e-3, 1e-2, 1e-1)}, "max_vio_global", 0.3
)


def test_the_lowest():
  found = {1e-3: 3.0, 1e-2: 2.0, 1e-1: 2.5}
  assert LOWEST.choose("any", found) == {"optim.learning_rate": 1e-2}


def test_a_run_that_diverged_is_never_the_lowest():
  found = {1e-3: float("nan"), 1e-2: 2.0, 1e-1: float("inf")}
  assert LOWEST.choose("any", found) == {"optim.learning_rate": 1e-2}


def test_none_is_chosen_where_all_diverged():
  found = {1e-3: float("nan"), 1e-2: float("inf"), 1e-1: float("inf")}
  for stage in (LOWEST, TARGET):
    with pytest.raises(ConfigError, match="all runs of the arm a diverged"):
      stage.choose("a", found)
  found[1e-2] = 0.4
  assert TARGET.choose("a", found) == {"model.moe.x": 1e-2}


@pytest.mark.parametrize(
  "metrics, value",
  [
    # Half way from 3 to 0.03 in logarithms is half way from 1e-3 to 1e-2.
    ((3.0, 0.03, 0.01), 0.0032),
    # Between the last two: 0.3 = 0.6 / 2, of a factor 4 in all.
    ((2.4, 0.6, 0.15), 0.032),
    ((0.3, 0.2, 0.1), 1e-3),
    # Never reached: the nearest one.
    ((5.0, 2.0, 0.9), 1e-1),
    ((0.1, 0.02, 0.01), 1e-3),
    # It falls and rises again: where it last is there.
    ((3.0, 0.03, 3.0), 0.032),
  ],
)
def test_the_value_that_meets_a_target(metrics, value):
  found = dict(zip((1e-3, 1e-2, 1e-1), metrics))
  assert TARGET.choose("a", found) == {"model.moe.x": value}


def test_an_arm_without_a_choice():
  assert TARGET.tried("b") == {}
  assert TARGET.tried("a")[1e-2] == {"model.moe.x": 1e-2}


def test_a_choice_at_an_end_is_said_to_be_one():
  words = tuning.describe([LOWEST], "a", {"optim.learning_rate": 1e-2})
  assert words == "optim.learning_rate = 0.01 (of 0.001, 0.01, 0.1)"
  words = tuning.describe([LOWEST], "a", {"optim.learning_rate": 1e-1})
  assert words.endswith("at an end)")


def test_a_target_that_was_not_met_is_said_to_be_none():
  words = tuning.describe([TARGET], "a", {"model.moe.x": 1e-2})
  assert words.endswith("; max_vio_global was never 0.3 between them)")
  words = tuning.describe([TARGET], "a", {"model.moe.x": 3.2e-3})
  assert words == "model.moe.x = 0.0032 (of 0.001, 0.01, 0.1)"
