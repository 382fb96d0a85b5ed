"""Scores of steps or tokens, folded into the reward of the whole response.

A function that scores parts of responses, such as a process reward model,

  fn(prompts=, completions=, <columns it names>) -> list[list[float]]

gives a list per response, one score per step or token, in their order.

What folding changes: with `sum` (or `discounted_sum`) nothing that an
estimator expects.  The response's reward is then one black box of which the
policy gradient is the same as with every token's own reward to go (He et al.,
Theorem 1); a test asserts it by exact enumeration.  It changes the variance: a
token's weight then contains what was earned before it, which says nothing about
it.  On 20 random languages of three tokens REINFORCE with the sum had 0.7 to
3.1 times the variance of rewards to go, 1.27 times in the median
(`pytest -m slow tests/rewards/step_scores_test.py`).  The other folds set
another objective.

References:
  He et al., `Response-Level Rewards Are All You Need for Online Reinforcement
  Learning in LLMs <https://arxiv.org/abs/2506.02553>`_, 2025
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence

from jaxrl_llm.errors import UserError

# Folds the scores of one response, in their order, into its reward.
Fold = Callable[[list[float]], float | None]


def folded(
  step_scores: Callable[..., Sequence[Sequence[float]]], how: Fold = sum
) -> Callable[..., list[float | None]]:
  """Makes a reward function of one that scores steps or tokens.

  Args:
    step_scores: gives a list of finite numbers per response; None for no score.
    how: Python's `sum`, or `mean`, `least`, `last`, `discounted_sum(γ)` of this
      module, or any other function from a list to a number.

  Returns:
    A reward function that takes the same arguments by name.

  Raises:
    UserError: when called, naming response and step, for anything but such
      lists.
  """
  name = getattr(step_scores, '__name__', 'step_scores')

  @functools.wraps(step_scores)
  def folds(**arguments):
    lists = step_scores(**arguments)
    if not isinstance(lists, (list, tuple)):
      raise UserError(
        f'{name} returned {type(lists).__name__}, not a list with a list of '
        'scores per response.'
      )
    return [
      None if scores is None else how(_checked(name, i, scores))
      for i, scores in enumerate(lists)
    ]

  return folds


def mean(scores: list[float]) -> float | None:
  """Their mean; no score for a response without steps.

  Another objective than the sum: it prefers few good steps to many.
  """
  return math.fsum(scores) / len(scores) if scores else None


def least(scores: list[float]) -> float | None:
  """The lowest, for a solution as good as its worst step; None without steps.

  References:
    Wang et al., `Math-Shepherd <https://arxiv.org/abs/2312.08935>`_, 2024
  """
  return min(scores, default=None)


def last(scores: list[float]) -> float | None:
  """The last, for scores that judge all that came before; None without steps.

  References:
    Snell et al., `Scaling LLM Test-Time Compute Optimally
    <https://arxiv.org/abs/2408.03314>`_, 2024
  """
  return scores[-1] if scores else None


def discounted_sum(gamma: float) -> Fold:
  """Σₜ γ^{t−1} rₜ, the return of token rewards under a discount.

  Estimators that see only this one number need no γ of their own, and with one
  they would discount twice.

  Args:
    gamma: γ, above 0 and at most 1.
  """
  if not 0 < gamma <= 1:
    raise UserError(f'discounted_sum: gamma={gamma} must be in (0, 1].')

  def discounts(scores):
    return math.fsum(gamma**t * score for t, score in enumerate(scores))

  return discounts


def _checked(name: str, response: int, scores) -> list[float]:
  """One response's scores as finite floats."""
  if hasattr(scores, 'tolist'):
    scores = scores.tolist()  # An array of NumPy or JAX.
  if not isinstance(scores, (list, tuple)):
    raise UserError(
      f'{name} returned {type(scores).__name__} for response {response}, not a '
      'list of scores.'
    )
  for step, score in enumerate(scores):
    if not isinstance(score, numbers.Real) or not math.isfinite(score):
      raise UserError(
        f'{name} returned {score!r} for step {step} of response {response}.\n'
        'A score of a step must be a finite number.'
      )
  return [float(score) for score in scores]
