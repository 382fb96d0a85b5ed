"""Transforms of rewards: values worked out by hand, and their refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import estimators as est

NAN = float('nan')


def rollouts(rewards, valid=None, **fields):
  """Rollouts of one token per response; rewards [P, G]."""
  rewards = jnp.asarray(rewards, jnp.float32)[..., None]
  shape = rewards.shape
  return est.Rollouts(
    tokens=jnp.zeros(shape, jnp.int32),
    mask=jnp.ones(shape, bool),
    log_probs=jnp.zeros(shape),
    rewards=rewards,
    valid=None if valid is None else jnp.asarray(valid)[..., None],
    **fields,
  )


def apply(transform, data):
  return np.asarray(transform.apply(data.rewards, data))[..., 0]


def test_golden_values():
  data = rollouts([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
  expected = {
    est.identity: [[1, 2, 6], [0, 0, 0]],
    est.ones: [[1, 1, 1], [1, 1, 1]],
    est.subtract_group_mean: [[-2, -1, 3], [0, 0, 0]],
    est.subtract_leave_one_out_mean: [[-3, -1.5, 4.5], [0, 0, 0]],
  }
  for transform, values in expected.items():
    np.testing.assert_allclose(apply(transform(), data), values, rtol=1e-6)
  # mean 3, deviation √((4 + 1 + 9) / 2) = √7 with G − 1 = 2 below.
  np.testing.assert_allclose(
    apply(est.standardize(epsilon=0.5), data)[0],
    np.array([-2, -1, 3]) / (np.sqrt(7.0) + 0.5),
    rtol=1e-6,
  )


@pytest.mark.parametrize(
  'transform, expected',
  [
    (est.subtract_group_mean(), [-1.5, 1.5]),
    (est.subtract_leave_one_out_mean(), [-3.0, 3.0]),
    (est.standardize(epsilon=0.0), [-np.sqrt(0.5), np.sqrt(0.5)]),
  ],
)
def test_statistics_are_taken_where_valid(transform, expected):
  data = rollouts([[1.0, 100.0, 4.0]], [[True, False, True]])
  values = apply(transform, data)[0]
  np.testing.assert_allclose(values[[0, 2]], expected, rtol=1e-6)


@pytest.mark.parametrize(
  'transform',
  [
    est.subtract_group_mean(),
    est.subtract_leave_one_out_mean(),
    est.standardize(),
  ],
)
def test_one_or_no_valid_response_learns_nothing(transform):
  data = rollouts([[3.0, 5.0], [3.0, 5.0]], [[True, False], [False, False]])
  np.testing.assert_array_equal(apply(transform, data), 0.0)
  assert transform.needs.samples == 2


def test_ones_whatever_was_earned():
  data = rollouts([[np.inf, -3.0]])
  np.testing.assert_array_equal(apply(est.ones(), data), 1.0)


def test_chain_applies_in_reading_order():
  double = est.AdvantageTransform(lambda a, r: 2.0 * a, est.Needs(greedy=True))
  square = est.AdvantageTransform(lambda a, r: a * a, est.Needs(samples=3))
  both = est.chain(double, square)
  data = rollouts([[3.0]])
  assert apply(both, data) == 36.0
  assert apply(est.chain(square, double), data) == 18.0
  assert both.needs == est.Needs(samples=3, greedy=True)
  np.testing.assert_array_equal(apply(est.chain(), data), 3.0)


def test_response_kl_is_a_sum_over_the_response():
  log_probs = jnp.array([[[-1.0, -2.0, NAN], [-0.5, NAN, NAN]]])
  reference = jnp.array([[[-1.5, -1.0, NAN], [-2.5, NAN, NAN]]])
  data = est.Rollouts(
    tokens=jnp.zeros((1, 2, 3), jnp.int32),
    mask=jnp.array([[[True, True, False], [True, False, False]]]),
    log_probs=log_probs,
    rewards=jnp.array([[[1.0], [0.0]]]),
    ref_log_probs=reference,
  )
  transform = est.subtract_response_kl(0.1)
  values = transform.apply(data.rewards, data)[0, :, 0]
  np.testing.assert_allclose(values, [1.0 - 0.1 * -0.5, -0.1 * 2], rtol=1e-6)
  assert transform.needs == est.Needs(reference=True)


def test_deviation_of_equal_fractions_is_not_divided_by():
  """Float32 gives equal k/1000 a mean that differs from them by a rounding."""
  rewards = np.full((1000, 7), np.arange(1000)[:, None] / 1000, np.float32)
  data = rollouts(rewards)
  mean = data.rewards.sum(axis=1, keepdims=True) / 7
  assert (np.asarray(data.rewards - mean) != 0).any()
  for transform in (
    est.subtract_group_mean(),
    est.subtract_leave_one_out_mean(),
    est.standardize(epsilon=1e-9),
  ):
    np.testing.assert_array_equal(apply(transform, data), 0.0)
