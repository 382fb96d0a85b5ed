"""Folds scores of steps, tokens or tests into the reward of a response.

A function that scores parts of responses, such as a process reward model,

  fn(prompts=, completions=, <columns it names>) -> list[list[float]]

returns a list per response, with one score per step or token, in order.

Folding with `sum` (or `discounted_sum`) keeps the policy gradient of every
token's own reward to go (He et al., Theorem 1; a test asserts it by exact
enumeration) and changes its variance: a token's weight then includes rewards
earned before it.  On 20 random languages of three tokens, REINFORCE had 0.7 to
3.1 times the variance, 1.27 times in the median (`pytest -m slow
tests/rewards/step_scores_test.py`).  The other folds define another objective.

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
# A bool per test of a program, at least one → the reward.
Grade = Callable[[Sequence[bool]], float]


def folded(
  step_scores: Callable[..., Sequence[Sequence[float]]], how: Fold = sum
) -> Callable[..., list[float | None]]:
  """Turns a function that scores steps or tokens into a reward function.

  Args:
    step_scores: returns a list of finite numbers per response, or None for no
      score.  The reward function takes the same arguments by name, and raises
      UserError, naming response and step, if it returns anything else.
    how: Python's `sum`, or `mean`, `least`, `last`, `discounted_sum(γ)` of this
      module, or any other function from a list to a number.
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
  """Returns the mean score; no score for a response without steps.

  This objective is not the sum's: it prefers few good steps to many.
  """
  return math.fsum(scores) / len(scores) if scores else None


def least(scores: list[float]) -> float | None:
  """Returns the lowest score, of the worst step; None without steps.

  References:
    Wang et al., `Math-Shepherd <https://arxiv.org/abs/2312.08935>`_, 2024
  """
  return min(scores, default=None)


def last(scores: list[float]) -> float | None:
  """Returns the last score, which rates all steps; None without steps.

  References:
    Snell et al., `Scaling LLM Test-Time Compute Optimally
    <https://arxiv.org/abs/2408.03314>`_, 2024
  """
  return scores[-1] if scores else None


def discounted_sum(gamma: float) -> Fold:
  """Returns a fold that computes Σₜ γ^{t−1} rₜ, with γ above 0 and at most 1.

  Estimators that see only this one number need no γ of their own: with one they
  would discount twice.
  """
  if not 0 < gamma <= 1:
    raise UserError(f'discounted_sum: gamma={gamma} must be in (0, 1].')
  return lambda scores: math.fsum(gamma**t * r for t, r in enumerate(scores))


def all_passed() -> Grade:
  """Scores 1 if every test passed, else 0."""
  return lambda passed: float(all(passed))


def share_passed() -> Grade:
  """Scores the share of the tests that passed.

  Denser, and easier to game: a constant answer earns the share of the tests
  that expect it.
  """
  return lambda passed: sum(passed) / len(passed)


def _checked(name: str, response: int, scores) -> list[float]:
  """Returns one response's scores as finite floats."""
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
