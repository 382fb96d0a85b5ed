"""Rewards for the tests that a program passed."""

from collections.abc import Callable, Sequence

# A bool per test, at least one → the reward.
Grade = Callable[[Sequence[bool]], float]


def all_passed() -> Grade:
  """Scores 1 if every test passed, else 0."""
  return lambda passed: float(all(passed))


def share_passed() -> Grade:
  """Scores the share of the tests that passed.

  Denser, and easier to game: a constant answer earns the share of the tests
  that expect it.
  """
  return lambda passed: sum(passed) / len(passed)
