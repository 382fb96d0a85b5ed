"""Numbers with standard errors, from means over independent draws."""

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
  """A number and its standard error; NaN where it has none."""

  value: float
  error: float


def jackknife(n: int, values: np.ndarray) -> Estimate:
  """Estimates a function of means over n independent draws, and over m others.

  Besides the standard error, the jackknife estimates the bias of such a
  function, of order 1/n, and subtracts it.

  Args:
    n: number of draws of the first kind.
    values: [1 + n + m]; the function of all draws, then of all but each of the
      n, then of all but each of the m.  m may be 0.
  """
  value, variance = values[0], 0.0
  for left_out in (values[1 : n + 1], values[n + 1 :]):
    if not left_out.size:
      continue
    mean = left_out.mean()
    value = value - (len(left_out) - 1) * (mean - values[0])
    variance += (len(left_out) - 1) * np.square(left_out - mean).mean()
  return Estimate(float(value), float(np.sqrt(variance)))


def leave_out(x: np.ndarray, clusters: np.ndarray) -> np.ndarray:
  """Averages [F, S] to [F, 1 + C]: over all, over all but each cluster."""
  _, index = np.unique(clusters, return_inverse=True)
  inside = np.eye(index.max() + 1)[index]
  sums, sizes = x @ inside, inside.sum(axis=0)
  total = x.sum(axis=1, keepdims=True)
  without = (total - sums) / (len(index) - sizes)[None]
  return np.concatenate([total / len(index), without], axis=1)


def root(square: Estimate, width: float = 1.96) -> tuple[float, float, float]:
  """Returns (√x, low, high) of an estimate of x ≥ 0 that may be negative.

  Low and high are the roots of x ± `width` standard errors, and 0 where those
  are negative: 0 means that nothing was detected.
  """
  positive = lambda x: math.sqrt(x) if not x < 0 else 0.0
  margin = width * square.error
  return (
    positive(square.value),
    positive(square.value - margin),
    positive(square.value + margin),
  )
