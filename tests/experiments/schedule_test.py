"""When a run ends, evaluates and saves."""

import pytest

from experiments.schedule import Cycle, Schedule


def follow(course, tokens, every=100, every_tokens=0, save=100):
  """Steps after which an evaluation and a checkpoint are due; the last one."""
  evaluated, saved = [], []
  while not course.ended:
    warm = course.in_warm_start
    course.advance(0 if warm else tokens)
    if course.evaluation_is_due(every, every_tokens):
      evaluated.append(course.step)
    if course.checkpoint_is_due(save):
      saved.append(course.step)
  return evaluated, saved, course.step


def test_steps_are_counted_from_where_rl_begins():
  found = follow(Schedule(5, 15, 0), 10, every=4, save=3)
  assert found == ([5, 9, 13, 15], [3, 5, 8, 11, 14, 15], 15)


def test_tokens_end_a_run_at_the_step_that_reaches_them():
  course = Schedule(2, 1000, 95)
  # Steps 5, 7 and 10 cross 25, 50 and 75 tokens; 12 ends at 100 ≥ 95.
  assert follow(course, 10, every_tokens=25)[::2] == ([2, 5, 7, 10, 12], 12)
  assert course.tokens == 100 and course.tokens_before == 90
  assert not course.overran


@pytest.mark.parametrize(
  'budget, total, overran', [(95, 50, False), (90, 50, True), (0, 11, True)]
)
def test_lower_limits_than_the_run_has_reached(budget, total, overran):
  course = Schedule(2, total, budget, step=12, tokens=100, tokens_before=90)
  assert course.ended and course.overran == overran


def test_rounds_are_evaluated_at_their_seams_and_while_they_learn():
  """3 steps sample, 4 learn; every fourth step that learns counts, too."""
  course = Schedule(2, 16, 0, Cycle(3, 4))
  found = follow(course, 10, every=4, every_tokens=1, save=100)
  assert found == ([2, 5, 6, 9, 12, 14, 16], [2, 16], 16)


def test_tokens_end_a_run_only_where_a_round_ends():
  course = Schedule(2, 1000, 35, Cycle(3, 4))
  while not course.ended:
    sampling = course.step >= 2 and (course.step - 2) % 7 < 3
    course.advance(10 if sampling else 0)
  # 30 tokens are short of the budget, so a second round is begun and ended.
  assert (course.step, course.tokens, course.tokens_before) == (16, 60, 30)
  assert not course.overran
