"""Limits of trees: where sharing and credit pay per generated token.

Shapes: P prompts, G responses, T tokens; n responses, each cut into 1 + M
segments, of which it may reach only some; C clusters of responses that depend
on each other.
"""

from typing import NamedTuple

import numpy as np
from scipy import optimize

from jaxrl_llm.audit.estimates import Estimate, jackknife, leave_out


class Profile(NamedTuple):
  """Uncertainty and scores along responses, over all and all but each cluster.

  Attributes:
    squares: [1 + M, 1 + C], δ: E (U after the segment − U before)², where U is
      the expected reward of a state.
    scores: [1 + M, 1 + C], S: E Σ of squared score norms up to its end.
    tokens: [1 + M, 1 + C], mean tokens in a segment.
  """

  squares: np.ndarray
  scores: np.ndarray
  tokens: np.ndarray


def profile(
  values: np.ndarray,
  noise: np.ndarray,
  rewards: np.ndarray,
  norms: np.ndarray,
  lengths: np.ndarray,
  starts: np.ndarray,
  clusters: np.ndarray,
) -> Profile:
  """Measures where the reward is decided, and where scores accumulate.

  Args:
    values: [n, 1 + M] of the state before each segment; NaN for a segment that
      the response does not reach, or a state without a value, which ends what
      is told apart.  Independent of the response from there on, and of each
      other.
    noise: [n, 1 + M], variances of these values.
    rewards: [n] of the responses.
    norms: [n, T], squared norm of each token's score, 0 after the end.
    lengths: [n], tokens of the responses.
    starts: [1 + M], tokens before each segment; the first is 0.
    clusters: [n] int; standard errors are jackknifed over them.
  """
  values = np.where(np.isnan(values).cumsum(axis=1) > 0, np.nan, values)
  ends = np.append(starts[1:], norms.shape[1])
  after = np.concatenate([values[:, 1:], np.full((len(values), 1), np.nan)], 1)
  further = np.concatenate([noise[:, 1:], np.zeros((len(values), 1))], 1)
  last = np.isnan(after)
  after = np.where(last, rewards[:, None], after)
  further = np.where(last, 0.0, further)
  squares = np.square(after - values) - noise - further
  squares = np.where(np.isnan(values), 0.0, squares)
  sums = np.concatenate([np.zeros((len(norms), 1)), norms.cumsum(axis=1)], 1)
  tokens = np.clip(lengths[:, None] - starts, 0, ends - starts)
  parts = squares.T, sums[:, ends].T, tokens.T.astype(float)
  return Profile(*(leave_out(part, clusters) for part in parts))


def cap(profile: Profile) -> Estimate:
  """Returns the most that a tree gains over RLOO per generated token.

    Σδ · S_T · T / (Σₖ ℓₖ √iso(δₖ Sₖ / ℓₖ))²

  for segments of ℓ tokens, iso the nearest sequence that does not decrease.  It
  bounds trees of equal weights with exact baselines at one prompt, not trees
  that decode each prefix once.  9/4 where the reward is decided evenly.
  """

  def gain(squares, scores, tokens):
    some = tokens > 0
    rates = np.maximum(squares * scores, 0.0)[some] / tokens[some]
    rates = optimize.isotonic_regression(rates, weights=tokens[some]).x
    cost = np.square((tokens[some] * np.sqrt(rates)).sum())
    return squares.sum() * scores[-1] * tokens.sum() / cost

  gains = np.array([gain(*each) for each in np.stack(profile).T.swapaxes(1, 2)])
  return jackknife(len(gains) - 1, gains)


def distinct_tokens(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Counts tokens to decode where each prefix is decoded once.

  Args:
    tokens: [P, G, T].
    mask: [P, G, T] bool.

  Returns:
    [G], the mean over prompts for the first 1, 2, … G responses.
  """
  counts = np.zeros(tokens.shape[:2])
  for prompt, (rows, valid) in enumerate(zip(tokens, mask, strict=True)):
    prefixes = set()
    for number, (row, own) in enumerate(zip(rows, valid, strict=True)):
      ids = tuple(row[own].tolist())
      prefixes |= {ids[:end] for end in range(1, len(ids) + 1)}
      counts[prompt, number] = len(prefixes)
  return counts.mean(axis=0)


def best_samples(
  between: float,
  within: float,
  samples: int,
  tokens: np.ndarray,
  leave_one_out: bool,
) -> int:
  """Returns the G whose gradient has the least noise per generated token.

    (between + within · (G₀ − 1) / (G − 1)) · tokens(G)

  with a leave-one-out baseline; with none G₀ / G.

  Args:
    between: variance between prompts.
    within: variance of one prompt's gradient from G₀ responses.
    samples: G₀.
    tokens: [G], to decode for 1, 2, … G responses to a prompt.
    leave_one_out: whether the baseline is the mean of the siblings.
  """
  counts = np.arange(1, len(tokens) + 1) - leave_one_out
  with np.errstate(divide='ignore'):
    noise = between + within * (samples - leave_one_out) / counts
  return int(np.argmin(noise * tokens)) + 1


def advice(distinct: float, cap: float, credit: float) -> str:
  """Returns which tree pays, by a rule that was fixed before the comparison.

  Args:
    distinct: share of distinct tokens among 8 responses.
    cap: of `cap`.
    credit: signal of exact Q − V relative to RLOO's.
  """
  if distinct < 0.6:
    return 'weighted tree'
  if cap > 3:
    return 'late forks with a mixed baseline'
  if credit > 1.5:
    return 'critic and two forks of two'
  return 'none'
