"""Figures of a report: a metric over training, or one metric against another.

An arm has its own colour (of Okabe and Ito's palette, which colour-blind
readers can tell apart) and its own line or marker, for readers in grey.

A plot is anything with draw(rows, points, folder), which writes its files, and
with `needs`, the metrics of the curves that it draws, if there are any.
"""

import math
import pathlib
import statistics
import textwrap
from collections.abc import Callable, Collection
from typing import NamedTuple

from experiments import intervals, runs

_COLORS = ["#000000", "#e69f00", "#56b4e9", "#009e73"]
_COLORS += ["#0072b2", "#d55e00", "#cc79a7", "#888888"]
_LINES = ["-", (0, (6, 2)), (0, (1, 1)), "-.", (0, (3, 1, 1, 1, 1, 1))]
_LINES += [(0, (10, 4)), (0, (1, 4)), (0, (8, 1, 1, 1, 1, 1))]
_MARKERS = list("osD^vPX*")
# Inches of a single figure: small, so that its letters are large on a page.
_SIZE = 4.4, 3.4
_ROW = 0.22  # Inches of a row of the legend.
_WIDE, _TALL = 46, 34  # Letters of a line of its axes' labels.


class Curve(NamedTuple):
  """A metric over training: a line, and a band from lowest to highest seed.

  metric: of the training lines.
  label: of the vertical axis.
  floor: a metric that is drawn as one dashed line, or None.
  floor_label: of that line.
  log: logarithmic vertical axis.
  arms: rows -> names of the arms that it shows; None: all.
  minus: an arm. Others are drawn as their difference to it, paired by seed.
  name: of the files; "": that of the metric.
  """

  metric: str
  label: str
  floor: str | None = None
  floor_label: str = ""
  log: bool = False
  arms: Callable[[list[dict]], Collection[str]] | None = None
  minus: str = ""
  name: str = ""

  @property
  def needs(self) -> set[str]:
    return {self.metric, self.floor} - {None}

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes <name>.png and <name>.pdf.

    Args:
      rows: of the report; for the order of the arms.
      points: dicts with arm, seed, step and metrics.
      folder: to write to.
    """
    figure, (axes,) = panels(1)
    arms = self.arms(rows) if self.arms else [r["arm"] for r in rows]
    if self.minus:
      points = differences(points, self.metric, self.minus)
      axes.axhline(0, color="black", lw=0.5)
    for arm, style in styles(arms).items():
      steps, mean, low, high = band(points, arm, self.metric)
      if steps:
        axes.plot(steps, mean, label=arm, color=style.color, ls=style.line)
        axes.fill_between(steps, low, high, color=style.color, alpha=0.2, lw=0)
    floors = [p[self.floor] for p in points if self.floor in p]
    if floors:
      level = statistics.fmean(floors)
      axes.axhline(level, color="grey", lw=3, alpha=0.5, label=self.floor_label)
    if self.log:
      _log_scale(axes, "y")
    axes.set_xlabel("step (band: lowest to highest seed)")
    axes.set_ylabel(textwrap.fill(self.label, _TALL))
    save(figure, axes, folder, self.name or self.metric)


class Scatter(NamedTuple):
  """Two metrics of the arms' ends: means with their spread over seeds.

  x, y: metrics of results.csv.
  x_label, y_label: of the axes.
  log: logarithmic horizontal axis.
  arms: as of `Curve`.
  """

  x: str
  y: str
  x_label: str
  y_label: str
  log: bool = False
  arms: Callable[[list[dict]], Collection[str]] | None = None

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes <y>_over_<x>.png and .pdf. An arm without an x is a line across.

    Args:
      rows: of the report.
      points: not used.
      folder: to write to.
    """
    del points
    if self.arms:
      shown = self.arms(rows)
      rows = [r for r in rows if r["arm"] in shown]
    figure, (axes,) = panels(1)
    few = True
    for arm, style in styles(r["arm"] for r in rows if self.y in r).items():
      ends = [r for r in rows if r["arm"] == arm and self.y in r]
      placed = [r for r in ends if self.x in r]
      y = [r[self.y] for r in placed or ends]
      few &= len(y) <= intervals.FEW
      if placed:
        mark(axes, style, [r[self.x] for r in placed], y, arm)
      else:
        mean, ends = intervals.of(y).mean, intervals.of(y).ends
        axes.axhline(mean, color=style.color, ls=style.line, lw=1, label=arm)
        axes.axhspan(*ends, color=style.color, alpha=0.15, lw=0)
    if self.log:
      _log_scale(axes, "x")
    elif all(r.get(self.x, 0) >= 0 for r in rows):  # A share, for instance.
      axes.set_xlim(left=max(axes.get_xlim()[0], -0.05))
    bars = "points: seeds" if few else "bars: 95 % interval"
    axes.set_xlabel(textwrap.fill(f"{self.x_label} ({bars})", _WIDE))
    axes.set_ylabel(textwrap.fill(self.y_label, _TALL))
    save(figure, axes, folder, f"{self.y}_over_{self.x}")


MAX_VIO = Curve(
  "max_vio",
  label="MaxVio of a step, mean over layers",
  floor="max_vio_floor",
  floor_label="random router",
  log=True,
)
BITS_OVER_MAX_VIO = Scatter(
  "max_vio_global",
  "bits_per_byte",
  x_label="validation MaxVio",
  y_label="validation bits per byte",
  log=True,
)


class Style(NamedTuple):
  """The look of an arm."""

  color: str
  line: object
  marker: str


def styles(arms) -> dict[str, Style]:
  """{arm: its look}, in the order in which the arms first come."""
  looks = []
  for turn in range(len(_COLORS)):  # After eight arms other pairs begin.
    turned = (_LINES[turn:] + _LINES[:turn], _MARKERS[turn:] + _MARKERS[:turn])
    looks += zip(_COLORS, *turned, strict=True)
  return {arm: Style(*look) for arm, look in zip(dict.fromkeys(arms), looks)}


def mark(axes, style: Style, x: list, y: list, label: str | None) -> None:
  """Draws a mean over seeds: few seeds as points, else bars of its interval."""
  means = [intervals.of(values) for values in (x, y)]
  bars = [None if i.few else i.half or None for i in means]
  if 1 < len(y) <= intervals.FEW:
    axes.plot(x, y, style.marker, color=style.color, ms=3, alpha=0.5)
  axes.errorbar(
    *(interval.mean for interval in means),
    xerr=bars[0],
    yerr=bars[1],
    fmt=style.marker,
    color=style.color,
    ms=7,
    capsize=3,
    lw=1,
    label=label,
  )


def panels(count: int):
  """(figure, its axes beside each other). A notebook's figures stay its own."""
  from matplotlib.figure import Figure  # Not pyplot, which has one backend.

  size = _SIZE if count == 1 else (4 * count, 4)
  figure = Figure(figsize=size, layout="constrained")
  return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _log_scale(axes, which):
  """Plain numbers at 1, 2 and 5 of every decade, or evenly in a short range."""
  from matplotlib import ticker

  axes.set(**{f"{which}scale": "log"})
  axis = getattr(axes, f"{which}axis")
  low, high = getattr(axes, f"get_{which}lim")()
  few = high < 5 * low  # Of these numbers.
  axis.set_major_locator(
    ticker.MaxNLocator(4) if few else ticker.LogLocator(subs=(1, 2, 5))
  )
  axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axis.set_minor_formatter(ticker.NullFormatter())


def save(figure, axes, folder, name: str) -> None:
  """Writes name.png and name.pdf, with the legend of these axes on top."""
  if labels := axes.get_legend_handles_labels()[1]:
    # An inch has 13 letters; line and gap of a label take the room of 9.
    room = 13 * figure.get_figwidth() / (9 + max(map(len, labels)))
    columns = int(min(max(room, 1), 3))
    # The legend gets room of its own, so that the axes keep theirs.
    more = _ROW * math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + more)
    figure.legend(loc="outside upper center", ncols=columns, handlelength=3)
  path = pathlib.Path(folder, name.replace("/", "_"))
  # Equal figures are equal files.
  figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})
  figure.savefig(f"{path}.png", dpi=200)
  _with_palette(f"{path}.png")


def _with_palette(path):
  """Makes the file a third as large: a figure has few colours."""
  from PIL import Image

  with Image.open(path) as image:
    small = image.convert("RGB").quantize()
  small.save(path, optimize=True)


def differences(points: list[dict], metric: str, baseline: str) -> list[dict]:
  """The points with a metric less that of an arm, at the same seed and step.

  Args:
    points: as in `Curve.draw`; those that have no such partner are left out.
    metric: of which the difference is taken.
    baseline: the arm.
  """
  metric_of = {
    (p["seed"], p["step"]): p[metric]
    for p in points
    if p["arm"] == baseline and metric in p
  }
  return [
    p | {metric: p[metric] - metric_of[p["seed"], p["step"]]}
    for p in points
    if metric in p and (p["seed"], p["step"]) in metric_of
  ]


def band(points: list[dict], arm: str, metric: str) -> tuple[list, ...]:
  """(steps, mean, lowest, highest over seeds) of an arm's metric."""
  arm_points = [p for p in points if p["arm"] == arm and metric in p]
  by_step = runs.grouped([(p["step"], p[metric]) for p in arm_points])
  steps = sorted(by_step)
  values = [by_step[s] for s in steps]
  return (steps, *(list(map(f, values)) for f in (statistics.fmean, min, max)))
