"""Numbers about many responses: pass@k with intervals, distinct n-grams."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from jaxrl_llm.errors import UserError


class Interval(NamedTuple):
  """A mean, over prompts or over runs, and its bootstrap interval."""

  mean: float
  low: float
  high: float


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
  """The unbiased estimate of P(at least one of k responses is right).

    pass@k = 1 − C(n−c, k) / C(n, k)

  for c right ones among n sampled.

  Args:
    correct: [P, n] bool.
    k: at most n.

  Returns:
    [P] float64, one estimate per prompt.

  Raises:
    UserError: k > n or k < 1.

  References:
    Chen et al., `Evaluating Large Language Models Trained on Code
    <https://arxiv.org/abs/2107.03374>`_, 2021
  """
  samples = correct.shape[1]
  if not 1 <= k <= samples:
    raise UserError(f'pass@{k} needs at least {k} samples; there are {samples}')
  wrong = samples - correct.sum(axis=1)
  # C(n−c, k) / C(n, k) = Π_{i<k} (n−c−i) / (n−i), which reaches 0 by itself.
  tries = np.arange(k)[None]
  ratios = (wrong[:, None] - tries) / (samples - tries)
  return 1.0 - ratios.prod(axis=1)


def bootstrap(
  values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
  """The mean of one value per prompt, and its percentile interval.

  Prompts are resampled, not responses: responses to one prompt are not
  independent evidence about other prompts.

  Args:
    values: [P] float.
    level: of the interval.
    resamples: bootstrap resamples.
    seed: of the resampling.

  Raises:
    UserError: there are no values.
  """
  values = np.asarray(values, np.float64)
  if not values.size:
    raise UserError('no values to average: evaluate at least one prompt')
  draws = np.random.default_rng(seed).integers(
    len(values), size=(resamples, len(values))
  )
  tail = (1.0 - level) / 2.0
  low, high = np.quantile(values[draws].mean(axis=1), [tail, 1.0 - tail])
  return Interval(float(values.mean()), float(low), float(high))


def bootstrap_few(
  values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
  """The mean of a few values, such as one per run, and its interval.

    mean + √(n/(n−1)) · t/z · (q − mean)   for each bound q of `bootstrap`

  t and z are the quantiles of Student's distribution with n − 1 degrees of
  freedom and of the normal one.  The percentile interval of 5 values that says
  95 % holds the truth 81 times of 100: resamples spread √((n−1)/n) too little,
  and their spread is itself a guess.  Both are made up for as if the values
  were normal; what the bounds keep of the bootstrap is their asymmetry.

  Of normal values the 95 % interval holds the truth 94, 94 and 95 times of 100
  for n = 3, 5 and 10, of values as skewed as accuracies near 1 (a beta(8, 1))
  91, 89 and 92 times.  Bounds may lie outside the range of the values.

  Args:
    values: [n] float.
    level: of the interval.
    resamples: bootstrap resamples.
    seed: of the resampling.

  Returns:
    An `Interval`; of one value, which tells nothing of others, with NaNs.

  Raises:
    UserError: there are no values.

  References:
    Hesterberg, `What Teachers Should Know about the Bootstrap
    <https://arxiv.org/abs/1411.5279>`_, 2014, on narrowness bias
  """
  mean, *bounds = bootstrap(values, level, resamples, seed)
  count = len(values)
  if count == 1:
    return Interval(mean, np.nan, np.nan)
  tail = (1.0 + level) / 2.0
  widen = special.stdtrit(count - 1, tail) / special.ndtri(tail)
  widen *= np.sqrt(count / (count - 1))
  low, high = (float(mean + widen * (q - mean)) for q in bounds)
  return Interval(mean, low, high)


def distinct_ngrams(sequences: Sequence[Sequence[int]], n: int = 2) -> float:
  """Distinct n-grams over all n-grams of all sequences, in [0, 1].

  A policy that repeats itself, within a response or across responses, lowers
  it.  It falls with the amount of text: compare equal amounts.  0 if there is
  no n-gram.

  References:
    Li et al., `A Diversity-Promoting Objective Function for Neural
    Conversation Models <https://arxiv.org/abs/1510.03055>`_, 2016
  """
  ngrams = [
    tuple(sequence[i : i + n])
    for sequence in sequences
    for i in range(len(sequence) - n + 1)
  ]
  return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
