"""Speed-up of an arm over the dense model, to the same loss.

Switch (2101.03961, figures 1 and 4): the steps, or the time, that the dense model
of the same active FLOPs takes to a loss, over those that the arm takes. The
loss is what the worse of the two ends with. For a better arm that is the dense
model's, as in Switch. As both reach it, no run is left out for being slow, which
would make the others' mean too large.
"""

import statistics

from experiments import runs
from experiments.scaling import sweep

LOSS = "validation/bits_per_byte"
STEPS, TIME = "step_speedup", "time_speedup"
Points = list[tuple[int, float]]  # (step, loss), ascending.


def derive(rows: list[dict], curves: list[dict]) -> list[dict]:
  """Rows with both speed-ups, by the curves of the same size and seed.

  A row has none without a curve, or without one of the dense model; and none in
  time without the seconds of a step (times.csv).
  """
  points = runs.grouped(
    ((p["arm"], p["seed"]), (p["step"], p[LOSS])) for p in curves if LOSS in p
  )
  by_place, derived = {(row["arm"], row["seed"]): row for row in rows}, []
  for place, row in by_place.items():
    size = row["arm"].split("-")[0]
    dense, new = (sweep.name(size, sweep.DENSE), row["seed"]), dict(row)
    if dense in points and place in points:
      new[STEPS] = speedup(sorted(points[dense]), sorted(points[place]))
      timed = [by_place.get(dense, {}), row]
      if all("train_seconds" in r for r in timed):
        seconds = [r["train_seconds"] / r["steps"] for r in timed]
        new[TIME] = new[STEPS] * seconds[0] / seconds[1]
    derived.append(new)
  return derived


def speedup(dense: Points, others: Points) -> float:
  """The dense model's steps to the worse of both last losses, over the other's.

  Both curves are read after `smooth`.
  """
  dense, others = smooth(dense), smooth(others)
  target = max(dense[-1][1], others[-1][1])
  return reached(dense, target) / reached(others, target)


def smooth(points: Points) -> Points:
  """Means of three neighbours, because a single evaluation is noisy."""
  if len(points) < 3:
    return points
  windows = zip(points, points[1:], points[2:])
  return [(w[1][0], statistics.fmean(y for _, y in w)) for w in windows]


def reached(points: Points, target: float) -> float:
  """The first step with a loss, on straight lines; it is not below the last."""
  before = None
  for step, loss in points:
    if loss <= target:
      if before is None:
        return float(step)
      step0, loss0 = before
      return step0 + (step - step0) * (loss0 - target) / (loss0 - loss)
    before = step, loss
  raise ValueError(f"a loss of {target} is not reached")
