"""How much sooner a model with experts reaches the dense model's last loss.

Switch (2101.03961, figures 1 and 4): steps, and time, that the dense model of
the same active FLOPs takes over those that the arm takes, to the loss that the
dense model ends with.
"""

from experiments import report
from experiments.scaling import sweep

LOSS = "validation/bits_per_byte"
STEPS, TIME = "step_speedup", "time_speedup"


def derive(rows: list[dict], curves: list[dict]) -> list[dict]:
  """Rows with both speed-ups, by the curve of the same size and seed.

  A row has none if its run never reached that loss, or there is no dense one;
  no speed-up in time without the seconds of a step (times.csv).
  """
  points, found = _points(curves), []
  dense = {(r["arm"], r["seed"]): r for r in rows}
  for row in rows:
    size = row["arm"].split("-")[0]
    key = (sweep.name(size, sweep.DENSE), row["seed"])
    new = dict(row)
    of_dense, of_row = points.get(key), points.get((row["arm"], row["seed"]))
    if of_dense and of_row:
      target = of_dense[-1][1]
      step = reached(of_row, target)
      if step is not None:
        new[STEPS] = reached(of_dense, target) / step
        seconds = [_seconds(r) for r in (dense.get(key, {}), row)]
        if None not in seconds:
          new[TIME] = new[STEPS] * seconds[0] / seconds[1]
    found.append(new)
  return found


def reached(points: list[tuple[int, float]], target: float) -> float | None:
  """The first step with that loss, on straight lines; None: it never has it.

  Args:
    points: (step, loss), ascending.
    target: a loss.
  """
  before = None
  for step, loss in points:
    if loss <= target:
      if before is None:
        return float(step)
      step0, loss0 = before
      return step0 + (step - step0) * (loss0 - target) / (loss0 - loss)
    before = step, loss
  return None


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
