"""Token losses: against rlax, by hand, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxrl_llm import estimators as est


def case(new, old, advantages, ref=None, **fields):
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
    **{name: row(x) for name, x in fields.items()},
  )
  return est.Outputs(log_probs=new), batch


def random_case(tokens=200):
  random = np.random.default_rng(0)
  old = -random.exponential(size=tokens)
  new = old + random.normal(0.0, 0.4, tokens)
  return new, old, random.normal(size=tokens)


def loss_and_slope(loss, outputs, batch):
  """[T] each: the losses, and the gradient in the log-probabilities."""
  apply = lambda x: loss.apply(outputs.replace(log_probs=x), batch)
  slope = jax.grad(lambda x: apply(x).sum())(outputs.log_probs)
  return np.asarray(apply(outputs.log_probs))[0, 0], np.asarray(slope)[0, 0]


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


LOG2 = np.log(2.0)
# Ratios 2 and 1/2, advantages ±1.
CORNERS = [LOG2, LOG2, -LOG2, -LOG2], [0.0] * 4, [1, -1, 1, -1]


@pytest.mark.parametrize(
  'loss, losses, slopes',
  [
    (est.clipped(0.1, 0.3), [-1.3, 2, -0.5, 0.9], [0, 2, -0.5, 0]),
    (est.clipped(0.1), [-1.1, 2, -0.5, 0.9], [0, 2, -0.5, 0]),
    (est.clipped(0.1, dual=1.5), [-1.1, 1.5, -0.5, 0.9], [0, 0, -0.5, 0]),
    (est.clipped(0.1, dual=3.0), [-1.1, 2, -0.5, 0.9], [0, 2, -0.5, 0]),
  ],
)
def test_each_side_is_clipped_where_it_would_go_too_far(loss, losses, slopes):
  """ε 0.1 below and 0.3 above; the dual bound is for bad tokens only."""
  got, slope = loss_and_slope(loss, *case(*CORNERS))
  np.testing.assert_allclose(got, losses, rtol=1e-6)
  np.testing.assert_allclose(slope, slopes, rtol=1e-6, atol=1e-7)


def test_a_clipped_weight_keeps_every_gradient():
  """− sg[clip(ρ)] A log π: the slope is − clip(ρ) A, also where it is cut."""
  got, slope = loss_and_slope(est.clipped_weight(0.1, 0.3), *case(*CORNERS))
  np.testing.assert_allclose(slope, [-1.3, 1.3, -0.9, 0.9], rtol=1e-6)
  np.testing.assert_allclose(got, slope * CORNERS[0], rtol=1e-6)
  _, slope = loss_and_slope(est.clipped_weight(1.0, 0.3), *case(*CORNERS))
  np.testing.assert_allclose(slope, [-1.3, 1.3, -0.5, 0.5], rtol=1e-6)


def test_value_error():
  """Old values 0, targets 1: the worse of the free and the bounded error."""
  outputs, batch = case(
    [0.0] * 4, [0.0] * 4, [0.0] * 4, values=[0.0] * 4, value_targets=[1.0] * 4
  )
  values = jnp.array([[[0.5, 0.1, -0.5, 2.5]]])
  errors = {None: [0.25, 0.81, 2.25, 2.25], 0.2: [0.64, 0.81, 2.25, 2.25]}
  slopes = {None: [-0.5, -0.9, -1.5, 1.5], 0.2: [0.0, -0.9, -1.5, 1.5]}
  for clip, expected in errors.items():
    loss = est.value_error(3.0, clip)
    apply = lambda v, loss=loss: loss.apply(outputs.replace(values=v), batch)
    np.testing.assert_allclose(
      apply(values)[0, 0], 1.5 * np.array(expected), rtol=1e-6
    )
    slope = jax.grad(lambda v, apply=apply: apply(v).sum())(values)
    np.testing.assert_allclose(
      slope[0, 0], 3.0 * np.array(slopes[clip]), rtol=1e-6
    )
  assert est.value_error(1.0).needs == est.Needs(critic=True)


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
