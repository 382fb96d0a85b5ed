"""Importance ratios against loops of torch, their bounds, and corrections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import assert_is_formula, evaluate, num_responses, quick_jit
from toys import random_rollouts

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')


def token(i, t, j):
  return (i.new[t] - i.old[t]).exp()


def log_trajectory(i):
  return sum(i.new[s] - i.old[s] for s in range(i.length))


def trajectory(i, t, j):
  return log_trajectory(i).exp()


def sequence(i, t, j):
  return (log_trajectory(i) / i.length).exp()


def sequence_token(i, t, j):
  own = i.new[t].exp() / i.new[t].detach().exp()
  return sequence(i, t, j).detach() * own


def pair(i, t, j):
  partner = log_trajectory(j).exp().detach() if j and j.length else 1.0
  return trajectory(i, t, j) * partner


RATIOS = {
  'token': (est.token_ratio, token),
  'sequence': (est.sequence_ratio, sequence),
  'sequence and token': (est.sequence_token_ratio, sequence_token),
  'trajectory': (est.trajectory_ratio, trajectory),
  'pair': (est.pair_ratio, pair),
}


@pytest.mark.parametrize('name', RATIOS)
def test_values_and_gradients(name):
  """Each ratio is weighted on its own, so that no gradient can hide."""
  ratio, of_token = RATIOS[name]
  rollouts, outputs = random_rollouts(0)
  weights = np.random.default_rng(0).normal(size=rollouts.mask.shape)
  loss = est.TokenLoss(lambda outputs, batch: weights * ratio(outputs, batch))
  estimator = est.estimator(est.ones(), loss, est.sequence_sum())

  def formula(groups, running):
    total = 0.0
    for p, group in enumerate(groups):
      by_place = {i.place: i for i in group}
      for i in group:
        for t in range(i.length):
          ratio = of_token(i, t, by_place.get(i.place ^ 1))
          total += weights[p, i.place, t] * ratio
    return total / num_responses(groups)

  got = evaluate(estimator, rollouts, outputs)
  assert_is_formula(got, formula, rollouts, outputs)


def case(new, old, sampler=None, mask=None):
  """Outputs and a batch of one pair of responses, [2][T] each."""
  rows = lambda x: jnp.asarray(x, jnp.float32)[None]
  new = rows(new)
  mask = np.ones(new.shape, bool) if mask is None else np.array(mask)[None]
  batch = est.Batch(
    tokens=jnp.zeros(new.shape, jnp.int32),
    mask=jnp.asarray(mask),
    log_probs=rows(old),
    valid=jnp.ones((1, 2, 1), bool),
    advantages=jnp.ones((1, 2, 1)),
    weights=jnp.ones(new.shape),
    sampler_log_probs=None if sampler is None else rows(sampler),
  )
  return est.Outputs(log_probs=new), batch


@pytest.mark.parametrize('name', RATIOS)
def test_no_ratio_overflows(name):
  """100 nats: exp would be ∞ in float32, and 0 · ∞ is NaN."""
  ratio, _ = RATIOS[name]
  for sign in (1.0, -1.0):
    outputs, batch = case([[sign * 100.0] * 2] * 2, [[0.0] * 2] * 2)
    total = lambda x, o=outputs, b=batch: ratio(o.replace(log_probs=x), b).sum()
    value, slope = quick_jit(jax.value_and_grad(total))(outputs.log_probs)
    assert np.isfinite(value) and np.isfinite(slope).all()
    bound = np.exp(sign * 20.0)
    np.testing.assert_allclose(ratio(outputs, batch), bound, rtol=1e-5)


def test_truncated_and_masked_weights():
  ratios = np.array([0.1, 0.5, 1.0, 2.0, 3.0])
  np.testing.assert_array_equal(
    est.truncate(2.0)(ratios), [0.1, 0.5, 1.0, 2.0, 2.0]
  )
  np.testing.assert_array_equal(
    est.mask_outside(0.5, 2.0)(ratios), [0.0, 0.5, 1.0, 2.0, 0.0]
  )


@pytest.mark.parametrize('ratio', [None, est.sampler_trajectory_ratio])
def test_a_corrected_loss_is_weighted_without_a_gradient_of_the_weight(ratio):
  """Also where the weight is that of the trained policy itself."""
  rollouts, outputs = random_rollouts(0)
  sampler = rollouts.log_probs + np.random.default_rng(1).normal(
    0.0, 0.5, rollouts.mask.shape
  )
  rollouts = rollouts.replace(sampler_log_probs=sampler)
  options = () if ratio is None else (ratio,)
  corrected = est.correct_sampler(
    est.score_function(), est.truncate(1.2), *options
  )
  gradients = []
  for loss in (est.score_function(), corrected):
    estimator = est.estimator(est.identity(), loss, est.sequence_sum())
    gradients.append(evaluate(estimator, rollouts, outputs)[1].log_probs)
  kept = rollouts.mask & rollouts.valid
  log_weight = np.where(kept, rollouts.log_probs - sampler, 0.0)
  if ratio is not None:
    total = log_weight.sum(axis=2, keepdims=True)
    log_weight = np.broadcast_to(total, log_weight.shape)
  weight = np.minimum(np.exp(log_weight), 1.2)
  np.testing.assert_allclose(
    gradients[1], weight * gradients[0], rtol=1e-10, atol=1e-14
  )
  assert (weight[kept] == 1.2).any() and (weight[kept] < 1).any()
  kl = est.correct_sampler(est.kl_penalty(0.1), est.truncate())
  assert kl.needs == est.Needs(reference=True)


def test_the_weight_of_a_changing_policy_has_no_gradient():
  rollouts, outputs = random_rollouts(0)
  loss = est.correct_sampler(
    est.score_function(), lambda ratio: ratio, est.token_ratio
  )
  estimator = est.estimator(est.ones(), loss, est.sequence_sum())
  got = evaluate(estimator, rollouts, outputs)[1].log_probs
  kept = rollouts.mask & rollouts.valid
  ratio = np.exp(np.where(kept, outputs.log_probs - rollouts.log_probs, 0.0))
  expected = np.where(kept, -ratio / rollouts.valid.sum(), 0.0)
  np.testing.assert_allclose(got, expected, rtol=1e-10)
