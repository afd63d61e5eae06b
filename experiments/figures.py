"""A metric over training: a line and a band over seeds for each arm."""

import pathlib
import statistics
from typing import NamedTuple


class Curve(NamedTuple):
  """A figure.

  metric: of the training lines; also the name of the files.
  label: of the vertical axis.
  floor: a metric that is drawn as one dashed line, or None.
  floor_label: of that line.
  log: logarithmic vertical axis.
  """

  metric: str
  label: str
  floor: str | None = None
  floor_label: str = ""
  log: bool = False


def draw(curve: Curve, points: list[dict], folder: pathlib.Path) -> None:
  """Writes <metric>.png and <metric>.pdf.

  Args:
    curve: what to draw.
    points: dicts with arm, seed, step and metrics.
    folder: to write to.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  from matplotlib import ticker

  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  for arm in dict.fromkeys(p["arm"] for p in points):
    steps, mean, low, high = band(points, arm, curve.metric)
    (line,) = axes.plot(steps, mean, label=arm)
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
  floors = [p[curve.floor] for p in points if curve.floor in p]
  if floors:
    axes.axhline(
      statistics.fmean(floors), color="black", ls="--", label=curve.floor_label
    )
  if curve.log:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  axes.set(xlabel="step (band: lowest to highest seed)", ylabel=curve.label)
  if axes.get_legend_handles_labels()[0]:
    figure.legend(loc="outside upper center", ncols=3)
  name = curve.metric.replace("/", "_")
  for kind in ("png", "pdf"):
    figure.savefig(folder / f"{name}.{kind}", dpi=150)
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
