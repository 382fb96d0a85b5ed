"""What the tests that a program passed are worth."""

from collections.abc import Callable, Sequence

# A bool per test, at least one → the reward.
Grade = Callable[[Sequence[bool]], float]


def all_passed() -> Grade:
  """1 if every test passed, else 0."""
  return lambda passed: float(all(passed))


def share_passed() -> Grade:
  """The share of the tests that passed.

  Denser, and easier to please: a constant answer earns the share of the tests
  that expect it.
  """
  return lambda passed: sum(passed) / len(passed)
