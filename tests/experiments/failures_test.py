"""Failures of rewards: all of a step's are named, each kind is told once."""

import numpy as np

from experiments.schedule import failure_messages
from jaxrl_llm.rewards import Scores
from jaxrl_llm.rewards.scoring import Failures, merge_failures
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


def test_each_kind_of_failure_is_told_once():
  told = set()
  (line,) = failure_messages({'rewards/proof': SOME}, 'at RL step 7', told)
  for text in ('rewards/proof', '2 at RL step 7', 'crash: ended with status 0'):
    assert text in line
  (line,) = failure_messages({'rewards/proof': MORE}, 'at RL step 8', told)
  assert '1 at RL step 8' in line and 'timeout: 5 s' in line
  both = {'rewards/proof': MORE, 'eval/rewards/proof': MORE}
  assert len(failure_messages(both, 'at step 8', told)) == 2
  assert failure_messages(both, 'at step 9', told) == []


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
  merged = merge_failures([{'a': SOME}, {'a': MORE, 'b': SOME}, {}])
  assert merged['a'].total == 6 and merged['b'] == SOME
  # The first message of each kind.
  first = dict(crash='ended with status 0', timeout='5 s')
  assert merged['a'].messages == first
