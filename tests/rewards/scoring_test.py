"""Sums against hand computation; every way a reward function can misbehave."""

import fractions

import hostile
import jax.numpy as jnp
import mistakes
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import RewardPart, Workers, score, start

PROMPTS = ['p0', 'p1', 'p2']
COMPLETIONS = ['short', 'a bit longer', 'the third completion ' * 10]
COLUMNS = {'answer': ['1', '2', '3'], 'finished': [True, False, True]}


def run(*parts, **changes):
  arguments = dict(
    prompts=PROMPTS, completions=COMPLETIONS, columns=COLUMNS
  ) | dict(changes)
  return score(parts, **arguments)


def returns(value):
  return RewardPart('bad_one', lambda completions, **kwargs: value)


def message_of(*parts, **changes):
  with mistakes.refused() as caught:
    run(*parts, **changes)
  return str(caught.value)


def test_total_is_the_weighted_sum_of_the_parts():
  scores = run(
    RewardPart('a', lambda completions, **kwargs: [1, 2.5, -1]),
    RewardPart('b', lambda prompts, completions, **kwargs: (0.1, 0, 4), -2.0),
  )
  np.testing.assert_array_equal(scores.total, [1 - 0.2, 2.5, -1 - 8])
  assert scores.total.dtype == np.float64
  np.testing.assert_array_equal(scores.parts['a'], [1, 2.5, -1])
  np.testing.assert_array_equal(scores.parts['b'], [0.1, 0, 4])
  assert scores.valid.tolist() == [True] * 3


def test_none_leaves_its_function_out_of_the_sum():
  """All None leave the response out, and so does a score without weight."""
  scores = run(
    RewardPart('a', lambda **kwargs: [1, None, None], 2.0),
    RewardPart('b', lambda **kwargs: [10, 20, None]),
    RewardPart('logged', lambda **kwargs: [None, 7, 7], 0.0),
  )
  np.testing.assert_array_equal(scores.total, [12, 20, 0])
  assert scores.valid.tolist() == [True, True, False]
  np.testing.assert_array_equal(scores.parts['a'], [1, np.nan, np.nan])
  np.testing.assert_array_equal(scores.parts['b'], [10, 20, np.nan])
  assert not any(scores.failed['a']) and not scores.failures


def test_a_failure_leaves_the_response_out_whatever_others_say():
  with Workers(hostile.NAME, workers=1) as there:
    scores = score(
      [RewardPart('there', there), RewardPart('b', lambda **_: [10, 20, 30])],
      ['p'] * 3,
      ['1', 'none', 'raise'],
      {},
    )
  np.testing.assert_array_equal(scores.total, [11, 20, 0])
  assert scores.valid.tolist() == [True, True, False]
  assert scores.failed['there'].tolist() == [False, False, True]
  assert scores.failed['b'].tolist() == [False] * 3
  counts, messages = scores.failures['there']
  assert counts == {'error': 1, 'timeout': 0, 'crash': 0, 'memory': 0}
  assert messages == {
    'error': "ValueError: no answer (sample 2, completion 'raise')"
  }


def test_what_an_array_masks_is_no_score():
  masked = np.ma.array([1.0, 5.0, 3.0], mask=[False, True, False])
  for value in (masked, list(masked)):
    scores = run(returns(value))
    assert scores.valid.tolist() == [True, False, True]
    np.testing.assert_array_equal(scores.total, [1, 0, 3])


@pytest.mark.parametrize(
  'value',
  [
    np.asarray([1, 0, 1]),
    np.asarray([1.0, 0.0, 1.0], np.float32),
    jnp.asarray([1.0, 0.0, 1.0]),
    [jnp.float32(1), jnp.int32(0), np.float64(1)],
    [True, False, np.bool_(True)],
    [fractions.Fraction(1), 0, 1],
  ],
)
def test_numbers_of_every_make_are_taken(value):
  np.testing.assert_array_equal(run(returns(value)).total, [1, 0, 1])


@pytest.mark.parametrize(
  'bad',
  [float('nan'), float('inf'), -np.inf, np.float32('nan'), '1', 1j, [1], {}]
  + [10**400, 1e39, -1e300],
)
def test_a_value_that_is_no_finite_number_names_function_and_sample(bad):
  text = message_of(returns([0.0, 1.0, bad]))
  assert 'bad_one' in text and 'sample 2' in text
  assert 'the third completion' in text and len(text) < 300


@pytest.mark.parametrize(
  'bad',
  [1.0, np.float32(1), np.ones(()), np.ones((3, 1)), np.ones(1), [1.0], [1] * 4]
  + [None, 'abc', {'a': 1, 'b': 2, 'c': 3}, jnp.ones(()), np.array(['a', 'b'])],
)
def test_nothing_is_broadcast_or_truncated(bad):
  text = message_of(returns(bad))
  assert 'bad_one' in text and '3' in text


def test_an_exception_is_located_and_chained():
  """It ends the step and not the process; a batch may fail as a whole."""

  def breaks(completions, **kwargs):
    return [1 / (len(c) - len('a bit longer')) for c in completions]

  def leaves(**kwargs):
    raise SystemExit(0)

  def on_many(completions, **kwargs):
    if len(completions) > 1:
      raise RuntimeError('line one\nline two')
    return [1.0]

  text = message_of(RewardPart('breaks', breaks))
  assert 'ZeroDivisionError' in text and 'sample 1' in text
  assert 'a bit longer' in text
  with pytest.raises(UserError) as caught:
    run(RewardPart('breaks', breaks))
  assert isinstance(caught.value.__cause__, ZeroDivisionError)
  text = message_of(RewardPart('leaves', leaves))
  assert "'leaves' raised SystemExit: 0" in text and 'sample 0' in text
  assert 'whole batch' in message_of(RewardPart('on_many', on_many))


def test_a_function_gets_copies_of_only_what_it_names():
  seen = {}

  def some(completions, answer, unused=7):
    seen['some'] = (list(completions), list(answer), unused)
    answer.clear()
    completions[0] = ''
    return [0.0] * 3

  class All:
    def __call__(self, prompts, **kwargs):
      seen['all'] = (prompts, kwargs)
      return [0] * len(prompts)

  run(RewardPart('some', some), RewardPart('all', All()))
  assert seen['some'] == (COMPLETIONS, ['1', '2', '3'], 7)
  assert seen['all'] == (PROMPTS, {'completions': COMPLETIONS, **COLUMNS})


def test_a_missing_column_is_named():
  text = message_of(RewardPart('needy', lambda completions, gold: []))
  assert 'needy' in text and "'gold'" in text and 'answer' in text
  text = message_of(RewardPart('positional', lambda prompts, c, /: []))
  assert 'positional' in text


def test_inconsistent_input_is_refused():
  good = RewardPart('a', lambda **kwargs: [0.0] * 3)
  assert 'answer' in message_of(good, columns={'answer': ['1']})
  assert 'completions' in message_of(good, completions=['a'])
  assert 'distinct' in message_of(good, good)
  assert 'distinct' in message_of()
  assert 'weight' in message_of(good._replace(weight=float('nan')))
  assert 'not a function' in message_of(good._replace(function='a'))
  assert 'prompts' in message_of(good, columns={'prompts': ['1'] * 3})
  big = RewardPart('big', lambda **kwargs: [0, 1e38, 0], 10.0)
  assert 'overflows float32 at sample 1' in message_of(big)


def test_workers_begin_at_once_and_what_is_in_this_process_when_asked():
  calls = []

  def here(completions):
    calls.append(completions)
    return [1.0] * len(completions)

  with Workers(hostile.NAME, workers=1) as there:
    parts = [RewardPart('here', here), RewardPart('there', there, 2.0)]
    scoring = start(parts, ['p'] * 2, ['1', '2'], {})
    # The worker takes samples in turn: these two are behind it.
    there.submit(['p'], ['3'], {}).result()
    assert not calls
    scores = scoring()
    assert scores.total.tolist() == [3.0, 5.0]
    assert scoring() is scores and len(calls) == 1
    with pytest.raises(UserError, match='distinct names'):
      start([], ['p'], ['1'], {})  # What does not fit is reported at once.
