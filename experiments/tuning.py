"""Choices made arm by arm, on seeds that are not reported, by one rule.

A stage tries a few values of one config key for every arm and keeps one of
them; a later stage builds on the choices of the ones before.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from moe_jax.core.errors import ConfigError

SEED = 1000  # The first of them; no report has a seed like it.


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of tuning: it chooses a config value for each arm.

  key: dotted config key; or {arm: key}, for these arms alone.
  values: what is tried, at least two, the same for all arms; or {arm: values}.
  metric: of results.csv, that decides; its mean over the seeds.
  target: None: the value with the lowest metric. A number: the largest value at
    which the metric would be that, on straight lines between what was tried,
    both axes logarithmic; the nearest one tried where it lies outside of them.
  seeds: how many, from `SEED` on.
  like: {arm: the arm whose choice it takes}, for arms that try nothing.
  """

  key: str | Mapping[str, str]
  values: tuple[float, ...] | Mapping[str, tuple[float, ...]]
  metric: str = "bits_per_byte"
  target: float | None = None
  seeds: int = 1
  like: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def source(self, arm: str) -> str:
    """The arm whose choice it takes."""
    return self.like.get(arm, arm)

  def tried(self, arm: str) -> dict[float, dict[str, float]]:
    """{value: the overrides that set it}; {} for an arm that tries nothing."""
    if arm in self.like:
      return {}
    key, values = (
      x.get(arm) if isinstance(x, Mapping) else x
      for x in (self.key, self.values)
    )
    return {value: {key: value} for value in values} if key else {}

  def choose(self, arm: str, means: Mapping[float, float]) -> dict[str, float]:
    """The overrides for an arm.

    Args:
      arm: name.
      means: {value: metric} of everything in `tried`. One that is not finite
        is no candidate.

    Raises:
      ConfigError: none is finite.
    """
    tried = self.tried(arm)
    means = {v: m for v, m in means.items() if math.isfinite(m)}
    if not means:
      raise ConfigError(
        f"all runs of the arm {arm} diverged, with"
        f" {', '.join(f'{k}={v:g}' for o in tried.values() for k, v in o.items())};"
        " try smaller values"
      )
    if self.target is None:
      return tried[min(means, key=means.get)]
    (key,) = next(iter(tried.values()))
    return {key: _where(means, self.target)}


def describe(stages: Iterable[Stage], arm: str, chosen: Mapping | None) -> str:
  """An arm's choices in words, and whether each reached its target.

  A choice at an end of what was tried may not be the best one. An arm without
  choices is not tuned yet.
  """
  if chosen is None:
    return "not tuned yet"
  words = []
  for stage in stages:
    source = stage.source(arm)
    for key in {k for o in stage.tried(source).values() for k in o}:
      value, tried = chosen[key], sorted(stage.tried(source))
      among = ", ".join(f"{v:g}" for v in tried)
      among += f", for {source}" * (source != arm)
      doubt = ""
      if stage.target is not None and value in tried:
        doubt = f"; {stage.metric} was never {stage.target:g} between them"
      elif stage.target is None and value in (tried[0], tried[-1]):
        doubt = "; at an end"
      words.append(f"{key} = {value:.3g} (of {among}{doubt})")
  return "; ".join(words)


def _where(means, target):
  """The value at which a metric is `target`, to two digits.

  The largest such value: a balancer that is weak may get there by the last
  step, and have been on its way all the time before.
  """
  points = sorted((v, m) for v, m in means.items() if m > 0)
  for (v0, m0), (v1, m1) in reversed(list(zip(points, points[1:]))):
    if min(m0, m1) <= target <= max(m0, m1) and m0 != m1:
      part = math.log(target / m0) / math.log(m1 / m0)
      return float(f"{v0 * (v1 / v0) ** part:.2g}")
  if not points:
    raise ConfigError(f"no value that was tried has a metric above 0: {means}")
  return min(points, key=lambda p: abs(math.log(p[1] / target)))[0]
