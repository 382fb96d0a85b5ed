"""Failures of rewards: those of all that a step scored are counted."""

import numpy as np

from experiments.schedule import failure_messages
from jaxrl_llm.rewards import Scores
from jaxrl_llm.rewards.scoring import Failures
from jaxrl_llm.rollouts import Responses
from jaxrl_llm.rollouts.collect import failure_counts
from jaxrl_llm.rollouts.collect import failures_of_step as of_step

SOME = Failures(
  dict(timeout=0, crash=2, error=0, memory=0), dict(crash='ended with status 0')
)
MORE = Failures(
  dict(timeout=1, crash=3, error=0, memory=0),
  dict(timeout='5 s', crash='again'),
)


def scored(**failures):
  scores = Scores(np.zeros(1), np.ones(1, bool), {}, {}, failures)
  return Responses(None, [], None, [], lambda: scores)


def test_failures_of_a_step_are_those_of_all_that_it_scored():
  found = of_step(scored(a=SOME, b=MORE), scored(a=MORE), scored(b=SOME))
  assert failure_counts(found) == {
    'rewards/a/failed': 2,
    'rewards/a/failed/crash': 2,
    'rewards/b/failed': 4,
    'rewards/b/failed/crash': 3,
    'rewards/b/failed/timeout': 1,
    'greedy/rewards/a/failed': 4,
    'greedy/rewards/a/failed/crash': 3,
    'greedy/rewards/a/failed/timeout': 1,
    'branches/rewards/b/failed': 2,
    'branches/rewards/b/failed/crash': 2,
  }
  assert of_step(scored(), branched=scored()) == {}


def test_each_kind_of_failure_is_reported_once():
  reported = set()
  (line,) = failure_messages({'rewards/a': SOME}, 'at step 7', reported)
  assert '2 at step 7' in line and 'crash: ended with status 0' in line
  (line,) = failure_messages({'rewards/a': MORE}, 'at step 8', reported)
  assert 'timeout: 5 s' in line
  assert failure_messages({'rewards/a': MORE}, 'at step 9', reported) == []
