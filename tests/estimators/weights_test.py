"""Token weights and predicates: by hand, with empty and invalid responses."""

import jax.numpy as jnp
import numpy as np
import pytest
from listed import compose
from toys import plain_rollouts

from jaxrl_llm import estimators as est

# Two prompts of two responses: lengths 3, 1; 0, 2 of which the last is invalid.
LENGTHS = np.array([[3, 1], [0, 2]])
VALID = np.array([[True, True], [True, False]])[..., None]
MASK = (np.arange(4)[None, None] < LENGTHS[..., None]) & VALID

EXPECTED = {
  'sequence_sum': (est.sequence_sum(), 1 / 3, 1 / 3),
  'constant_length': (est.constant_length(8), 1 / 24, 1 / 24),
  'sequence_mean': (est.sequence_mean(), 1 / 9, 1 / 3),
  'token_mean': (est.token_mean(), 1 / 4, 1 / 4),
}


@pytest.mark.parametrize('name', EXPECTED)
def test_golden(name):
  weights, of_three, of_one = EXPECTED[name]
  got = weights(jnp.asarray(MASK), jnp.asarray(VALID))
  expected = np.zeros(MASK.shape)
  expected[0, 0, :3] = of_three
  expected[0, 1, :1] = of_one
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def rollouts(rewards, valid):
  valid = None if valid is None else jnp.asarray(valid)[..., None]
  return plain_rollouts(rewards, length=1, valid=valid)


REWARDS = [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.5, 2.0, 0.5]]
SOME_VALID = [[True] * 3, [False, True, True], [True, True, False]]


@pytest.mark.parametrize(
  'keep, valid, expected',
  [
    (est.mixed_outcomes(), None, [[0] * 3, [1] * 3, [1] * 3]),
    (est.mixed_outcomes(), SOME_VALID, [[0] * 3, [0] * 3, [1, 1, 0]]),
    (est.reward_above(0.5), None, [[1] * 3, [0, 1, 1], [0, 1, 0]]),
    (est.reward_above(-1.0), SOME_VALID, SOME_VALID),
  ],
)
def test_predicates(keep, valid, expected):
  got = keep(rollouts(REWARDS, valid))
  np.testing.assert_array_equal(got[..., 0], np.array(expected, bool))
  assert got.dtype == bool


def test_what_is_not_kept_does_not_count():
  """N and ΣT are those of the responses kept; baselines are not."""
  data = rollouts(REWARDS, None)
  for weights in (est.sequence_sum(), est.sequence_mean(), est.token_mean()):
    got = compose(weights=weights, keep=est.mixed_outcomes()).prepare(data)
    expected = np.array([[0.0] * 3, [1 / 6] * 3, [1 / 6] * 3])
    np.testing.assert_allclose(got.weights[..., 0], expected, rtol=1e-6)
  loo = est.subtract_leave_one_out_mean()
  got = compose(loo, keep=est.reward_above(0.6)).prepare(data)
  np.testing.assert_allclose(got.weights[1, :, 0], [0, 1 / 6, 1 / 6])
  np.testing.assert_allclose(got.advantages[1, :, 0], [0.0, 0.5, 0.5])
