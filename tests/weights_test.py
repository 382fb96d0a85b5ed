"""Token weights: values by hand, with empty and invalid responses."""

import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize('name', EXPECTED)
def test_padding_changes_nothing(name):
  weights = EXPECTED[name][0]
  longer = np.pad(MASK, ((0, 0), (0, 0), (0, 5)))
  narrow = weights(jnp.asarray(MASK), jnp.asarray(VALID))
  wide = weights(jnp.asarray(longer), jnp.asarray(VALID))
  np.testing.assert_array_equal(wide[..., :4], narrow)
  np.testing.assert_array_equal(wide[..., 4:], 0.0)


@pytest.mark.parametrize('name', EXPECTED)
def test_nothing_valid_weighs_nothing(name):
  nothing = jnp.zeros((2, 2, 4), bool)
  got = EXPECTED[name][0](nothing, nothing[..., :1])
  np.testing.assert_array_equal(got, 0.0)
