"""Numbers about many responses: pass@k with intervals, distinct n-grams."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.errors import UserError


class Interval(NamedTuple):
  """A mean over prompts and its bootstrap interval."""

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
