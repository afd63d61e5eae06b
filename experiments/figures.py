"""Figures of a report: a metric over training, or one metric against another.

An arm has its own colour (of Okabe and Ito's palette, which colour-blind
readers can tell apart) and its own line or marker, for readers in grey.
"""

import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from experiments import intervals

_COLORS = (
  "#000000",
  "#e69f00",
  "#56b4e9",
  "#009e73",
  "#0072b2",
  "#d55e00",
  "#cc79a7",
  "#888888",
)
_LINES = (
  "-",
  (0, (6, 2)),
  (0, (1, 1)),
  "-.",
  (0, (3, 1, 1, 1, 1, 1)),
  (0, (10, 4)),
  (0, (1, 4)),
  (0, (8, 1, 1, 1, 1, 1)),
)
_MARKERS = "osD^vPX*"


class Plot(Protocol):
  """Anything a report draws."""

  def needs(self) -> set[str]:
    """Metrics of the curves that it draws."""

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes its files into the folder, from rows and points of curves."""


class Curve(NamedTuple):
  """A metric over training: a line, and a band from lowest to highest seed.

  metric: of the training lines; also the name of the files.
  label: of the vertical axis.
  floor: a metric that is drawn as one dashed line, or None.
  floor_label: of that line.
  log: logarithmic vertical axis.
  arms: the ones that it shows; None: all.
  """

  metric: str
  label: str
  floor: str | None = None
  floor_label: str = ""
  log: bool = False
  arms: Sequence[str] | None = None

  def needs(self) -> set[str]:
    """Metrics of training that it draws."""
    return {self.metric, self.floor} - {None}

  def _shows(self, arm):
    return self.arms is None or arm in self.arms

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes <metric>.png and <metric>.pdf.

    Args:
      rows: of the report; for the order of the arms.
      points: dicts with arm, seed, step and metrics.
      folder: to write to.
    """
    figure, (axes,) = panels(1)
    shown = [r for r in rows or points if self._shows(r["arm"])]
    for arm, style in styles(shown).items():
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
    axes.set(xlabel="step (band: lowest to highest seed)", ylabel=self.label)
    save(figure, axes, folder, self.metric)


class Scatter(NamedTuple):
  """Two metrics of the arms' ends: means with their intervals over seeds.

  x, y: metrics of results.csv.
  x_label, y_label: of the axes.
  log: logarithmic horizontal axis.
  """

  x: str
  y: str
  x_label: str
  y_label: str
  log: bool = False

  def needs(self) -> set[str]:
    """Metrics of training that it draws: none."""
    return set()

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes <y>_over_<x>.png and .pdf. An arm without an x is a line across.

    Args:
      rows: of the report.
      points: not used.
      folder: to write to.
    """
    del points
    figure, (axes,) = panels(1)
    for arm, style in styles(rows).items():
      of_arm = [r for r in rows if r["arm"] == arm and self.y in r]
      if not of_arm:
        continue
      y = intervals.of([r[self.y] for r in of_arm])
      placed = [r[self.x] for r in of_arm if self.x in r]
      if not placed:
        axes.axhline(y.mean, color=style.color, ls=style.line, lw=1, label=arm)
        half = y.half or 0
        axes.axhspan(
          y.mean - half, y.mean + half, color=style.color, alpha=0.15, lw=0
        )
        continue
      x = intervals.of(placed)
      axes.errorbar(
        x.mean,
        y.mean,
        xerr=x.half,
        yerr=y.half,
        fmt=style.marker,
        color=style.color,
        ms=7,
        capsize=3,
        lw=1,
        label=arm,
      )
    if self.log:
      _log_scale(axes, "x")
    axes.set(xlabel=self.x_label, ylabel=self.y_label)
    save(figure, axes, folder, f"{self.y}_over_{self.x}")


class _Style(NamedTuple):
  color: str
  line: object
  marker: str


def styles(dicts) -> dict[str, _Style]:
  """{arm: its look}, in the order in which the arms come."""
  arms = dict.fromkeys(d["arm"] for d in dicts)
  looks = []
  for turn in range(len(_COLORS)):  # After eight arms other pairs begin.
    shifted = (
      _COLORS,
      _LINES[turn:] + _LINES[:turn],
      _MARKERS[turn:] + _MARKERS[:turn],
    )
    looks += zip(*shifted, strict=True)
  return {arm: _Style(*look) for arm, look in zip(arms, looks)}


def panels(count: int):
  """(figure, its axes beside each other)."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  width = 6 if count == 1 else 4 * count
  figure, axes = plt.subplots(
    1, count, figsize=(width, 4), layout="constrained", squeeze=False
  )
  return figure, list(axes[0])


def _log_scale(axes, which):
  """Plain numbers at 1, 2 and 5 of every decade."""
  from matplotlib import ticker

  axes.set(**{f"{which}scale": "log"})
  axis = getattr(axes, f"{which}axis")
  axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axis.set_minor_formatter(ticker.NullFormatter())


def save(figure, axes, folder, name: str) -> None:
  """Writes name.png and name.pdf, with the legend of these axes on top."""
  from matplotlib import pyplot as plt

  if axes.get_legend_handles_labels()[0]:
    figure.legend(
      loc="outside upper center", ncols=3, handlelength=3, fontsize="small"
    )
  name = name.replace("/", "_")
  # Equal figures are equal files.
  for kind, dated in (("png", {}), ("pdf", {"CreationDate": None})):
    path = pathlib.Path(folder, f"{name}.{kind}")
    figure.savefig(path, dpi=150, metadata=dated)
  plt.close(figure)


def band(points: list[dict], arm: str, metric: str) -> tuple[list, ...]:
  """(steps, mean, lowest, highest over seeds) of an arm's metric."""
  by_step = {}
  for p in points:
    if p["arm"] == arm and metric in p:
      by_step.setdefault(p["step"], []).append(p[metric])
  steps = sorted(by_step)
  values = [by_step[s] for s in steps]
  return (
    steps,
    [statistics.fmean(v) for v in values],
    [min(v) for v in values],
    [max(v) for v in values],
  )
