"""What the report of scaling shows."""

import math
import statistics

from experiments import columns, figures, intervals
from experiments.figures import Curve
from experiments.report import Claim, Column, Plan
from experiments.scaling import law, speedup, sweep

_SIZES = (32, 48, 64, 96)


def law_lines(rows: list[dict]) -> list[str]:
  """The law fitted to all sizes but the largest, and how well it tells that.

  [] without three sizes, of three numbers of experts each.
  """
  means, held_out = _means(rows)
  fitted = [p for p in means if p.parameters < held_out]
  if not _enough(fitted):
    return []
  largest = [p for p in means if p.parameters == held_out]
  found = law.fit(fitted)
  plain = law.fit(fitted, interaction=False)
  by_seed = [
    law.fit(points).c
    for points in _by_seed(rows, held_out)
    if _enough(points) and len(points) == len(fitted)
  ]
  c = f"c = {found.c:+.4f}"
  if len(by_seed) > 1:
    interval = intervals.of(by_seed)
    word = "decided" if interval.decides else "not decided, zero is in it"
    c += (
      f" (fitted to each of {interval.count} seeds alone: {interval.mean:+.4f} ±"
      f" {interval.half:.4f}, {word})"
    )
  return [
    f"The law of routed language models, fitted to the {len(fitted)} means of"
    " all sizes but the largest:",
    f"- a = {found.a:+.4f}, b = {found.b:+.4f}, {c}, d = {found.d:+.4f},"
    f" E_start = {found.start:.2f}, E_max = {found.most:.0f}; root mean squared"
    f" error of log10 L {law.error(found, fitted):.5f}.",
    f"- On the largest size, {held_out} parameters, which it has not seen:"
    f" {law.error(found, largest):.5f}; without interaction (c = 0)"
    f" {law.error(plain, largest):.5f}.",
  ]


def _enough(points):
  sizes = {p.parameters for p in points}
  return len(sizes) > 1 and len({p.experts for p in points}) > 2


def _means(rows):
  """A point for each arm, of the mean loss; and the largest N."""
  points = {}
  for row in rows:
    if "loss" in row:
      points.setdefault(_place(row, rows), []).append(row["loss"])
  means = [
    law.Point(n, e, statistics.fmean(losses))
    for (n, e), losses in points.items()
    if n is not None
  ]
  return means, max((p.parameters for p in means), default=0)


def _by_seed(rows, held_out):
  """Points of each seed, without the largest size."""
  for seed in sorted({r["seed"] for r in rows}):
    of_seed = [r for r in rows if r["seed"] == seed and "loss" in r]
    yield [
      law.Point(n, e, row["loss"])
      for row in of_seed
      for n, e in [_place(row, rows)]
      if n is not None and n < held_out
    ]


def _place(row, rows):
  """(N: parameters of the dense model of that size, E)."""
  size, experts = row["arm"].split("-")
  dense = sweep.name(int(size), sweep.DENSE)
  found = (r["total_parameters"] for r in rows if r["arm"] == dense)
  return next(found, None), 1 if experts == sweep.DENSE else int(experts)


class Experts:
  """Loss and speed-ups against the number of experts, a line for each size."""

  def needs(self) -> set[str]:
    """Metrics of the curves that it draws: none."""
    return set()

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes experts.png and experts.pdf; the law as thin lines."""
    del points
    panels = {
      "bits_per_byte": "bits per byte of the validation windows",
      speedup.STEPS: "speed-up in steps to the dense model's loss",
      speedup.TIME: "speed-up in time",
    }
    panels = {k: v for k, v in panels.items() if any(k in r for r in rows)}
    figure, all_axes = figures.panels(len(panels))
    sizes = list(dict.fromkeys(r["arm"].split("-")[0] for r in rows))
    styles = figures.styles([{"arm": size} for size in sizes])
    for axes, (metric, label) in zip(all_axes, panels.items()):
      for size in sizes:
        of_size = [r for r in rows if r["arm"].split("-")[0] == size]
        self._line(axes, of_size, rows, metric, styles[size], size)
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
      axes.set(xlabel="experts (1: dense)", ylabel=label)
      if metric != "bits_per_byte":
        axes.axhline(1, color="grey", lw=1)
    self._law(all_axes[0], rows, sizes, styles)
    figures.save(figure, all_axes[0], folder, "experts")

  def _line(self, axes, of_size, rows, metric, style, size):
    values = {}
    for row in of_size:
      if metric in row:
        experts = _place(row, rows)[1]
        values.setdefault(experts, []).append(row[metric])
    found = {e: intervals.of(v) for e, v in sorted(values.items())}
    axes.errorbar(
      list(found),
      [i.mean for i in found.values()],
      [i.half or 0 for i in found.values()],
      fmt=style.marker,
      ls=style.line if metric != "bits_per_byte" else "",
      color=style.color,
      capsize=3,
      # One legend for all panels.
      label=f"width {size}" if metric == "bits_per_byte" else None,
    )

  def _law(self, axes, rows, sizes, styles):
    means, held_out = _means(rows)
    fitted = [p for p in means if p.parameters < held_out]
    if not _enough(fitted):
      return
    found = law.fit(fitted)
    experts = [2 ** (i / 4) for i in range(25)]
    for size in sizes:
      of_size = [r for r in rows if r["arm"].split("-")[0] == size]
      n = _place(of_size[0], rows)[0]
      if n is not None:  # Nats a byte are bits times log 2.
        bits = found.loss(n, experts) / math.log(2)
        style = styles[size]
        axes.plot(experts, bits, color=style.color, ls=style.line, lw=1)


PLAN = Plan(
  columns=(
    Column(
      "active_parameters",
      "active",
      digits=0,
      meaning="parameters that a token meets.",
    ),
    Column("total_parameters", "total", digits=0, meaning="parameters."),
    columns.BITS_PER_BYTE,
    Column(
      speedup.STEPS,
      "steps",
      digits=2,
      meaning="how many times fewer steps it takes to the loss that the dense"
      " model of its width ends with.",
    ),
    Column(
      speedup.TIME,
      "time",
      digits=2,
      meaning="the same in time (times.csv).",
    ),
    columns.MAX_VIO_GLOBAL,
  ),
  claims=(
    *(
      Claim(metric, sweep.name(d, e), sweep.name(d, sweep.DENSE))
      for metric in ("bits_per_byte", speedup.STEPS, speedup.TIME)
      for d in _SIZES
      for e in (8, 64)
    ),
    *(
      Claim("bits_per_byte", sweep.name(d, 64), sweep.name(d, 8))
      for d in _SIZES
    ),
  ),
  plots=(
    Experts(),
    Curve(
      speedup.LOSS,
      label="bits per byte of the validation windows",
      arms=[sweep.name(96, e) for e in (sweep.DENSE, 2, 8, 64)],
    ),
  ),
  derivation=speedup.DERIVATION,
  findings=(law_lines,),
)
