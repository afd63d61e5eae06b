"""How sure a mean over seeds is: Student's t-interval."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
  """mean ± half; half is None with a single value. count: values."""

  mean: float
  half: float | None
  count: int

  @property
  def decides(self) -> bool:
    """Whether it leaves zero out."""
    return self.half is not None and abs(self.mean) > self.half


def of(values: Sequence[float]) -> Interval:
  """The mean and half its 95 % t-interval: t(n - 1) s / sqrt(n)."""
  mean, n = statistics.fmean(values), len(values)
  if n == 1:
    return Interval(mean, None, 1)
  from scipy import stats  # Slow to import.

  t = stats.t.ppf((1 + LEVEL) / 2, n - 1)
  return Interval(mean, t * statistics.stdev(values) / math.sqrt(n), n)


def paired(ones: dict[int, float], others: dict[int, float]) -> Interval | None:
  """Of one - other over the seeds that both have; None without any."""
  seeds = sorted(ones.keys() & others.keys())
  return of([ones[s] - others[s] for s in seeds]) if seeds else None
