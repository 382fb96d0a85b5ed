"""pass@k against all draws, intervals against repetition, n-grams by hand."""

import itertools

import numpy as np
import pytest
import scipy.stats

from jaxrl_llm import evaluation
from jaxrl_llm.errors import UserError


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


@pytest.mark.parametrize('k', [0, -1, 4])
def test_pass_at_more_than_was_sampled_is_refused(k):
  with pytest.raises(UserError, match=f'pass@{k} needs'):
    evaluation.pass_at_k(np.ones((2, 3), bool), k)


def test_large_counts_do_not_overflow():
  correct = np.arange(2000)[None] < 3
  got = evaluation.pass_at_k(correct, 1000)[0]
  # Exactly: 1 − (1000·999·998) / (2000·1999·1998).
  exact = 1 - (1000 * 999 * 998) / (2000 * 1999 * 1998)
  assert got == pytest.approx(exact, rel=1e-9)


def test_interval_covers_the_truth_as_often_as_it_says():
  random = np.random.default_rng(0)
  hits = 0
  for _ in range(300):
    values = random.random(60) < 0.4
    interval = evaluation.bootstrap(values, level=0.9, resamples=300)
    assert interval.low <= interval.mean <= interval.high
    assert interval.mean == values.mean()
    hits += interval.low <= 0.4 <= interval.high
  assert 0.82 < hits / 300 < 0.97


def test_interval_is_reproducible_and_narrows_with_the_level():
  values = np.random.default_rng(0).normal(size=50)
  assert evaluation.bootstrap(values) == evaluation.bootstrap(values)
  wide = evaluation.bootstrap(values, level=0.99)
  narrow = evaluation.bootstrap(values, level=0.5)
  assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
  one = evaluation.bootstrap(np.array([0.7]))
  assert one == evaluation.Interval(0.7, 0.7, 0.7)


def test_an_unknown_value_is_not_hidden():
  assert np.isnan(evaluation.bootstrap(np.array([1.0, np.nan])).mean)


def test_no_values_are_refused():
  with pytest.raises(UserError, match='no values'):
    evaluation.bootstrap(np.array([]))


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


def test_distinct_ngrams():
  # (1, 2) (2, 1) (1, 2), (2, 1): two distinct of four.
  assert evaluation.distinct_ngrams([[1, 2, 1, 2], [2, 1]]) == 0.5
  assert evaluation.distinct_ngrams([[1, 2, 1, 2], [2, 1]], n=1) == 1 / 3
  assert evaluation.distinct_ngrams([[3, 3, 3, 3]], n=3) == 0.5
  assert evaluation.distinct_ngrams([[1], []]) == 0.0
