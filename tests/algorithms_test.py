"""Each recipe against its formula as nested loops over plain numbers."""

import math

import jax
import numpy as np
import pytest
from toys import random_rollouts

from jaxrl_llm import estimators as est

CLIP, KL, MAX_LENGTH, EPSILON = 0.15, 0.07, 11, 1e-6


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def reward(rewards, i):
  return rewards[i]


def one(rewards, i):
  return 1.0


def against_mean(rewards, i):
  return rewards[i] - sum(rewards) / len(rewards)


def against_others(rewards, i):
  others = [r for j, r in enumerate(rewards) if j != i]
  return rewards[i] - sum(others) / len(others) if others else 0.0


def in_deviations(rewards, i):
  if len(rewards) < 2:
    return 0.0
  mean = sum(rewards) / len(rewards)
  squares = sum((r - mean) ** 2 for r in rewards)
  deviation = math.sqrt(squares / (len(rewards) - 1))
  return (rewards[i] - mean) / (deviation + EPSILON)


def log_likelihood(advantage, new, old, ref):
  """Value and slope, in the new log-probability, of a token's loss."""
  return -advantage * new, -advantage


def surrogate(advantage, new, old, ref):
  ratio = math.exp(new - old)
  inside = min(max(ratio, 1 - CLIP), 1 + CLIP)
  if ratio * advantage <= inside * advantage:
    return -ratio * advantage, -ratio * advantage
  return -inside * advantage, 0.0


def surrogate_with_k3(advantage, new, old, ref):
  value, slope = surrogate(advantage, new, old, ref)
  quotient = math.exp(ref - new)
  value += KL * (quotient - 1 - (ref - new))
  return value, slope + KL * (1 - quotient)


per_response = lambda count, length, total: 1 / count
per_token_of_response = lambda count, length, total: 1 / (count * length)
per_constant = lambda count, length, total: 1 / (count * MAX_LENGTH)
per_token = lambda count, length, total: 1 / total

# name → recipe, β inside the reward, advantage, token loss, weight.
FORMULAS = {
  'reinforce': (est.reinforce(), 0.0, reward, log_likelihood, per_response),
  'rloo': (est.rloo(), 0.0, against_others, log_likelihood, per_response),
  'rloo with KL': (
    est.rloo(kl=KL),
    KL,
    against_others,
    log_likelihood,
    per_response,
  ),
  'grpo': (
    est.grpo(clip=CLIP, kl=KL),
    0.0,
    in_deviations,
    surrogate_with_k3,
    per_token_of_response,
  ),
  'grpo without KL': (
    est.grpo(clip=CLIP, kl=0.0),
    0.0,
    in_deviations,
    surrogate,
    per_token_of_response,
  ),
  'dr_grpo': (
    est.dr_grpo(MAX_LENGTH, clip=CLIP),
    0.0,
    against_mean,
    surrogate,
    per_constant,
  ),
  'sft': (est.sft(), 0.0, one, log_likelihood, per_token),
}


def loops(rollouts, outputs, beta, advantage_of, token_loss, weight_of):
  """The formula: (loss, its gradient in the new log-probabilities)."""
  prompts, samples, length = rollouts.mask.shape
  valid = rollouts.valid
  if valid is None:
    valid = np.ones((prompts, samples, 1), bool)
  lengths = rollouts.mask.sum(axis=2)
  count = int(valid.sum())
  total = int((lengths * valid[..., 0]).sum())
  loss, gradient = 0.0, np.zeros((prompts, samples, length))
  for p in range(prompts):
    members = [g for g in range(samples) if valid[p, g, 0]]
    rewards = []
    for g in members:
      kl = 0.0
      for t in range(lengths[p, g]):
        kl += rollouts.log_probs[p, g, t] - rollouts.ref_log_probs[p, g, t]
      rewards.append(rollouts.rewards[p, g, 0] - (beta * kl if beta else 0.0))
    for i, g in enumerate(members):
      advantage = advantage_of(rewards, i)
      for t in range(lengths[p, g]):
        value, slope = token_loss(
          advantage,
          outputs.log_probs[p, g, t],
          rollouts.log_probs[p, g, t],
          rollouts.ref_log_probs[p, g, t],
        )
        weight = weight_of(count, lengths[p, g], total)
        loss += weight * value
        gradient[p, g, t] = weight * slope
  return loss, gradient


@pytest.mark.parametrize('invalid', [False, True])
@pytest.mark.parametrize('name', FORMULAS)
def test_recipe_is_its_formula(name, invalid):
  estimator, *formula = FORMULAS[name]
  prepare = jax.jit(estimator.prepare)
  differentiate = jax.jit(jax.value_and_grad(estimator.loss))
  for seed in range(3):
    rollouts, outputs = random_rollouts(seed, invalid=invalid)
    batch = prepare(rollouts)
    loss, gradient = differentiate(outputs, batch)
    expected, expected_gradient = loops(rollouts, outputs, *formula)
    assert loss.dtype == np.float64
    assert np.abs(expected_gradient).max() > 1e-3
    np.testing.assert_allclose(loss, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
      gradient.log_probs, expected_gradient, rtol=1e-10, atol=1e-12
    )


def test_recipe_does_not_ask_for_what_it_does_not_use():
  assert not est.rloo().needs.reference
  assert not est.grpo(kl=0.0).needs.reference
  assert est.rloo(kl=0.1).needs.reference
  assert est.grpo().needs.reference
  assert est.reinforce().needs == est.Needs()


def test_dr_grpo_advantage_is_rloo_scaled():
  rollouts, _ = random_rollouts(0, samples=5, invalid=False)
  mean = est.dr_grpo(7).prepare(rollouts).advantages
  others = est.rloo().prepare(rollouts).advantages
  np.testing.assert_allclose(mean, 4 / 5 * others, rtol=1e-12)


def test_clipped_surrogate_is_the_score_function_on_policy():
  rollouts, outputs = random_rollouts(0)
  outputs = outputs.replace(log_probs=rollouts.log_probs)
  gradients = []
  for loss in (est.clipped(0.2), est.score_function()):
    estimator = est.estimator(
      est.subtract_group_mean(), loss, est.sequence_sum()
    )
    batch = estimator.prepare(rollouts)
    gradients.append(jax.grad(estimator.loss)(outputs, batch).log_probs)
  np.testing.assert_allclose(*gradients, rtol=1e-12)
