"""How much sooner than the dense model an arm reaches a loss.

Switch (2101.03961, figures 1 and 4): the steps, or the time, that the dense model
of the same active FLOPs takes to a loss, over those that the arm takes. The
loss is what the worse of the two ends with. For a better arm that is the dense
model's, as in Switch. As both reach it, no run is left out for being slow, which
would make the others' mean too large.
"""

import statistics

from experiments import report
from experiments.scaling import sweep

LOSS = "validation/bits_per_byte"
STEPS, TIME = "step_speedup", "time_speedup"


def derive(rows: list[dict], curves: list[dict]) -> list[dict]:
  """Rows with both speed-ups, by the curves of the same size and seed.

  A row has none without a curve, or without one of the dense model; and none in
  time without the seconds of a step (times.csv).
  """
  points, found = _points(curves), []
  dense = {(r["arm"], r["seed"]): r for r in rows}
  for row in rows:
    size = row["arm"].split("-")[0]
    key = (sweep.name(size, sweep.DENSE), row["seed"])
    new = dict(row)
    of_dense, of_row = points.get(key), points.get((row["arm"], row["seed"]))
    if of_dense and of_row:
      new[STEPS] = speedup(of_dense, of_row)
      seconds = [_seconds(r) for r in (dense.get(key, {}), row)]
      if None not in seconds:
        new[TIME] = new[STEPS] * seconds[0] / seconds[1]
    found.append(new)
  return found


def speedup(
  ones: list[tuple[int, float]], others: list[tuple[int, float]]
) -> float:
  """One's steps to the worse of both last losses, over the other's.

  Args:
    ones, others: (step, loss), ascending; read after `smooth`.
  """
  ones, others = smooth(ones), smooth(others)
  target = max(ones[-1][1], others[-1][1])
  return reached(ones, target) / reached(others, target)


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
  """Means of three neighbours, as one reading says little of a curve's end."""
  if len(points) < 3:
    return points
  windows = zip(points, points[1:], points[2:])
  return [(w[1][0], statistics.fmean(y for _, y in w)) for w in windows]


def reached(points: list[tuple[int, float]], target: float) -> float:
  """The first step with that loss, on straight lines.

  Args:
    points: (step, loss), ascending.
    target: a loss that is not below the last one.
  """
  before = None
  for step, loss in points:
    if loss <= target:
      if before is None:
        return float(step)
      step0, loss0 = before
      return step0 + (step - step0) * (loss0 - target) / (loss0 - loss)
    before = step, loss
  raise ValueError(f"a loss of {target} is not reached")


def _points(curves):
  """{(arm, seed): [(step, loss)]}."""
  points = {}
  for point in curves:
    if LOSS in point:
      key = point["arm"], point["seed"]
      points.setdefault(key, []).append((point["step"], point[LOSS]))
  return {key: sorted(found) for key, found in points.items()}


def _seconds(row):
  """Of a step."""
  if "train_seconds" not in row:
    return None
  return row["train_seconds"] / row["steps"]


DERIVATION = report.Derivation(derive, (LOSS,), (STEPS, TIME))
