"""Folded scores: by hand, and against rewards to go by exact enumeration.

A toy language's responses are scored token by token through `score`, as a
user's step-level function would be, and the fold's sum becomes the reward.
"""

import jax
import mistakes
import numpy as np
import pytest

from jaxrl_llm import estimators as est
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import RewardPart, score, step_scores

enumeration = est.enumeration
CLOSE = dict(rtol=0, atol=1e-10)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def by_line(completions, **kwargs):
  """A step is a line of numbers; its score is their sum."""
  return [
    [float(sum(map(int, line.split()))) for line in text.splitlines()]
    for text in completions
  ]


@pytest.mark.parametrize(
  'how, rewards',
  [
    (sum, [6, -1, 0]),
    (step_scores.mean, [2, -0.5, None]),
    (step_scores.least, [1, -3, None]),
    (step_scores.last, [2, 2, None]),
    (step_scores.discounted_sum(0.5), [1 + 3 / 2 + 2 / 4, -3 + 2 / 2, 0]),
    (max, [3, 2, None]),
  ],
)
def test_folds(how, rewards):
  texts = ['1\n1 2\n2', '-3\n2', ''][: 3 if how is not max else 2]
  function = step_scores.folded(by_line, how)
  assert function(completions=texts) == rewards[: len(texts)]
  got = score([RewardPart('folded', function)], texts, texts, {})
  known = [r for r in rewards[: len(texts)] if r is not None]
  np.testing.assert_array_equal(got.total[got.valid], known)


def test_the_function_gets_the_arguments_that_it_names():
  seen = []

  def steps(completions, answer):
    seen.append((completions, answer))
    return [np.ones(2), None]

  part = RewardPart('steps', step_scores.folded(steps))
  columns = {'answer': ['a', 'b'], 'finished': [True, False]}
  got = score([part], ['p', 'q'], ['c', 'd'], columns)
  assert seen == [(['c', 'd'], ['a', 'b'])]
  assert got.total.tolist() == [2, 0] and got.valid.tolist() == [True, False]


@pytest.mark.parametrize(
  'returned, text',
  [
    (1.0, 'float, not a list'),
    ([1.0, 2.0], 'float for response 0'),
    ([[1.0], 'abc'], 'str for response 1'),
    ([[1.0], [2.0, float('nan')]], 'nan for step 1 of response 1'),
    ([[1.0], [float('inf')]], 'inf for step 0 of response 1'),
    ([[1.0], [None]], 'None for step 0 of response 1'),
    ([[1.0], ['2']], "'2' for step 0 of response 1"),
    ([np.float64(1), [1.0]], 'float for response 0'),
    ([[1.0]], '1 values: list'),
  ],
)
def test_what_is_no_list_of_scores_is_named(returned, text):
  # The minimum of 1 and NaN would be 1: each score is looked at.
  function = step_scores.folded(lambda completions: returned, step_scores.least)
  with mistakes.refused(text):
    score([RewardPart('f', function)], ['p'] * 2, ['c'] * 2, {})


def compose(*advantages):
  return est.estimator(
    est.chain(*advantages), est.score_function(), est.sequence_sum()
  )


def with_tokens(seed, gamma=1.0):
  """A toy with random token rewards and no other."""
  toy = enumeration.toy(seed, words=2, max_length=3, gamma=gamma)
  return toy._replace(rewards=np.zeros_like(toy.rewards))


def rewarded(toy, how):
  """The toy with its token rewards folded into those of responses."""

  def token_scores(completion_ids, **kwargs):
    tables = toy.token_rewards[0], toy.prefixes
    return [
      [tables[0][tables[1].index(ids[:t]), ids[t]] for t in range(len(ids))]
      for ids in completion_ids
    ]

  part = RewardPart('folded', step_scores.folded(token_scores, how))
  count = len(toy.responses)
  columns = {'completion_ids': list(toy.responses)}
  scores = score([part], [''] * count, [''] * count, columns)
  return toy._replace(rewards=scores.total[None])


TO_GO = compose(
  est.at_last_token(), est.add_token_rewards(), est.reward_to_go()
)


def examine(seed):
  """Asserts that gradients agree; returns the ratio of the variances."""
  toy = with_tokens(seed)
  whole = rewarded(toy, sum)
  exact = enumeration.exact_gradient(whole)
  folded = enumeration.examine(est.reinforce(), whole, 1)
  tokens = enumeration.examine(TO_GO, toy, 1, exact=exact)
  group = enumeration.expected_gradient(est.rloo(), whole, 2)
  for gradient in (folded.gradient, tokens.gradient, group):
    np.testing.assert_allclose(gradient, exact, **CLOSE)
  return folded.variance / tokens.variance


def test_the_sum_has_the_gradient_of_rewards_to_go():
  assert examine(seed=0) > 1.1  # What it does change is the variance.


@pytest.mark.slow
def test_gradient_and_variance_on_twenty_languages():
  ratios = [examine(seed) for seed in range(20)]
  middle = np.median(ratios)
  print(f'{min(ratios):.2f} to {max(ratios):.2f}, median {middle:.2f}')
  assert 0.6 < min(ratios) < 1 < middle < max(ratios) < 3.2


def test_other_folds_have_other_gradients():
  toy = with_tokens(0)
  exact = enumeration.exact_gradient(rewarded(toy, sum))
  for how in (step_scores.mean, step_scores.least, step_scores.last):
    other = enumeration.exact_gradient(rewarded(toy, how))
    norms = np.linalg.norm(other) * np.linalg.norm(exact)
    assert (other * exact).sum() / norms < 0.99, how


def test_a_discount_is_folded_in_and_not_applied_again():
  """Lemma 1's γ^{t−1} in front of the discounted reward to go."""
  for wrong in (0, -1, 1.1, float('nan')):
    with pytest.raises(UserError, match='gamma'):
      step_scores.discounted_sum(wrong)
  gamma = 0.6
  toy = with_tokens(2, gamma)
  whole = rewarded(toy, step_scores.discounted_sum(gamma))

  def outer(advantages, rollouts):
    return advantages * gamma ** np.arange(rollouts.mask.shape[2])[None, None]

  lemma = compose(
    est.at_last_token(),
    est.add_token_rewards(),
    est.reward_to_go(gamma),
    est.AdvantageTransform(outer),
  )
  exact = enumeration.exact_gradient(whole)
  got = enumeration.expected_gradient(lemma, toy, 1)
  np.testing.assert_allclose(got, exact, **CLOSE)
  undiscounted = enumeration.exact_gradient(rewarded(toy, sum))
  assert np.abs(undiscounted - exact).max() > 0.01
