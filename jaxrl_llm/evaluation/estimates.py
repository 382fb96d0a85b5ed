"""Numbers about many responses: pass@k, maj@k, best-of-n, intervals, n-grams.

For n responses to each of P prompts, pass@k, maj@k and best-of-k are the means
over all subsets of k: for independent responses, the unbiased estimates of
least variance.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.errors import UserError

_UPPER = 0.975  # upper quantile of a 95 % interval


class Interval(NamedTuple):
  """A mean, over prompts or over runs, and its bootstrap interval."""

  mean: float
  low: float
  high: float


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
  """Returns the unbiased estimate of P(at least one of k responses is right).

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
  _check_subset(f'pass@{k}', k, samples)
  total = math.comb(samples, k)
  # Integers divide to the nearest float, however large they are.
  chances = [
    (total - math.comb(wrong, k)) / total for wrong in range(samples + 1)
  ]
  return np.array(chances)[samples - correct.sum(axis=1)]


def votes(
  responses: Sequence[Sequence[str]],
  extract: Callable[[str], Hashable | None],
) -> np.ndarray:
  """Numbers the answers of responses, for `maj_at_k`.

  Args:
    responses: n texts per prompt.
    extract: returns a text's answer, or None.  Answers are one if they are
      equal, as exact numbers are however they are written.

  Returns:
    [P, n] int, equal within a prompt where answers are, −1 without an answer.

  Raises:
    UserError: `extract` fails, or returns an unhashable value, such as a list.
  """
  rows = []
  for texts in responses:
    numbers, row = {None: -1}, []
    for text in texts:
      try:
        row.append(numbers.setdefault(extract(text), len(numbers) - 1))
      except Exception as error:
        raise UserError(
          f'the answer to vote on cannot be read: {type(error).__name__}: '
          f'{error}\nof the response {text[:60]!r}\nThe function must return a '
          'text, a number, a tuple of such, or None.'
        ) from error
    rows.append(row)
  return np.array(rows, int)


def maj_at_k(votes: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
  """Returns the unbiased estimate of E[the majority of k responses is right].

  The answer with the most votes wins; each of several with as many wins equally
  often.  A response without an answer does not vote, and where none of the k
  does, the result is wrong.  The mean over all subsets of k is exact, not
  sampled: answers are drawn with binomial counts of mean k in all, and then
  conditioned on k, which takes a polynomial product for each winning number of
  votes.

  Args:
    votes: [P, n] int, from `votes`.
    correct: [P, n] bool, or a score.  Where responses with one answer differ,
      their mean counts.
    k: at most n.

  Returns:
    [P] float64, one estimate per prompt.  It takes up to 5 ms per prompt at
    n = 16, up to 0.1 s at n = 64.

  Raises:
    UserError: k > n or k < 1.

  References:
    Wang et al., `Self-Consistency <https://arxiv.org/abs/2203.11171>`_, 2022
  """
  samples = votes.shape[1]
  _check_subset(f'maj@{k}', k, samples)
  known, results = {}, []
  for row, values in zip(votes, np.asarray(correct, np.float64), strict=True):
    silent = int((row < 0).sum())
    groups = [values[row == answer] for answer in np.unique(row[row >= 0])]
    case = silent, *sorted((len(group), group.mean()) for group in groups)
    if case not in known:
      known[case] = _majority(case[1:], silent, k, samples)
    results.append(known[case])
  return np.array(results, np.float64)


def best_of_n(scores: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
  """Returns the unbiased estimate of E[gold score of the best-scored of n].

    Σᵢ goldᵢ · P(i is chosen),
    P(the choice is among the r lowest) = C(r, n) / C(N, n)

  for N sampled; among equal scores each is chosen equally often.

  Args:
    scores: [P, N] float, of the selector, such as a reward model.
    gold: [P, N] float or bool, the worth of a selected response.
    n: at most N.

  Returns:
    [P] float64, one estimate per prompt.

  Raises:
    UserError: n > N or n < 1, or a score is not a number.

  References:
    Nakano et al., `WebGPT <https://arxiv.org/abs/2112.09332>`_, 2021, on
    estimating best-of-n
  """
  samples = scores.shape[1]
  _check_subset(f'best-of-{n}', n, samples)
  if np.isnan(scores).any():
    prompt = int(np.isnan(scores).any(axis=1).argmax())
    raise UserError(f'best-of-{n}: prompt {prompt} has a score of NaN')
  total = math.comb(samples, n)
  below = np.array([math.comb(r, n) / total for r in range(samples + 1)])
  ranks = np.sort(scores, axis=1)
  results = []
  for ordered, row, worth in zip(ranks, scores, gold, strict=True):
    low = np.searchsorted(ordered, row, 'left')
    high = np.searchsorted(ordered, row, 'right')
    chosen = (below[high] - below[low]) / (high - low)
    results.append(chosen @ np.asarray(worth, np.float64))
  return np.array(results, np.float64)


def bootstrap(values: np.ndarray, resamples: int = 2000) -> Interval:
  """Returns the mean of one value per prompt, and its 95 % percentile interval.

  Prompts are resampled, not responses: responses to one prompt are not
  independent evidence about other prompts.

  Args:
    values: [P] float.
    resamples: number of bootstrap resamples.

  Raises:
    UserError: there are no values.
  """
  values = np.asarray(values, np.float64)
  if not values.size:
    raise UserError('no values to average: evaluate at least one prompt')
  draws = np.random.default_rng(0).integers(
    len(values), size=(resamples, len(values))
  )
  low, high = np.quantile(values[draws].mean(axis=1), [1.0 - _UPPER, _UPPER])
  return Interval(float(values.mean()), float(low), float(high))


def bootstrap_few(values: np.ndarray, resamples: int = 2000) -> Interval:
  """Returns the mean of a few values, such as one per run, and its interval.

    mean + √(n/(n−1)) · t/z · (q − mean)   for each bound q of `bootstrap`

  t and z are the quantiles of Student's distribution with n − 1 degrees of
  freedom and of the normal one.  A percentile interval of 5 values at a nominal
  95 % covers the truth 81 times of 100: resamples spread √((n−1)/n) too little,
  and their spread is itself a guess.  Both are corrected as if the values were
  normal; the bounds keep the bootstrap's asymmetry.

  The 95 % interval covers the truth 94, 94 and 95 times of 100 for n = 3, 5
  and 10 normal values; 91, 89 and 92 times for values as skewed as accuracies
  near 1 (a beta(8, 1)).  Bounds may lie outside the range of the values.

  Args:
    values: [n] float.
    resamples: number of bootstrap resamples.

  Returns:
    An `Interval`; with NaNs for one value, which reveals nothing about others.

  Raises:
    UserError: there are no values.

  References:
    Hesterberg, `What Teachers Should Know about the Bootstrap
    <https://arxiv.org/abs/1411.5279>`_, 2014, on narrowness bias
  """
  mean, *bounds = bootstrap(values, resamples)
  count = len(values)
  if count == 1:
    return Interval(mean, np.nan, np.nan)
  from scipy import special  # slow to import

  widen = special.stdtrit(count - 1, _UPPER) / special.ndtri(_UPPER)
  widen *= np.sqrt(count / (count - 1))
  low, high = (float(mean + widen * (q - mean)) for q in bounds)
  return Interval(mean, low, high)


def distinct_bigrams(sequences: Sequence[Sequence[int]]) -> float:
  """Returns distinct bigrams over all bigrams of all sequences, in [0, 1].

  A policy that repeats itself, within a response or across responses, lowers
  it.  It falls with the amount of text: compare equal amounts.  0 if there are
  no bigrams.

  References:
    Li et al., `A Diversity-Promoting Objective Function for Neural
    Conversation Models <https://arxiv.org/abs/1510.03055>`_, 2016
  """
  bigrams = [pair for row in sequences for pair in itertools.pairwise(row)]
  return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _check_subset(name: str, k: int, samples: int) -> None:
  if not 1 <= k <= samples:
    raise UserError(f'{name} needs at least {k} samples; there are {samples}')


def _majority(groups, silent: int, k: int, samples: int) -> float:
  """Returns the winner's mean value over subsets of k.

  Args:
    groups: (number of responses, value) of each answer.
    silent: responses without an answer.
    k: votes cast, including those of silent responses.
    samples: total number of responses.
  """
  share = k / samples
  chances = [(_binomial(count, share), value) for count, value in groups]
  start = _binomial(silent, share)[: k + 1]
  most = max((count for count, _ in groups), default=0)
  expected = 0.0
  for needed in range(1, min(k, most) + 1):
    # ways[t, s]: chance that s responses were drawn and t answers have the
    # needed number of votes, none more.  gains: the sum of those t values,
    # times the chance.
    ways = np.zeros((min(len(groups), k // needed) + 1, k + 1))
    ways[0, : len(start)] = start
    gains = np.zeros_like(ways)
    for chance, value in chances:
      tied = chance[needed] if needed < len(chance) else 0.0
      ways, gains = (
        _shifted(ways, chance[:needed]) + _tie(ways, needed, tied),
        _shifted(gains, chance[:needed])
        + _tie(gains + value * ways, needed, tied),
      )
    expected += (gains[1:, k] / np.arange(1, len(gains))).sum()
  return float(expected / _binomial(samples, share)[k])


def _shifted(table: np.ndarray, chance: np.ndarray) -> np.ndarray:
  """Returns the table after drawing s more responses with chance[s], no tie."""
  width = table.shape[1]
  result = np.zeros_like(table)
  for s in np.flatnonzero(chance[:width]):
    result[:, s:] += chance[s] * table[:, : width - s]
  return result


def _tie(table: np.ndarray, drawn: int, chance: float) -> np.ndarray:
  """Returns the table after one more tie, of `drawn` responses."""
  result = np.zeros_like(table)
  result[1:, drawn:] = chance * table[:-1, :-drawn]
  return result


def _binomial(count: int, share: float) -> np.ndarray:
  """Returns the chances of 0 … count draws, each with probability `share`."""
  from scipy import stats  # slow to import

  return stats.binom.pmf(np.arange(count + 1), count, share)
