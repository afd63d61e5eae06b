"""The report of scaling."""

import itertools
import statistics
from typing import NamedTuple

from experiments import columns, figures, intervals, runs
from experiments.report import Claim, Column, Report
from experiments.scaling import law, speedup, sweep

_BITS = "bits_per_byte"


class _Fit(NamedTuple):
  """The law fitted to all sizes but the largest, and without interaction.

  seen, unseen: points of the smaller sizes, and of the largest one.
  law, plain: fitted with interaction, and with c = 0.
  """

  seen: list[law.Point]
  unseen: list[law.Point]
  law: law.Law
  plain: law.Law

  def gain(self, over_dense: bool) -> float:
    """The error on the largest size with interaction minus that without."""
    errors = (law.error(f, self.unseen, over_dense) for f in self[2:])
    return next(errors) - next(errors)


def _fit(rows) -> _Fit | None:
  """The fit to the means of all arms over seeds.

  None without nine arms, of two sizes and three numbers of experts at least.
  """
  losses = runs.grouped((_place(row, rows), row["loss"]) for row in rows)
  points = [
    law.Point(*place, statistics.fmean(of_place))
    for place, of_place in losses.items()
    if None not in place
  ]
  largest = max((p.parameters for p in points), default=0)
  seen = [p for p in points if p.parameters < largest]
  sizes = {p.parameters for p in seen}
  if len(seen) < 9 or len(sizes) < 2 or len({p.experts for p in seen}) < 3:
    return None
  unseen = [p for p in points if p.parameters == largest]
  return _Fit(seen, unseen, law.fit(seen), law.fit(seen, interaction=False))


def law_lines(rows: list[dict]) -> list[str]:
  """The law fitted to all sizes but the largest, and how well it tells that.

  Only seeds count that every arm has, as a seed is the same tokens for all of
  them. [] without enough arms.
  """
  rows = _in_common(rows)
  fit = _fit(rows)
  if fit is None:
    return []
  seeds = sorted({row["seed"] for row in rows})
  by_seed = [_fit([r for r in rows if r["seed"] == seed]) for seed in seeds]
  most = max(p.experts for p in fit.seen)
  changes = [of_seed.law.interaction(most) for of_seed in by_seed]
  fitted = fit.law
  lines = [
    f"The law of routed language models, fitted to the means of {len(fit.seen)}"
    f" arms, all but those of the largest size, over {len(seeds)} seeds; and to"
    " every seed alone:",
    f"- {fitted.words(4)}; root mean squared error of log10 L"
    f" {law.error(fitted, fit.seen):.5f}. In the paper, for S-BASE:"
    f" {law.S_BASE.words(3)}.",
    f"- What {most} experts change in a, c (log E^({most}) - log E^(1)), of every"
    f" seed alone: {_verdict(changes)}. In the paper"
    f" {law.S_BASE.interaction(most):+.5f}.",
    *(_error_line(fit, by_seed, over_dense) for over_dense in (False, True)),
  ]
  if fitted.most > 10 * most:
    lines.append("- E_max is far above all E here: it is not determined.")
  return lines


def _error_line(fit, by_seed, over_dense):
  size = fit.unseen[0].parameters
  what = f"the largest size, {size} parameters, which it has not seen"
  if over_dense:
    what = "the same, of log10 of L over that of the dense model"
  with_it, without = (law.error(f, fit.unseen, over_dense) for f in fit[2:])
  return (
    f"- Error on {what}: {with_it:.5f}; without interaction (c = 0)"
    f" {without:.5f}. The first minus the second, of every seed alone:"
    f" {_verdict([of_seed.gain(over_dense) for of_seed in by_seed])}."
  )


def switch_lines(rows: list[dict]) -> list[str]:
  """The speed-up that Switch reports, to be read beside ours."""
  line = (
    "Switch (2101.03961): 64 experts reach the loss of T5-Base in 7.5 times"
    " fewer steps."
  )
  return [line] if any(speedup.STEPS in row for row in rows) else []


def _verdict(values):
  """Their mean and interval, and whether it excludes zero."""
  interval = intervals.of(values)
  if interval.half is None:
    return f"{interval.mean:+.5f}; a single seed gives no interval"
  number = f"{interval.mean:+.5f} ± {interval.half:.5f}"
  if interval.decides:
    return f"{number}, significant (95 % interval excludes 0)"
  return f"{number}, not significant (95 % interval includes 0)"


def _in_common(rows):
  """The rows that have a loss, of the seeds that all arms have."""
  rows = [row for row in rows if "loss" in row]
  seeds = runs.grouped((row["arm"], row["seed"]) for row in rows).values()
  common = set.intersection(*map(set, seeds)) if seeds else set()
  return [row for row in rows if row["seed"] in common]


def _size(row):
  return int(row["arm"].split("-")[0])


def _place(row, rows):
  """(N: parameters of the dense model of that size, E)."""
  experts = row["arm"].split("-")[1]
  dense = sweep.name(_size(row), sweep.DENSE)
  parameters = (r["total_parameters"] for r in rows if r["arm"] == dense)
  return next(parameters, None), 1 if experts == sweep.DENSE else int(experts)


class Experts:
  """Loss and speed-ups against the number of experts, a line for each size."""

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes experts.png and experts.pdf; the law as thin lines."""
    del points
    panels = {
      _BITS: "validation bits per byte",
      speedup.STEPS: "speed-up in steps to the dense model's loss",
      speedup.TIME: "speed-up in time",
    }
    panels = {k: v for k, v in panels.items() if any(k in r for r in rows)}
    figure, all_axes = figures.panels(len(panels))
    fit = _fit(_in_common(rows))
    for axes, (metric, label) in zip(all_axes, panels.items()):
      for size, style in figures.styles(map(_size, rows)).items():
        of_size = [r for r in rows if _size(r) == size and metric in r]
        # The first panel's legend serves all panels.
        name = f"width {size}" if metric == _BITS else None
        means = _mark(axes, of_size, rows, metric, style, name)
        if metric != _BITS:
          axes.plot(*zip(*means), color=style.color, ls=style.line, lw=1.5)
        elif fit and None not in _place(of_size[0], rows):
          law_of_size = _law(_in_common(of_size), rows, fit.law)
          axes.plot(*law_of_size, color=style.color, ls=style.line, lw=1)
      axes.set_xscale("log", base=2)
      axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
      axes.set(xlabel="experts (1: dense)", ylabel=label)
      if metric != _BITS:
        axes.axhline(1, color="grey", lw=1)
    figures.save(figure, all_axes[0], folder, "experts")


def _mark(axes, of_size, rows, metric, style, label):
  """Draws the arms of a size; returns their (experts, mean)."""
  values = runs.grouped((_place(r, rows)[1], r[metric]) for r in of_size)
  for experts, of_arm in sorted(values.items()):
    figures.mark(axes, style, [experts] * len(of_arm), of_arm, label)
    label = None
  return [(e, statistics.fmean(v)) for e, v in sorted(values.items())]


def _law(of_size, rows, law_of_all):
  """(numbers of experts, bits per byte by the law) of a size."""
  bits = statistics.fmean(r[_BITS] / r["loss"] for r in of_size)
  experts = [2 ** (i / 4) for i in range(25)]
  return experts, bits * law_of_all.loss(_place(of_size[0], rows)[0], experts)


def _largest(rows):
  """Every second arm of the largest size: the curves of all lie on each other."""
  most = max(map(_size, rows))
  arms = dict.fromkeys(row["arm"] for row in rows if _size(row) == most)
  return [*arms][::2]


TRAINING = figures.Curve(
  speedup.LOSS, label="validation bits per byte", arms=_largest
)


# Few experts, 64 and the most of each size over dense, of demo, cpu and pod.
_CLAIMS = (
  ((16, 32, 64), (16,)),
  ((16, 32, 48, 64), (8, 64)),
  ((512, 768, 1024), (8, 64, 128)),
)


def _claims():
  for sizes, experts in _CLAIMS:
    for metric in (_BITS, speedup.STEPS, speedup.TIME):
      for size, e in itertools.product(sizes, experts):
        yield Claim(metric, f"{size}-{e}", f"{size}-dense")
    if 64 in experts:
      yield from (Claim(_BITS, f"{s}-64", f"{s}-8") for s in sizes)


REPORT = Report(
  columns=(
    Column(
      "active_parameters",
      "active",
      digits=0,
      meaning="parameters that a token uses.",
    ),
    Column("total_parameters", "total", digits=0, meaning="all parameters."),
    columns.BITS_PER_BYTE,
    Column(
      speedup.STEPS,
      "speed-up, steps",
      digits=2,
      meaning="steps of the dense model ÷ steps of the MoE to reach the higher of"
      " their two final losses.",
      optional=True,
    ),
    Column(
      speedup.TIME,
      "speed-up, time",
      digits=2,
      meaning="the same in time (times.csv).",
      optional=True,
    ),
    columns.MAX_VIO_GLOBAL,
  ),
  claims=tuple(_claims()),
  plots=(Experts(), TRAINING),
  derive=speedup.derive,
  needs=(speedup.LOSS,),
  findings=(switch_lines, law_lines),
)
