"""The report of switch."""

import statistics

from experiments import columns, figures, intervals, runs
from experiments.report import Claim, Column, Report
from experiments.scaling import speedup
from experiments.switch import sweep

MARGIN = 0.5  # Nats above the lowest loss before at which a run is not stable.
WARM_UP = 50
LOSS = "validation/loss"
_BASE = "switch_1.25"
# Each kind of model at the paper's capacity; the other figure has all capacities.
_MODELS = ("t5", "t5_wide", _BASE, "top2_1.25")
_PAIRS = (
  *((arm, "t5") for arm in sweep.HEADLINE[1:]),
  *((f"switch_{c}", f"top2_{c}") for c in sweep.CAPACITIES),
  *((f"{k}_2.0", f"{k}_1.0") for k in ("switch", "top2")),
  *((arm, _BASE) for arm in sweep.ONE_CHANGE),
  ("selective", "bfloat16"),
  *((arm, "short_t5") for arm in sweep.SHORT[1:]),
  *((arm, "fast") for arm in sweep.STABILITY[1:]),
)


def derive(rows: list[dict], curves: list[dict]) -> list[dict]:
  """Rows with "failed" and the speed-ups over `t5`, see `speedup`.

  A run has failed if it diverged, or if a training line after the warm-up has a loss
  `MARGIN` above the lowest one before it. Failed runs have no speed-up.
  """
  lines, points = (
    runs.grouped(
      ((p["arm"], p["seed"]), (p["step"], p[loss])) for p in curves if loss in p
    )
    for loss in ("loss", LOSS)
  )
  by_place, derived = {(r["arm"], r["seed"]): r for r in rows}, []
  for (arm, seed), row in by_place.items():
    new = row | {"failed": _failed(row, sorted(lines.get((arm, seed), ())))}
    ends = points.get(("t5", seed)), points.get((arm, seed))
    if arm in sweep.HEADLINE and all(ends) and not new["failed"]:
      new["step_speedup"] = speedup.speedup(*map(sorted, ends))
      timed = [by_place["t5", seed], row]
      if all("train_seconds" in r for r in timed):
        dense, own = (r["train_seconds"] / r["steps"] for r in timed)
        new["time_speedup"] = new["step_speedup"] * dense / own
    derived.append(new)
  return derived


def _failed(row, points):
  lowest = float("inf")
  for step, loss in points:
    if step > WARM_UP and loss > lowest + MARGIN:
      return 1.0
    lowest = min(lowest, loss)
  return float(runs.DIVERGED in row)


def stability(rows: list[dict]) -> list[str]:
  """A line for each arm with its count of runs that did not fail."""
  counts = runs.grouped((r["arm"], r["failed"]) for r in rows)
  lines = []
  for arm, failed in counts.items():
    if arm not in sweep.STABILITY:
      continue
    number, stable = len(failed), round(len(failed) - sum(failed))
    low, high = intervals.wilson(stable, number)
    lines.append(
      f"- Stable runs of {arm}: {stable} of {number} (95 % Wilson interval of the"
      f" share: {low:.2f} to {high:.2f})."
    )
  return lines


def medians(rows: list[dict]) -> list[str]:
  """A line for each pair of arms: a seed that stalls moves means, and no median."""
  values = {(r["arm"], r["seed"]): r["neg_log_perplexity"] for r in rows}
  lines = []
  for arm, baseline in _PAIRS:
    differences = [
      value - values[baseline, seed]
      for (name, seed), value in values.items()
      if name == arm and (baseline, seed) in values
    ]
    if differences and arm not in sweep.STABILITY:
      higher = sum(x > 0 for x in differences)
      lines.append(
        f"- NLP, {arm} minus {baseline}: median"
        f" {statistics.median(differences):+.3f}, higher in {higher} of"
        f" {len(differences)} pairs."
      )
  return lines


REPORT = Report(
  columns=(
    Column(
      "neg_log_perplexity",
      "NLP",
      meaning="negative log-perplexity of validation targets, nats per token (higher"
      " is better).",
      best=max,
    ),
    Column(
      "failed",
      "failed",
      digits=2,
      meaning="share of the runs that diverged, or whose training loss rose after the"
      " warm-up to 0.5 nats above the lowest before.",
    ),
    Column(
      "step_speedup",
      "steps",
      digits=2,
      meaning="steps of t5 to a loss over those of the arm: the loss that the worse of"
      " the two ends with.",
    ),
    Column(
      "time_speedup",
      "time",
      digits=2,
      meaning="the same in time, by the seconds of a step in times.csv.",
      optional=True,
    ),
    columns.DROPPED,
    columns.NO_SLOT,
    columns.MAX_VIO_GLOBAL,
    columns.TOTAL_PARAMETERS,
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=tuple(Claim("neg_log_perplexity", *pair) for pair in _PAIRS),
  derive=derive,
  needs=("loss", LOSS),
  findings=(medians, stability),
  plots=(
    figures.Curve(
      "loss", "training loss, nats per target", arms=lambda _: _MODELS
    ),
    figures.Curve(
      LOSS,
      "validation loss minus that of t5, nats per target",
      arms=lambda _: sweep.HEADLINE[2:],
      minus="t5",
      name="loss_minus_t5",
    ),
  ),
)
