"""The figures of a run, or of several laid over each other, as data.

Only metrics of the runs are drawn. A metric that never changes is no figure,
and is listed by `Plots.constant`.
"""

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.run.pages import words
from moe_jax.run.pages.read import Record
from moe_jax.run.pages.words import Group, Metric

COLORS = 8  # Colours of the page's style, c0 to c7.
# Styles of lines: with the colours they tell 32 runs apart.
LINES = ("line", "dashes", "points", "mixed")
_MOST = 100  # Limit on the metrics of a family, and on unknown metrics.
_FEW = 4  # For several runs, a family of at most this many has a figure each.


class Trace(NamedTuple):
  """A line of a figure.

  label: for the legend; "": the line is not in it.
  x, y: numbers; y may be NaN.
  color: "c0" to "c7", "neutral" or a "#rrggbb".
  style: one of `LINES`, or "floor".
  dots: whether its points are marked.
  width: of the line, in points.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  color: str
  style: str
  dots: bool = False
  width: float = 1.7


class Plot(NamedTuple):
  """A figure. names: of the values 0, 1, ... of x; (): x is a number."""

  title: str
  about: str
  x_label: str
  y_label: str
  traces: list[Trace]
  log: bool = False
  names: Sequence[str] = ()


class Plots(NamedTuple):
  """groups: (group, its figures) pairs; constant: {metric: its only value, or NaN}."""

  groups: list[tuple[Group, list[Plot]]]
  constant: dict[str, float]


def look(index: int) -> tuple[str, str]:
  """Returns the colour and the style of a run's line, by the run's index.

  Neighbours differ in both, so that a line shows through the gaps of the next.
  """
  style = (index + index // COLORS) % len(LINES)
  return f"c{index % COLORS}", LINES[style]


def _width(index, number):
  """The width of a run's line, which is drawn over those of earlier runs."""
  return 3.2 - 1.6 * index / (number - 1)


def make(records: Sequence[Record], loss_unit: str = "loss") -> Plots:
  """Returns the figures of all metrics of some runs.

  Args:
    records: of the runs.
    loss_unit: of the loss of their task.
  """
  names = metric_names(records)
  groups, constant = [], {}
  causes = "dropped/capacity" in names and len(records) == 1
  for group in (*words.GROUPS, _others(names)):
    drawn = [*_single(group, records, names), *_families(group, records, names)]
    kept = []
    for name, plot in drawn:
      given = [y for t in plot.traces if t.style != "floor" for y in t.y]
      values = {y for y in given if y == y}
      if len(values) > 1 and not (causes and name == "dropped"):
        unit = loss_unit if plot.y_label == "loss" else plot.y_label
        kept.append(plot._replace(y_label=unit))
      elif len(values) < 2 and name and given:
        constant[name] = max(values, default=math.nan)
    if kept:
      groups.append((group, kept))
  return Plots(groups, constant)


def metric_names(records: Sequence[Record]) -> list[str]:
  """Returns all metrics of some runs, in the order of the page."""
  lines = [x for r in records for x in (*r.train, *r.validation)]
  names = dict.fromkeys(k for line in lines for k in line if k != "step")
  known = [name for group in words.GROUPS for name in group.metrics]
  first = [name for name in known if name in names]
  return first + [name for name in names if name not in first]


def points(lines: list[dict], name: str) -> tuple[list, list]:
  """Returns (steps, values) of a metric.

  Args:
    lines: of `read.Record`.
    name: of the metric.
  """
  there = [line for line in lines if name in line]
  return [line["step"] for line in there], [line[name] for line in there]


def _others(names):
  """The group of metrics that are in no other group."""
  known = {name for group in words.GROUPS for name in group.metrics}
  bases = {name for group in words.GROUPS for name in group.families}
  bases |= {"ema", *words.BESIDE}
  rest = [n for n in names if n not in known and n.split("/")[0] not in bases]
  known = {name: words.metric(name) for name in rest[:_MOST]}
  return words.OTHER._replace(metrics=known)


def _single(group, records, names):
  """(name, figure) of the metrics of a group."""
  for name, metric in group.metrics.items():
    if name in names:
      for plot in _of_metric(name, metric, group.both, records):
        yield name, plot


def _of_metric(name: str, metric: Metric, both: bool, records):
  """The figure of a metric; for several runs, a figure for each split."""
  if len(records) == 1:
    yield _plot(metric, _of_run(name, both, records[0]))
    return
  splits = {"training": [r.train for r in records]}
  splits["validation"] = [r.validation for r in records]
  in_training = any(points(lines, name)[0] for lines in splits["training"])
  if in_training and not both:
    del splits["validation"]
  for split, several in splits.items():
    traces = []
    for i, lines in enumerate(several):
      x, y = points(lines, name)
      color, style = look(i)
      dots = split == "validation"
      width = _width(i, len(records))
      traces += [Trace("", x, y, color, style, dots, width)] * bool(x)
      floor = _floor(name, lines)
      traces += [t for t in floor if t not in traces]
    title = f"{metric.title}, {split}" if in_training and both else metric.title
    if any(len(t.x) > 1 for t in traces):  # The table has single values.
      yield _plot(metric._replace(title=title), traces)


def _of_run(name, both, record):
  """The lines of a metric of one run."""
  sources = [("training", record.train, name, "c0")]
  if both or not points(record.train, name)[0]:
    ema = "validation, moving average"
    sources.append(("validation", record.validation, name, "c1"))
    sources.append((ema, record.validation, f"ema/{name}", "c2"))
  traces = [
    Trace(label, *points(lines, key), color, "line", color != "c0")
    for label, lines, key, color in sources
  ]
  traces = [trace for trace in traces if trace.x]
  if all(len(t.x) < 2 for t in traces):
    return []
  label = traces[0].label if len(traces) > 1 or name in words.FLOORS else ""
  traces[0] = traces[0]._replace(label=label)
  lines = record.train if traces[0].color == "c0" else record.validation
  return traces + _floor(name, lines)


def _floor(name, lines):
  x, y = points(lines, words.FLOORS.get(name, ""))
  return [Trace("floor", x, y, "neutral", "floor")] if x else []


def _plot(metric, traces, x_label="step", names=()):
  seen, shown = set(), []
  for trace in traces:  # The legend shows each label once.
    label = "" if trace.label in seen else trace.label
    shown.append(trace._replace(label=label))
    seen.add(label)
  title, unit, about, log = metric
  return Plot(title, about, x_label, unit, shown, log, names)


def _families(group, records, names):
  """("", figure) of the metrics NAME/MEMBER of a group."""
  for base, metric in group.families.items():
    members = [n for n in names if n.startswith(f"{base}/")][:_MOST]
    if len(members) < 2:
      continue  # Its only member is the whole.
    if len(records) == 1:
      yield from _together(members, metric, records[0])
    elif base == "dropped":
      continue  # The figure of `dropped` shows all causes together.
    elif base != "max_vio" and len(members) <= _FEW:
      for name in members:
        title = f"{metric.title}: {_member(name)}"
        some = metric._replace(title=title)
        yield from ((name, p) for p in _of_metric(name, some, False, records))
    else:
      yield "", _profile(members, metric, records)


def _together(members, metric, record):
  """A figure of all members of a family, for one run."""
  found = []
  for name in members:
    x, y = points(record.train, name)
    x, y = (x, y) if x else points(record.validation, name)
    found += [(name, x, y)] * (len(x) > 1 and any(y))
  colors = _colors(len(found))
  shown = -(-len(found) // COLORS)  # Every n-th line has a label.
  traces = [
    Trace(
      _member(n) if i % shown == 0 or i == len(found) - 1 else "",
      *(x, y, colors[i], "line"),
    )
    for i, (n, x, y) in enumerate(found)
  ]
  yield "", _plot(metric, traces)


def _profile(members, metric, records):
  """A figure of the last value of each member, for several runs."""
  traces = []
  for i, record in enumerate(records):
    last = {}
    for line in (*record.validation, *record.train):
      last |= line
    y = [last.get(name, math.nan) for name in members]
    color, style = look(i)
    x, width = range(len(members)), _width(i, len(records))
    traces.append(Trace("", x, y, color, style, width=width))
  about = f"{metric.about} These are the values of the last line."
  some = metric._replace(about=about)
  label = "layer" if members[0].startswith("max_vio/") else "part"
  names = [name.partition("/")[2] for name in members]
  return _plot(some, traces, label, names)


def _member(name):
  base, _, member = name.partition("/")
  return f"layer {member}" if base == "max_vio" else member


def _colors(number):
  """Colours of the style; for many lines, hues in their order."""
  if number <= COLORS:
    return [f"c{i}" for i in range(number)]
  hues = [0.72 - 0.66 * i / (number - 1) for i in range(number)]
  rgb = [colorsys.hls_to_rgb(hue, 0.5, 0.65) for hue in hues]
  return ["#" + "".join(f"{round(255 * v):02x}" for v in x) for x in rgb]
