"""Random numbers that are the same on every machine and version: SplitMix64."""

import numpy as np

_STEP = 0x9E3779B97F4A7C15


def bits(place_R: np.ndarray, number: int, *key: int) -> np.ndarray:
  """Returns random uint64 [R, number].

  Args:
    place_R: indices of the rows, >= 0; a row depends on its own index alone.
    number: how many numbers each row has.
    *key: integers below 2^64 that choose the numbers.
  """
  step, begin = np.array([_STEP], np.uint64), np.zeros(1, np.uint64)
  for value in key:
    begin = _mixed(begin + step + np.uint64(value))
  begin_R = _mixed(begin + place_R.astype(np.uint64) * step)
  return _mixed(begin_R[:, None] + np.arange(number, dtype=np.uint64) * step)


def permutation(number: int, *key: int) -> np.ndarray:
  """Returns 0, 1, ..., number - 1 in a random order.

  Args:
    number: of integers.
    *key: as in `bits`.
  """
  return np.argsort(bits(np.zeros(1), number, *key)[0], kind="stable")


def _mixed(x):
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
