"""The report of upcycling."""

from experiments import columns, figures, intervals, runs
from experiments.report import Claim, Column, Report
from experiments.scaling import speedup
from experiments.upcycling import sweep

LOSS = "validation/bits_per_byte"
# The same model from scratch.
TWINS = dict.fromkeys(sweep.STARTS, "scratch") | {
  "granular": "scratch_granular"
}
_PAIRS = (
  *((arm, TWINS[arm]) for arm in (*sweep.COPIES, "copy_long", "dense_on")),
  ("copy", "dense_on"),
  *((arm, "copy") for arm in (*sweep.COPIES[1:], "copy_long")),
  ("scratch_granular", "scratch"),
)
_ALL = ("copy", "drop", "granular", "dense_on", "copy_long")


def derive(rows: list[dict], curves: list[dict]) -> list[dict]:
  """Rows with what an arm is beside the same model from scratch, of the same seed.

  all_bits: bits per byte where the FLOPs of an arm and of what it started from are
    those of the run from scratch, at the last step of its smoothed curve.
  passed: tokens at which the run from scratch passes the arm for the rest of the run,
    counted from the start of both, over those that the dense model was trained on.
  lead_first, lead_last: bits per byte by which the arm is ahead of the run from scratch
    after a third of its steps, and at the end.
  """
  points = runs.grouped(
    ((p["arm"], p["seed"]), (p["step"], p[LOSS])) for p in curves if LOSS in p
  )
  points = {
    place: speedup.smooth(sorted(some)) for place, some in points.items()
  }
  by_place, derived = {(r["arm"], r["seed"]): r for r in rows}, []
  for (arm, seed), row in by_place.items():
    new, twin = dict(row), (TWINS.get(arm, "scratch"), seed)
    scratch, own = points.get(twin), points.get((arm, seed))
    source = by_place.get((sweep.STARTS.get(arm), seed))
    if arm in sweep.SCRATCH and own:
      new["all_bits"] = own[-1][1]
    if source and scratch and own:
      # Means of three evaluations end before the last one.
      share = scratch[-1][0] / by_place[twin]["steps"]
      left = share * by_place[twin]["train_flops"] - source["train_flops"]
      bits = _at(own, left * row["steps"] / row["train_flops"])
      new |= {} if bits is None else {"all_bits": bits}
      if arm != "dense_on":
        step = passing(scratch, own)
        new |= {} if step is None else {"passed": step / source["steps"]}
        third = row["steps"] / 3
        for name, place in (("first", third), ("last", own[-1][0])):
          new[f"lead_{name}"] = _at(scratch, place) - _at(own, place)
    derived.append(new)
  return derived


def _at(points, step):
  """The loss at a step, on straight lines; None outside of the curve."""
  for (step0, loss0), (step1, loss1) in zip(points, points[1:]):
    if step0 <= step <= step1:
      return loss0 + (loss1 - loss0) * (step - step0) / (step1 - step0)
  return None


def passing(scratch: speedup.Points, other: speedup.Points) -> float | None:
  """The step from which a curve stays below another; None if it does not.

  Both curves have the same steps. On straight lines; the first step if it is below
  all the time.
  """
  gaps = [
    (step, ours - loss) for (step, ours), (_, loss) in zip(scratch, other)
  ]
  if gaps[-1][1] >= 0:
    return None
  after = float(gaps[0][0])
  for (step0, gap0), (step1, gap1) in zip(gaps, gaps[1:]):
    if gap0 >= 0 > gap1:
      after = step0 + (step1 - step0) * gap0 / (gap0 - gap1)
  return after


def crossings(rows: list[dict]) -> list[str]:
  """A line for each upcycled arm: in how many seeds it was passed, and when."""
  lines, seeds = [], runs.grouped((r["arm"], r) for r in rows)
  for arm, own in seeds.items():
    if arm not in sweep.STARTS or arm == "dense_on":
      continue
    passed = [r["passed"] for r in own if "passed" in r]
    line = f"- {TWINS[arm]} passed {arm} in {len(passed)} of {len(own)} seeds"
    if passed:
      share = intervals.words([100 * x for x in passed], 0)
      line += f", after {share} % of the tokens of {sweep.STARTS[arm]}"
    leads = [
      intervals.words([r[f"lead_{place}"] for r in own], 3)
      for place in ("first", "last")
      if all(f"lead_{place}" in r for r in own)
    ]
    if leads:
      line += (
        f"; it was behind by {leads[0]} bits per byte after a third of the"
      )
      line += f" steps, and by {leads[1]} at the end"
    lines.append(f"{line}.")
  return lines


def _curve(name, arms):
  """Arms that have the FLOPs of the model from scratch, or nearly so."""
  return figures.Curve(
    LOSS,
    "validation bits per byte, after the dense model's training",
    arms=lambda _: arms,
    name=name,
  )


REPORT = Report(
  columns=(
    columns.BITS_PER_BYTE,
    Column(
      "all_bits",
      "at equal compute",
      meaning="validation bits per byte where the FLOPs of the arm and of what it"
      " started from are those of the model from scratch (mean of three evaluations).",
      best=min,
    ),
    Column(
      "passed",
      "passed",
      digits=2,
      meaning="tokens after which the model from scratch is better for the rest of"
      " the run, over those of the dense model that the arm started from.",
    ),
    columns.MAX_VIO_GLOBAL,
    columns.TOTAL_PARAMETERS,
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=(
    *(Claim("bits_per_byte", *pair) for pair in _PAIRS),
    *(Claim("all_bits", arm, TWINS[arm]) for arm in _ALL),
    Claim("all_bits", "copy", "dense_on"),
  ),
  derive=derive,
  needs=(LOSS,),
  findings=(crossings,),
  plots=(
    _curve("starts", ("dense_on", "scratch", "copy", "copy_long")),
    _curve("methods", ("scratch", *sweep.COPIES, "scratch_granular")),
  ),
)
