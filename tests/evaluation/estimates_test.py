"""pass@k, maj@k, best-of-n against all draws, intervals against repetition."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from mistakes import refused

from jaxrl_llm import evaluation
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import mathematics
from jaxrl_llm.tasks import answers


@pytest.mark.parametrize('k', [1, 2, 3, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(k):
  correct = np.array([[i < right for i in range(6)] for right in range(7)])
  expected = [
    np.mean(
      [row[list(draw)].any() for draw in itertools.combinations(range(6), k)]
    )
    for row in correct
  ]
  got = evaluation.pass_at_k(correct, k)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_large_counts_do_not_overflow():
  correct = np.arange(2000)[None] < 3
  got = evaluation.pass_at_k(correct, 1000)[0]
  # Exactly: 1 − (1000·999·998) / (2000·1999·1998).
  exact = 1 - (1000 * 999 * 998) / (2000 * 1999 * 1998)
  assert got == pytest.approx(exact, rel=1e-14)
  # The best three of 2,000 are worth 1: the same number.
  scores = np.arange(2000.0)[None]
  best = evaluation.best_of_n(scores, scores >= 1997, 1000)[0]
  assert best == pytest.approx(exact, rel=1e-12)
  # Three of 1,000 vote, and together.
  votes = np.where(np.arange(1000) < 3, 0, -1)[None]
  right = votes == 0
  got = evaluation.maj_at_k(votes, right, 500)[0]
  assert got == pytest.approx(evaluation.pass_at_k(right, 500)[0], rel=1e-9)


def majority(votes, correct):
  """The value of the winner, averaged over those that tie."""
  values = {}
  for answer, value in zip(votes, correct, strict=True):
    if answer >= 0:
      values.setdefault(answer, []).append(value)
  most = max(map(len, values.values()), default=0)
  tied = [np.mean(v) for v in values.values() if len(v) == most]
  return np.mean(tied) if tied else 0.0


@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_maj_at_k_is_the_mean_over_all_draws(n):
  random = np.random.default_rng(n)
  votes = random.integers(-1, 4, (12, n))
  votes[0], votes[1] = -1, np.arange(n)
  right = random.integers(0, 2, 8)
  correct = np.where(votes < 0, 0, right[votes]).astype(bool)
  for k in range(1, n + 1):
    draws = [list(draw) for draw in itertools.combinations(range(n), k)]
    expected = [
      np.mean([majority(v[draw], c[draw]) for draw in draws])
      for v, c in zip(votes, correct, strict=True)
    ]
    got = evaluation.maj_at_k(votes, correct, k)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_maj_at_k_in_plain_cases():
  votes = np.array([[0, 0, 0, 1, 1], [0, 1, 2, 3, 4], [0, -1, -1, -1, -1]])
  correct = votes == 0
  # One vote is the accuracy, also of responses without an answer.
  accuracy = correct.mean(axis=1)
  np.testing.assert_allclose(evaluation.maj_at_k(votes, correct, 1), accuracy)
  # All five: 3 against 2; one of five that tie; the only one that votes.
  np.testing.assert_allclose(
    evaluation.maj_at_k(votes, correct, 5), [1, 0.2, 1]
  )
  # Scores may be fractions, and of one answer the mean counts.
  scores = np.array([[0.5, 1.0, 0.0]])
  same = np.zeros((1, 3), int)
  np.testing.assert_allclose(evaluation.maj_at_k(same, scores, 3), 0.5)


def test_maj_at_k_is_unbiased():
  """Its mean over data is the chance that k fresh responses vote right."""
  random = np.random.default_rng(0)
  p = [0.4, 0.35, 0.15, 0.1]  # the last gives no answer
  draw = lambda *shape: random.choice([0, 1, 2, -1], shape, p=p)
  fresh = draw(6000, 5)
  truth = np.mean([majority(row, row == 0) for row in fresh])
  votes = draw(500, 12)
  got = evaluation.maj_at_k(votes, votes == 0, 5)
  error = math.hypot(got.std() / 500**0.5, 0.5 / 6000**0.5)
  assert abs(got.mean() - truth) < 4 * error < 0.07


def test_votes_are_of_answers_and_not_of_texts():
  texts = [
    ['#### 1,000', 'so #### 1000.0', '\\boxed{\\frac{2000}{2}}', '7', '#### 8'],
    ['#### 8', '#### 1000', '#### 8.0', '', '####'],
  ]
  got = evaluation.votes(texts, answers.marked_number)
  assert got.tolist() == [[0, 0, 0, -1, 1], [0, 1, 0, -1, -1]]
  texts = [['\\boxed{x=\\frac12}', 'The answer is $0.5$.', '\\boxed{1,2}']]
  texts[0] += ['\\boxed{\\{2,1\\}}', '\\boxed{(2,1)}']
  got = evaluation.votes(texts, mathematics.marked_answer)
  assert got.tolist() == [[0, 0, 1, 1, 2]]
  for extract, text in ((list, 'unhashable'), (int, 'ValueError')):
    with refused(text):
      evaluation.votes([['a']], extract)


@pytest.mark.parametrize('n', [1, 3, 7])
def test_best_of_n_is_the_mean_over_all_draws(n):
  random = np.random.default_rng(n)
  scores = random.integers(0, 4, (10, n)).astype(float)  # with many ties
  scores[0], scores[1] = 2.0, random.normal(size=n)
  scores[2, 0] = -np.inf
  gold = random.normal(size=(10, n))

  def best(s, g):
    return g[s == s.max()].mean()

  for k in range(1, n + 1):
    draws = [list(draw) for draw in itertools.combinations(range(n), k)]
    expected = [
      np.mean([best(s[draw], g[draw]) for draw in draws])
      for s, g in zip(scores, gold, strict=True)
    ]
    got = evaluation.best_of_n(scores, gold, k)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
  # A perfect scorer picks a right one wherever there is one.
  right = gold > 0
  np.testing.assert_allclose(
    evaluation.best_of_n(right.astype(float), right, n),
    evaluation.pass_at_k(right, n),
  )


@pytest.mark.parametrize('k', [0, -1, 4])
def test_more_than_was_sampled_is_refused(k):
  votes = np.zeros((2, 3), int)
  with pytest.raises(UserError, match=f'pass@{k} needs'):
    evaluation.pass_at_k(votes == 0, k)
  with pytest.raises(UserError, match=f'maj@{k} needs'):
    evaluation.maj_at_k(votes, votes == 0, k)
  with pytest.raises(UserError, match=f'best-of-{k} needs'):
    evaluation.best_of_n(votes, votes, k)
  scores = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0]])
  with pytest.raises(UserError, match='prompt 1 has a score of NaN'):
    evaluation.best_of_n(scores, votes, 2)


@pytest.mark.parametrize(
  'data_sets, resamples, margin',
  # 300 data sets have a standard error of 1.3 %.
  [(300, 400, 0.04), pytest.param(2000, 2000, 0.02, marks=pytest.mark.slow)],
)
def test_intervals_cover_new_prompts(data_sets, resamples, margin):
  """A 95 % interval holds the mean accuracy of new prompts as often."""
  random = np.random.default_rng(0)
  a, b, hits = 1.5, 2.5, 0
  for _ in range(data_sets):
    correct = random.random((200, 8)) < random.beta(a, b, (200, 1))
    values = evaluation.pass_at_k(correct, 1)
    interval = evaluation.bootstrap(values, resamples=resamples)
    assert interval.low <= interval.mean <= interval.high
    hits += interval.low <= a / (a + b) <= interval.high
  assert abs(hits / data_sets - 0.95) < margin


def test_interval_is_reproducible():
  values = np.random.default_rng(0).normal(size=50)
  assert evaluation.bootstrap(values) == evaluation.bootstrap(values)
  one = evaluation.bootstrap(np.array([0.7]))
  assert one == evaluation.Interval(0.7, 0.7, 0.7)


def test_an_unknown_value_is_not_hidden():
  assert np.isnan(evaluation.bootstrap(np.array([1.0, np.nan])).mean)


@pytest.mark.parametrize('count', [3, 5, 10])
def test_interval_of_a_few_covers_the_truth(count):
  random = np.random.default_rng(count)
  hits = np.zeros(2)
  for _ in range(1000):
    values = random.normal(loc=3.0, size=count)
    for i, form in enumerate((evaluation.bootstrap_few, evaluation.bootstrap)):
      interval = form(values, resamples=500)
      assert interval.low <= interval.mean <= interval.high
      hits[i] += interval.low <= 3.0 <= interval.high
  # Three standard errors of a count of 1000 are 0.02.
  assert 0.91 <= hits[0] / 1000 <= 0.97
  assert hits[1] / 1000 < 0.94  # the plain one does not


def test_interval_of_a_few_is_students_where_values_are_symmetric():
  # The bootstrap's own quantiles come near the normal ones at n = 40.
  values = np.random.default_rng(0).normal(size=20)
  values = np.concatenate([values, -values])
  low, high = scipy.stats.t.interval(
    0.95, 39, values.mean(), scipy.stats.sem(values)
  )
  interval = evaluation.bootstrap_few(values, resamples=20_000)
  assert interval.mean == pytest.approx(0, abs=1e-12)
  np.testing.assert_allclose(interval[1:], (low, high), rtol=0.03)


def test_interval_of_a_few_keeps_its_edges():
  assert evaluation.bootstrap_few(np.full(5, 0.7)) == (0.7, 0.7, 0.7)
  one = evaluation.bootstrap_few(np.array([0.7]))
  assert one.mean == 0.7 and np.isnan(one.low) and np.isnan(one.high)
  with pytest.raises(UserError, match='no values'):
    evaluation.bootstrap_few(np.array([]))


def test_distinct_bigrams():
  # (1, 2) (2, 1) (1, 2), (2, 1): two distinct of four.
  assert evaluation.distinct_bigrams([[1, 2, 1, 2], [2, 1]]) == 0.5
  assert evaluation.distinct_bigrams([[3, 3, 3, 3]]) == 1 / 3
  assert evaluation.distinct_bigrams([[1], []]) == 0.0
