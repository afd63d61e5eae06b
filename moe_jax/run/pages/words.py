"""Titles and explanations of the metrics of a run, for its page: words.toml."""

import pathlib
import tomllib
from collections.abc import Iterable
from typing import NamedTuple


class Metric(NamedTuple):
  """The words for a metric.

  title: of its figure.
  unit: of the vertical axis.
  about: the meaning of the figure, and how to read it.
  log: whether its axis may be logarithmic.
  """

  title: str
  unit: str
  about: str
  log: bool = False


class Group(NamedTuple):
  """Metrics that stand together on a page.

  metrics: by name.
  families: by name; a figure has all metrics NAME/... of a family.
  both: whether the validation split is drawn too.
  """

  heading: str
  about: str
  metrics: dict[str, Metric]
  families: dict[str, Metric]
  both: bool = False


def _group(heading, about, both=False, metrics=(), families=()):
  made = (
    {k: Metric(**v) for k, v in dict(x).items()} for x in (metrics, families)
  )
  return Group(heading, about, *made, both)


_WORDS = tomllib.loads(
  pathlib.Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
LOSS_UNITS, GLOSSARY = _WORDS["loss_units"], _WORDS["glossary"]
GROUPS = tuple(_group(**group) for group in _WORDS["groups"])
LEARNING, BALANCE = GROUPS[:2]
OTHER = _group(
  "Other metrics", "Metrics of the run that this page has no words for.", True
)
# Floors are drawn or shown beside their metric; others repeat a sum that is drawn.
BESIDE = ("max_vio_floor", "neg_log_perplexity")
FLOORS = {"max_vio": "max_vio_floor", "max_vio_global": "max_vio_floor"}


def loss_unit(tasks: Iterable[str]) -> str:
  """Returns the unit of the loss of tasks; "loss" if they do not share one.

  Args:
    tasks: names of the tasks.
  """
  units = {LOSS_UNITS.get(task, "loss") for task in tasks}
  return units.pop() if len(units) == 1 else "loss"


def unit(name: str) -> str:
  """Returns the unit of a metric such as max_vio/00; "" where it has none."""
  base = name.partition("/")[0]
  found = metric(base).unit
  return "" if found == base else found


def metric(name: str) -> Metric:
  """Returns a metric by name; an unknown metric is described by its name."""
  for group in GROUPS:
    if name in group.metrics:
      return group.metrics[name]
  title = f"{name.removeprefix('extra/')} (reported by a part)"
  return Metric(
    title if name.startswith("extra/") else name,
    *(name, "A metric that the task or a part of the run reports."),
  )
