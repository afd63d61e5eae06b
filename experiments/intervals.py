"""Intervals: Student's of a mean over seeds, Wilson's of a share of runs."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95
FEW = 3  # Up to as many values are shown themselves, and no interval.


class Interval(NamedTuple):
  """mean ± half; half is None with a single value. values: all of them."""

  mean: float
  half: float | None
  values: tuple[float, ...]

  @property
  def few(self) -> bool:
    """Whether the values say more than an interval."""
    return len(self.values) <= FEW

  @property
  def ends(self) -> tuple[float, float]:
    """The ends to show: lowest and highest of few values, or the interval's."""
    if self.few:
      return min(self.values), max(self.values)
    return self.mean - self.half, self.mean + self.half

  @property
  def decides(self) -> bool:
    """Whether the interval excludes zero."""
    return self.half is not None and abs(self.mean) > self.half


def of(values: Sequence[float]) -> Interval:
  """The mean and half its 95 % t-interval: t(n - 1) s / sqrt(n)."""
  mean, half, n = statistics.fmean(values), None, len(values)
  if n > 1:
    from scipy import stats  # Slow to import.

    t = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    half = t * statistics.stdev(values) / math.sqrt(n)
  return Interval(mean, half, tuple(values))


def words(values: Sequence[float], digits: int) -> str:
  """A mean with its spread: [lowest, highest] of few values, else ± half.

  Equal values have no spread, and a single one has none either.
  """
  interval = of(values)
  mean = f"{interval.mean:.{digits}f}"
  if interval.few and interval.half:
    return f"{mean} [{', '.join(f'{x:.{digits}f}' for x in interval.ends)}]"
  return f"{mean} ± {interval.half:.{digits}f}" if interval.half else mean


def paired(ones: dict[int, float], others: dict[int, float]) -> Interval | None:
  """The interval of `one - other` over common seeds; None if there are none."""
  seeds = sorted(ones.keys() & others.keys())
  return of([ones[s] - others[s] for s in seeds]) if seeds else None


def wilson(count: int, total: int) -> tuple[float, float]:
  """The ends of the 95 % interval of a share (Wilson, 1927)."""
  from scipy import stats

  ends = stats.binomtest(count, total).proportion_ci(LEVEL, method="wilson")
  return float(ends.low), float(ends.high)
