"""The law of routed language models, Clark et al. (2202.01169).

  log L = a log N + b log E^ + c log N log E^ + d            (their equation 6)
  1/E^ = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max       (their equation 7)

Logarithms are decimal, L is in nats a token, N are parameters of the dense
model. With c > 0 experts help large models less.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Law(NamedTuple):
  """a, b, c, d, E_start and E_max."""

  a: float
  b: float
  c: float
  d: float
  start: float
  most: float

  def words(self, digits: int) -> str:
    """The constants as text."""
    names = {"a": self.a, "b": self.b, "c": self.c, "d": self.d}
    words = [f"{name} = {x:+.{digits}f}" for name, x in names.items()]
    return ", ".join(
      [*words, f"E_start = {self.start:.2f}", f"E_max = {self.most:.0f}"]
    )

  def loss(self, parameters, experts) -> np.ndarray:
    """L of N and E, which may be arrays."""
    log_n, log_e = np.log10(parameters), np.log10(self.saturated(experts))
    return 10 ** (
      self.a * log_n + self.b * log_e + self.c * log_n * log_e + self.d
    )

  def saturated(self, experts) -> np.ndarray:
    """E^."""
    return _saturated(experts, self.start, self.most)

  def interaction(self, experts) -> float:
    """The change that E experts make in a: c (log E^(E) - log E^(1)).

    It is told by the losses where c alone is not, as a larger c with a smaller
    E_max can mean the same.
    """
    log_one, log_many = np.log10(self.saturated(np.array([1, experts])))
    return float(self.c * (log_many - log_one))


# The paper's, for the router S-BASE.
S_BASE = Law(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478)


class Point(NamedTuple):
  """A model: N, E (1: dense) and its loss in nats a token."""

  parameters: float
  experts: float
  loss: float


def fit(points: Sequence[Point], interaction: bool = True) -> Law:
  """The law with the least squared error of log L.

  a, b, c and d solve linear equations for given E_start and E_max, so that
  only these two are searched for.

  Args:
    points: with two values of N or more, and three of E.
    interaction: False: c = 0.
  """
  from scipy import optimize  # Slow to import.

  # The error has several local minima, so the search has several starts.
  tried = [
    optimize.minimize(
      lambda bounds: _solve(bounds, points, interaction)[0],
      np.log([start, most]),
      method="Nelder-Mead",
      bounds=[(-5, 5), (0, 10)],
      options={"xatol": 1e-4, "fatol": 1e-14, "maxiter": 2000},
    )
    for start in (0.1, 1.0, 5.0)
    for most in (50.0, 1000.0)
  ]
  return _solve(min(tried, key=lambda t: t.fun).x, points, interaction)[1]


def _solve(bounds, points, interaction):
  """(error, the law) for E_start above 1 and E_max above it."""
  parameters, experts, losses = (np.array(x, float) for x in zip(*points))
  log_n, log_l = np.log10(parameters), np.log10(losses)
  start = 1 + np.exp(bounds[0])
  most = start + np.exp(bounds[1])
  log_e = np.log10(_saturated(experts, start, most))
  terms = [log_n, log_e, np.ones_like(log_n)]
  terms += [log_n * log_e] if interaction else []
  matrix = np.stack(terms, axis=1)
  coefficients, *_ = np.linalg.lstsq(matrix, log_l, rcond=None)
  a, b, d, *c = coefficients
  error = ((matrix @ coefficients - log_l) ** 2).mean()
  return error, Law(a, b, c[0] if c else 0.0, d, start, most)


def error(law: Law, points: Sequence[Point], over_dense=False) -> float:
  """Root of the mean squared error of log10 L.

  Args:
    law: that predicts.
    points: what was found.
    over_dense: of what experts change: of L over that of the dense model, of
      which there is one, for points of one size.
  """
  parameters, experts, losses = (np.array(x, float) for x in zip(*points))
  wrong = np.log10(law.loss(parameters, experts)) - np.log10(losses)
  if over_dense:
    dense = experts == 1
    wrong = wrong[~dense] - wrong[dense]
  return float(np.sqrt((wrong**2).mean()))


def _saturated(experts, start, most):
  inner = 1 / (1 / start - 1 / most)
  return 1 / (1 / (np.asarray(experts) - 1 + inner) + 1 / most)
