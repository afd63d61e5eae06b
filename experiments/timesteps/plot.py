"""The report of timesteps."""

import statistics
from collections.abc import Collection
from typing import NamedTuple

from experiments import columns, figures, runs
from experiments.report import Claim, Column, Report
from experiments.timesteps import sweep

_FULL = f"full_{sweep.FULL}"
_ADDED = ("steps", "total_parameters", "train_flops", "train_seconds")
_PAIRS = (
  *((name, "one") for name in sweep.PAIRS if name != _FULL),
  *((_FULL, "one"), (_FULL, "one_long"), ("one_long", "one")),
  *(("moe", "one"), ("by_time_2", "one"), ("by_time_8", "one")),
  ("by_time_8", "moe"),
)


def derive(rows: list[dict], curves: list[dict]) -> list[dict]:
  """The rows, with those of two networks in place of their runs.

  The loss of each range of timesteps is that of the network that it is of, and the
  loss of all is the mean over ranges, which have as many videos each. Parameters,
  steps and FLOPs are those of both runs.
  """
  del curves
  by_place = {(r["arm"], r["seed"]): r for r in rows}
  parts = {arm for arms in sweep.PAIRS.values() for arm in arms}
  made = [dict(r) for r in rows if r["arm"] not in parts]
  for name, arms in sweep.PAIRS.items():
    for seed in sorted({r["seed"] for r in rows}):
      found = [by_place.get((arm, seed)) for arm in arms]
      if all(found):
        made.append(_together(name, *found))
  for row in made:
    losses = _losses(row)
    if losses and runs.DIVERGED not in row:
      row["loss"] = statistics.fmean(losses.values())
      row["loss_high"], row["loss_low"] = (
        statistics.fmean(x for at, x in losses.items() if (at >= 0.5) == high)
        for high in (True, False)
      )
  return made


def _together(name, high, low):
  added = {k: high[k] + low[k] for k in _ADDED if k in high and k in low}
  both = high | low | added | {"arm": name, "runs": 2}
  if runs.DIVERGED in both:  # It has no loss, though one of the two may have.
    both = {k: v for k, v in both.items() if not k.startswith("loss")}
  return both


def _losses(row):
  """{where a range of timesteps begins: its loss}."""
  return {
    float(k.partition("/")[2].split("-")[0]): v
    for k, v in row.items()
    if k.startswith("loss/")
  }


class Ranges(NamedTuple):
  """The loss of each range of timesteps over that of `one`, in percent.

  name: of the files.
  arms: that it shows.
  """

  name: str
  arms: Collection[str]

  def draw(self, rows: list[dict], points: list[dict], folder) -> None:
    """Writes <name>.png and <name>.pdf.

    Args:
      rows: of the report.
      points: not used.
      folder: to write to.
    """
    del points
    by_place = {(r["arm"], r["seed"]): _losses(r) for r in rows}
    arms = [r["arm"] for r in rows if r["arm"] in self.arms]
    figure, (axes,) = figures.panels(1)
    for arm, style in figures.styles(arms).items():
      pairs = [
        (own, by_place["one", seed])
        for (name, seed), own in by_place.items()
        if name == arm and own and by_place.get(("one", seed))
      ]
      if not pairs:
        continue
      found = {
        at: [100 * (own[at] / one[at] - 1) for own, one in pairs]
        for at in sorted(pairs[0][1])
      }
      middle = [at + 0.5 / len(found) for at in found]
      means = [statistics.fmean(values) for values in found.values()]
      axes.plot(
        *(middle, means),
        label=arm,
        color=style.color,
        ls=style.line,
        marker=style.marker,
        ms=4,
      )
    axes.axhline(0, color="black", lw=0.5)
    axes.set(
      xlabel="timestep, from data (0) to noise (1)",
      ylabel="loss above that of one, percent",
    )
    figures.save(figure, axes, folder, self.name)


REPORT = Report(
  columns=(
    Column(
      "loss",
      digits=4,
      meaning="mean square of the predicted minus the true velocity, mean over all"
      " timesteps (lower is better).",
      best=min,
    ),
    Column(
      "loss_high",
      "t ≥ 0.5",
      digits=4,
      meaning="the same of the timesteps of more noise.",
      best=min,
    ),
    Column("loss_low", "t < 0.5", digits=4, meaning="of less.", best=min),
    columns.MAX_VIO_GLOBAL,
    columns.TOTAL_PARAMETERS,
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=tuple(Claim("loss", *pair) for pair in _PAIRS),
  derive=derive,
  plots=(
    Ranges("ranges", (*sweep.PAIRS, "one_long")),
    Ranges("ranges_of_layers", ("moe", "by_time_2", "by_time_8")),
  ),
)
