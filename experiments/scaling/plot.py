"""What the report of scaling shows."""

import statistics

from experiments import columns, figures, intervals
from experiments.figures import Curve
from experiments.report import Claim, Column, Plan
from experiments.scaling import law, speedup, sweep


def law_lines(rows: list[dict]) -> list[str]:
  """The law fitted to all sizes but the largest, and how well it tells that.

  Of the seeds that every arm has, as a seed is the same tokens for all of them.
  [] without nine arms, of two sizes and three numbers of experts at least.
  """
  rows = _in_common(rows)
  points, held_out = _means(rows)
  fitted, largest = _split(points, held_out)
  if not largest or not _enough(fitted):
    return []
  found, plain = law.fit(fitted), law.fit(fitted, interaction=False)
  most = max(p.experts for p in fitted)
  changes, gains = [], {False: [], True: []}
  for seed in sorted({row["seed"] for row in rows}):
    of_seed = [row for row in rows if row["seed"] == seed]
    seen, unseen = _split(_means(of_seed)[0], held_out)
    one, other = law.fit(seen), law.fit(seen, interaction=False)
    changes.append(one.interaction(most))
    for over_dense, of_seeds in gains.items():
      of_seeds.append(
        law.error(one, unseen, over_dense)
        - law.error(other, unseen, over_dense)
      )
  lines = [
    f"The law of routed language models, fitted to the means of {len(fitted)}"
    f" arms, all but those of the largest size, over {len(changes)} seeds; and to"
    " every seed alone:",
    f"- a = {found.a:+.4f}, b = {found.b:+.4f}, c = {found.c:+.4f}, d ="
    f" {found.d:+.4f}, E_start = {found.start:.2f}, E_max = {found.most:.0f};"
    f" root mean squared error of log10 L {law.error(found, fitted):.5f}."
    f" {_PAPER}",
    f"- What {most} experts change in a, c (log E^({most}) - log E^(1)), of every"
    f" seed alone: {_verdict(changes)}. In the paper"
    f" {law.S_BASE.interaction(most):+.5f}.",
  ]
  for over_dense, what in (
    (False, f"the largest size, {held_out} parameters, which it has not seen"),
    (True, "the same, of log10 of L over that of the dense model"),
  ):
    lines.append(
      f"- Error on {what}: {law.error(found, largest, over_dense):.5f}; without"
      f" interaction (c = 0) {law.error(plain, largest, over_dense):.5f}. The"
      f" first minus the second, of every seed alone:"
      f" {_verdict(gains[over_dense])}."
    )
  if found.most > 10 * max(p.experts for p in fitted):
    lines.append("- E_max is far above all E here: it is not determined.")
  return lines


_PAPER = (
  f"In the paper, for S-BASE: a = {law.S_BASE.a:+.3f}, b = {law.S_BASE.b:+.3f},"
  f" c = {law.S_BASE.c:+.3f}, d = {law.S_BASE.d:+.3f}, E_start ="
  f" {law.S_BASE.start:.2f}, E_max = {law.S_BASE.most:.0f}."
)


def switch_lines(rows: list[dict]) -> list[str]:
  """What Switch found, to be read beside ours."""
  if not any(speedup.STEPS in row for row in rows):
    return []
  return [
    "Switch (2101.03961): 64 experts reach the loss of T5-Base in 7.5 times"
    " fewer steps."
  ]


def _verdict(values):
  """Their mean and interval, and whether zero is out of it."""
  interval = intervals.of(values)
  if interval.half is None:
    return f"{interval.mean:+.5f}; one seed decides nothing"
  word = "decided" if interval.decides else "not decided, zero is in it"
  return f"{interval.mean:+.5f} ± {interval.half:.5f}, {word}"


def _enough(points):
  sizes = {p.parameters for p in points}
  experts = {p.experts for p in points}
  return len(points) > 8 and len(sizes) > 1 and len(experts) > 2


def _in_common(rows):
  """Those that have a loss, of the seeds that all arms have."""
  rows = [row for row in rows if "loss" in row]
  seeds = {}
  for row in rows:
    seeds.setdefault(row["arm"], set()).add(row["seed"])
  common = set.intersection(*seeds.values()) if seeds else set()
  return [row for row in rows if row["seed"] in common]


def _means(rows):
  """A point for each arm, of the mean loss; and the largest N."""
  points = {}
  for row in rows:
    points.setdefault(_place(row, rows), []).append(row["loss"])
  means = [
    law.Point(n, e, statistics.fmean(losses))
    for (n, e), losses in points.items()
    if n is not None
  ]
  return means, max((p.parameters for p in means), default=0)


def _split(points, held_out):
  """Those of smaller sizes, and those of that size."""
  smaller = [p for p in points if p.parameters < held_out]
  return smaller, [p for p in points if p.parameters == held_out]


def _size(row):
  return int(row["arm"].split("-")[0])


def _place(row, rows):
  """(N: parameters of the dense model of that size, E)."""
  experts = row["arm"].split("-")[1]
  dense = sweep.name(_size(row), sweep.DENSE)
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
    sizes = list(dict.fromkeys(map(_size, rows)))
    styles = figures.styles([{"arm": size} for size in sizes])
    for axes, (metric, label) in zip(all_axes, panels.items()):
      for size in sizes:
        of_size = [r for r in rows if _size(r) == size]
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
    rows = _in_common(rows)
    fitted, _ = _split(*_means(rows))
    if not _enough(fitted):
      return
    found = law.fit(fitted)
    experts = [2 ** (i / 4) for i in range(25)]
    for size in sizes:
      of_size = [r for r in rows if _size(r) == size]
      n = _place(of_size[0], rows)[0] if of_size else None
      if n is not None:
        bits = statistics.fmean(r["bits_per_byte"] / r["loss"] for r in of_size)
        style = styles[size]
        axes.plot(
          experts,
          bits * found.loss(n, experts),
          color=style.color,
          ls=style.line,
          lw=1,
        )


class Training:
  """The arms of the largest size over training."""

  curve = Curve(speedup.LOSS, label="bits per byte of the validation windows")

  def needs(self) -> set[str]:
    """Metrics of the curves that it draws."""
    return self.curve.needs()

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes validation_bits_per_byte.png and .pdf."""
    most = max(map(_size, rows))
    arms = [row["arm"] for row in rows if _size(row) == most]
    self.curve._replace(arms=arms).draw(rows, points, folder)


def _claims():
  """Few experts, 64 and the most of each size over dense, at any scale."""
  found = []
  for scale in sweep.SCALES.values():
    experts = {}
    for arm in scale().arms:
      size, count = arm.split("-")
      if count != sweep.DENSE:
        experts.setdefault(size, []).append(int(count))
    for metric in ("bits_per_byte", speedup.STEPS, speedup.TIME):
      for size, counts in experts.items():
        dense = sweep.name(size, sweep.DENSE)
        for e in sorted({8, 64, max(counts)} & set(counts)):
          found.append(Claim(metric, sweep.name(size, e), dense))
    for size, counts in experts.items():
      if {8, 64} <= set(counts):
        few, many = sweep.name(size, 8), sweep.name(size, 64)
        found.append(Claim("bits_per_byte", many, few))
  return tuple(dict.fromkeys(found))


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
      "speed-up, steps",
      digits=2,
      meaning="steps of the dense model of its width over its own, to the loss"
      " that the worse of the two ends with.",
    ),
    Column(
      speedup.TIME,
      "speed-up, time",
      digits=2,
      meaning="the same in time (times.csv).",
    ),
    columns.MAX_VIO_GLOBAL,
  ),
  claims=_claims(),
  plots=(Experts(), Training()),
  derivation=speedup.DERIVATION,
  findings=(switch_lines, law_lines),
)
