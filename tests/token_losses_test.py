"""Token losses: against rlax, by hand, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxrl_llm import estimators as est


def case(new, old, advantages, ref=None):
  """Outputs and a batch of one response, from lists over tokens."""
  row = lambda x: jnp.asarray(x, jnp.float32)[None, None]
  new = row(new)
  batch = est.Batch(
    tokens=jnp.zeros(new.shape, jnp.int32),
    mask=jnp.ones(new.shape, bool),
    log_probs=row(old),
    valid=jnp.ones((1, 1, 1), bool),
    advantages=row(advantages),
    weights=jnp.ones(new.shape),
    ref_log_probs=None if ref is None else row(ref),
  )
  return est.Outputs(log_probs=new), batch


def random_case(tokens=200):
  random = np.random.default_rng(0)
  old = -random.exponential(size=tokens)
  new = old + random.normal(0.0, 0.4, tokens)
  return new, old, random.normal(size=tokens)


def test_clipped_equals_rlax():
  rlax = pytest.importorskip('rlax')
  new, old, advantages = (np.float32(x) for x in random_case())
  outputs, batch = case(new, old, advantages)
  ours = lambda log_probs: (
    est.clipped(0.2).apply(outputs.replace(log_probs=log_probs), batch).mean()
  )
  theirs = lambda log_probs: rlax.clipped_surrogate_pg_loss(
    jnp.exp(log_probs - old), jnp.asarray(advantages), 0.2
  )
  value, slope = jax.value_and_grad(ours)(outputs.log_probs)
  expected, expected_slope = jax.value_and_grad(theirs)(jnp.asarray(new))
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(slope[0, 0], expected_slope, rtol=1e-5, atol=1e-8)
  assert 0 < (np.asarray(expected_slope) == 0).sum() < new.size


def test_each_side_is_clipped_where_it_would_go_too_far():
  """Ratios 2 and 1/2, advantages ±1, ε 0.1 below and 0.3 above."""
  log2 = np.log(2.0)
  outputs, batch = case([log2, log2, -log2, -log2], [0] * 4, [1, -1, 1, -1])
  loss = est.clipped(0.1, 0.3).apply(outputs, batch)[0, 0]
  np.testing.assert_allclose(loss, [-1.3, 2.0, -0.5, 0.9], rtol=1e-6)
  loss = est.clipped(0.1).apply(outputs, batch)[0, 0]
  np.testing.assert_allclose(loss, [-1.1, 2.0, -0.5, 0.9], rtol=1e-6)


def test_score_function_and_sum():
  outputs, batch = case([-1.0, -2.0], [0, 0], [3, -4], [-1.5, -1.0])
  loss = est.score_function()
  np.testing.assert_allclose(loss.apply(outputs, batch)[0, 0], [3.0, -8.0])
  both = est.add(loss, est.kl_penalty(2.0, est.k2))
  np.testing.assert_allclose(
    both.apply(outputs, batch)[0, 0], [3.0 + 0.25, -8.0 + 1.0]
  )
  assert both.needs == est.Needs(reference=True)


@pytest.mark.parametrize('estimate', [est.k1, est.k3])
def test_estimates_of_the_divergence_are_unbiased(estimate):
  """Over two normal densities, whose KL is known: (0.5² + 1.2² − 1)/2 − ln 1.2.

  k2 is not: its mean is not the KL.
  """
  log_p = lambda x: -0.5 * ((x - 0.5) / 1.2) ** 2 - np.log(1.2)
  log_q = lambda x: -0.5 * x**2
  kl = (0.5**2 + 1.2**2 - 1) / 2 - np.log(1.2)

  def mean(estimate):
    density = lambda x: (
      np.exp(log_p(x))
      / np.sqrt(2 * np.pi)
      * float(estimate(log_p(x), log_q(x)))
    )
    return integrate.quad(density, -12, 12, epsabs=1e-8)[0]

  with jax.enable_x64(True):
    np.testing.assert_allclose(mean(estimate), kl, rtol=1e-6)
    assert abs(mean(est.k2) - kl) > 0.01


def test_small_k3_keeps_its_digits():
  """exp(x) − 1 − x loses all digits in float32 at x = 1e-3; expm1 does not."""
  with jax.enable_x64(True):
    exact = float(est.k3(jnp.float64(-1.0), jnp.float64(-1.001)))
  assert exact == pytest.approx(5e-7, rel=1e-3)
  got = float(est.k3(jnp.float32(0.0), jnp.float32(-1e-3)))
  assert got == pytest.approx(exact, rel=1e-3)


def test_k1_in_the_loss_is_refused():
  with pytest.raises(ValueError, match='k1 in the loss is zero'):
    est.kl_penalty(0.1, est.k1)
