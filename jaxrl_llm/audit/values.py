"""Errors of the values of states inside responses.

Values are compared with the mean return of very many branches from the same
states.  The noise of that mean is subtracted.

Shapes: S states, N branches from each.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.audit.estimates import Estimate, jackknife, leave_out


class Value(NamedTuple):
  """Accuracy of a source of values.

  Attributes:
    squared_error: E (V − U)², U the expected return of the state.
    explained: 1 − E (R − V)² / Var R, R the return of a continuation.
  """

  squared_error: Estimate
  explained: Estimate


class Doob(NamedTuple):
  """Two estimates of one variance: by martingale differences, and directly.

  Attributes:
    squares: Σₖ E (Uₖ₊₁ − Uₖ)², from the prompt to the reward.
    variance: E (R − U₀)², the variance of the reward given the prompt.
    difference: of the two.
  """

  squares: Estimate
  variance: Estimate
  difference: Estimate


def value_errors(
  returns: np.ndarray,
  predictions: Mapping[str, np.ndarray],
  clusters: np.ndarray,
  counts: Sequence[int] = (),
) -> dict[str, Value]:
  """Estimates errors of values against the mean of very many branches.

  The noise of that mean, s² / N, is subtracted: errors are relative to the
  states' true values U, and may be negative where there is none.

  Args:
    returns: [S, N] of the branches from each state; NaN for a missing one.
    predictions: name → [S], values that are independent of `returns`.
    clusters: [S] int; states that depend on each other, those of one prompt,
      share a number.  Standard errors are jackknifed over clusters.
    counts: K; adds 'mean of K branches', whose squared error is s² / K.

  Returns:
    {name: Value}, 'truth' first: the true values explain the most that any
    can.

  Raises:
    ValueError: fewer than 2 returns at a state, or fewer than 2 clusters.
  """
  returns = np.asarray(returns, float)
  number = np.isfinite(returns).sum(axis=1)
  fewest, different = number.min(initial=2), len(np.unique(clusters))
  if min(fewest, different) < 2:
    raise ValueError(
      f'{fewest} returns at a state and {different} clusters of states: both '
      'have to be at least 2'
    )
  mean, spread = np.nanmean(returns, axis=1), np.nanvar(returns, axis=1, ddof=1)
  noise = spread / number
  errors = {'truth': np.zeros(len(mean))}
  errors |= {f'mean of {k} branches': spread / k for k in counts}
  errors |= {
    name: np.square(np.asarray(values, float) - mean) - noise
    for name, values in predictions.items()
  }
  columns = [spread, mean, np.square(mean) - noise, *errors.values()]
  within, first, second, *means = leave_out(np.stack(columns), clusters)
  total = within + second - np.square(first)
  estimate = functools.partial(jackknife, len(total) - 1)
  return {
    name: Value(estimate(error), estimate(1.0 - (within + error) / total))
    for name, error in zip(errors, means, strict=True)
  }


def doob(
  values: np.ndarray,
  noise: np.ndarray,
  rewards: np.ndarray,
  clusters: np.ndarray,
) -> Doob:
  """Checks that Σₖ E (Uₖ₊₁ − Uₖ)² = Var(R | prompt) for measured values.

  It holds for any stopping times in a response, and only for expected rewards
  as values.

  Args:
    values: [n, 1 + M] of n responses, at the prompt and then at up to M
      positions from left to right; NaN for no position.  Estimates must be
      independent of the response from there on, and of each other.
    noise: [n, 1 + M], variances of these estimates.
    rewards: [n] of the responses.
    clusters: [n] int, as in `value_errors`.
  """
  noise = np.where(np.isnan(values), 0.0, noise)
  squares, last, last_noise = 0.0, values[:, 0], noise[:, 0]
  for value, spread in zip(
    [*values.T[1:], rewards], [*noise.T[1:], 0.0 * rewards], strict=True
  ):
    known = ~np.isnan(value)
    step = np.square(value - last) - spread - last_noise
    squares = squares + np.where(known, step, 0.0)
    last = np.where(known, value, last)
    last_noise = np.where(known, spread, last_noise)
  variance = np.square(rewards - values[:, 0]) - noise[:, 0]
  means = leave_out(np.stack([squares, variance]), clusters)
  estimate = functools.partial(jackknife, means.shape[1] - 1)
  return Doob(*map(estimate, means), estimate(means[0] - means[1]))
