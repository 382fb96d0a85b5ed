"""Reliability of a reward model's margins, on held-out pairs.

A margin d = s⁺ − s⁻ is the model's score of the preferred response minus that
of the other, in nats.  Under the Bradley-Terry model the first is preferred
with probability σ(d).  The order within a pair is arbitrary, so pairs are
folded: the model is right where d > 0, and its confidence is σ(|d|), between
1/2 and 1.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from jaxrl_llm.errors import UserError
from jaxrl_llm.evaluation.estimates import Interval, bootstrap

_BINS = 10


class Bin(NamedTuple):
  """Pairs of similar confidence; NaNs where there is none.

  Attributes:
    low, high: bounds of the confidences, [low, high).
    count: number of pairs.
    confidence: their mean confidence.
    accuracy: the share of right ones; ties count half.
  """

  low: float
  high: float
  count: int
  confidence: float
  accuracy: float


class Calibration(NamedTuple):
  """The results of `examine`.

  Attributes:
    count: number of pairs.
    accuracy: the share of right ones, ties half, and its interval.
    log_loss: − log σ(d), nats, its mean and interval; log 2 for no knowledge.
    error: the expected calibration error, as a probability.
    temperature: divisor of the margins; see `temperature`.
    bins: those of the reliability diagram.
  """

  count: int
  accuracy: Interval
  log_loss: Interval
  error: float
  temperature: float
  bins: tuple[Bin, ...]


def examine(margins: np.ndarray, resamples: int = 2000) -> Calibration:
  """Computes all numbers about held-out pairs.

  Args:
    margins: [N] nats.
    resamples: those of the intervals, over pairs.

  Raises:
    UserError: there are no margins, or one is not finite.
  """
  margins = np.asarray(margins, np.float64)
  if margins.ndim != 1 or not margins.size:
    raise UserError(
      f'margins have the shape {margins.shape}; give one number per pair'
    )
  if not np.isfinite(margins).all():
    where = int(np.argmin(np.isfinite(margins)))
    raise UserError(f'the margin of pair {where} is {margins[where]}')
  table = reliability(margins)
  return Calibration(
    count=len(margins),
    accuracy=bootstrap(correct(margins), resamples),
    log_loss=bootstrap(log_loss(margins), resamples),
    error=expected_error(table),
    temperature=temperature(margins),
    bins=table,
  )


def correct(margins: np.ndarray) -> np.ndarray:
  """[N] float64: 1 where the preferred one scores higher, 1/2 for a tie."""
  return 0.5 * (1.0 + np.sign(margins))


def log_loss(margins: np.ndarray) -> np.ndarray:
  """[N] float64: − log σ(d) of each pair, nats."""
  return np.logaddexp(0.0, -margins)


def reliability(margins: np.ndarray) -> tuple[Bin, ...]:
  """Computes the reliability diagram: accuracy by confidence.

  Ten bins of equal width lie between 1/2 and 1; the last one holds 1.

  Args:
    margins: [N] nats.

  References:
    Guo et al., `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, 2017
  """
  confidence, right = special.expit(np.abs(margins)), correct(margins)
  edges = np.linspace(0.5, 1.0, _BINS + 1)
  places = np.searchsorted(edges[1:-1], confidence, side='right')
  table = []
  for i in range(_BINS):
    here = places == i
    count = int(here.sum())
    means = [
      float(x[here].mean()) if count else np.nan for x in (confidence, right)
    ]
    table.append(Bin(float(edges[i]), float(edges[i + 1]), count, *means))
  return tuple(table)


def expected_error(table: tuple[Bin, ...]) -> float:
  """Computes the expected calibration error: mean |accuracy − confidence|.

  The mean is over pairs.  Noise in the bins' accuracies adds to it: N perfectly
  calibrated pairs show about √(10 / N) · 0.3.

  Args:
    table: from `reliability`, with at least one pair.
  """
  filled = [each for each in table if each.count]
  gaps = [each.count * abs(each.accuracy - each.confidence) for each in filled]
  return float(sum(gaps) / sum(each.count for each in filled))


def temperature(margins: np.ndarray) -> float:
  """Finds the τ for which margins d/τ have the least log-loss.

  Above 1 the model is too confident, below 1 not confident enough.  0 if every
  pair is right, as no margin is wide enough then.  Infinity if the mean margin
  is 0 or less, as the margins carry no information.

  Args:
    margins: [N] nats.

  References:
    Guo et al., `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, 2017
  """
  largest = np.abs(margins).max()
  if margins.mean() <= 0:
    return float('inf')
  if margins.min() >= 0:
    return 0.0
  # With β = 1/τ the slope of the log-loss, − mean d σ(−β d), grows with β.
  scaled = margins / largest
  slope = lambda beta: -(scaled * special.expit(-beta * scaled)).mean()
  low, high = 0.0, 1.0
  while slope(high) < 0:
    low, high = high, 2.0 * high
  for _ in range(100):
    middle = 0.5 * (low + high)
    low, high = (middle, high) if slope(middle) < 0 else (low, middle)
  return float(largest / high)
