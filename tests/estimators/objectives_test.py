"""What those estimators climb whose objective is not E[R] alone.

Likelihoods, preferences, penalties and bonuses in the loss, RL-ZVP's entropy:
each expected gradient against its formula, summed over a listed language.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import (
  BINARY,
  TOY,
  TWO_BINARY,
  assert_unbiased,
  close,
  compose,
  counts,
  success,
)

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')

enumeration = est.enumeration


def differentiate(objective, toy=TOY):
  """∇ of rows of log-probabilities, [P, S, V], → scalar."""
  of_params = lambda x: objective(jax.nn.log_softmax(x, axis=-1))
  return np.asarray(jax.jit(jax.grad(of_params))(jnp.asarray(toy.params)))


def response_log_probs(rows, toy=TOY):
  """[P, N]."""
  of_tokens = rows[:, toy.states, toy.tokens]
  return jnp.where(toy.mask[None], of_tokens, 0.0).sum(axis=2)


def test_entropy_for_groups_without_variance():
  """RL-ZVP is GRPO, and for equal rewards the published term."""
  alpha, samples = 0.4, 2
  gradient = lambda alpha: enumeration.expected_gradient(
    est.rl_zvp(entropy=alpha), TOY, samples
  )
  rows = np.asarray(jax.nn.log_softmax(jnp.asarray(TOY.params), axis=-1))[0]
  entropy = -(np.exp(rows) * rows).sum(axis=-1)[TOY.states]
  advantages = np.zeros(TOY.mask.shape)
  assert len(set(TOY.rewards[0])) == len(TOY.responses)
  # Rewards differ, so a group is equal if it is one response drawn twice.
  for n, p in enumerate(enumeration.response_probabilities(TOY)[0]):
    length = TOY.mask[n].sum()
    highest = entropy[n, :length].max()
    for t in range(length):
      advantage = alpha * entropy[n, t]
      if TOY.rewards[0, n] <= 0.5:
        advantage = -alpha * (highest - entropy[n, t])
      advantages[n, t] = p**samples * advantage / length
  of_tokens = lambda rows: rows[0, TOY.states, TOY.tokens]
  added = differentiate(lambda rows: (advantages * of_tokens(rows)).sum())
  close(gradient(alpha) - gradient(0.0), added)
  assert np.abs(added).max() > 0.001


def test_likelihood_of_whatever_was_sampled():
  """SFT sees no reward; on policy, its sum over tokens has no gradient."""
  assert np.abs(
    enumeration.expected_gradient(compose(est.ones()), TOY)
  ).max() < (1e-12)
  one = enumeration.expected_gradient(est.sft(), TOY)
  close(one, enumeration.expected_gradient(est.sft(), BINARY))
  assert np.abs(one).max() > 0.01


def test_rest_em_climbs_the_log_probability_of_success():
  """Each prompt its own, by its expected share of what is kept."""

  def log_success(toy):
    right = toy.rewards > 0.5
    return differentiate(
      lambda rows: jnp.log(
        (jnp.exp(response_log_probs(rows, toy)) * right).sum(axis=1)
      ).sum(),
      toy,
    )

  for toy, samples in ((BINARY, 3), (TWO_BINARY, 2)):
    report = enumeration.examine(est.rest_em(), toy, samples)
    options = [counts(samples, p).items() for p in success(toy)]
    shares = np.zeros(len(options))
    for picked in itertools.product(*options):
      kept = np.array([k for k, _ in picked])
      chance = math.prod(chance for _, chance in picked)
      shares += chance * kept / max(kept.sum(), 1)
    expected = shares[:, None, None] * log_success(toy)
    close(report.gradient, expected)
    if len(options) == 1:
      assert report.cosine == pytest.approx(1.0, abs=1e-12)
      assert shares[0] == pytest.approx(1 - (1 - success(toy)[0]) ** samples)


@pytest.mark.parametrize('name', ['dpo', 'dpop', 'ipo'])
def test_preference_losses_as_pairs(name):
  """The mean over pairs of different rewards, drawn from the policy."""
  beta, floor = 0.5, 2.0
  estimator = {
    'dpo': est.dpo(beta),
    'dpop': est.dpop(beta, floor),
    'ipo': est.ipo(beta),
  }[name]
  p = enumeration.response_probabilities(TOY)[0]
  pairs = itertools.permutations(range(len(p)), 2)
  rewards = TOY.rewards[0]
  good, bad = np.array([x for x in pairs if rewards[x[0]] > rewards[x[1]]]).T
  chance = 2 * p[good] * p[bad]
  reference = response_log_probs(jax.nn.log_softmax(jnp.asarray(TOY.reference)))

  def loss(rows):
    ratio = (response_log_probs(rows) - reference)[0]
    margin = ratio[good] - ratio[bad]
    if name == 'dpop':
      margin = margin - floor * jnp.maximum(0.0, -ratio[good])
    of_pairs = jnp.log(1 + jnp.exp(-beta * margin))
    if name == 'ipo':
      of_pairs = (margin - 1 / (2 * beta)) ** 2
    return (chance * of_pairs).sum()

  got = enumeration.expected_gradient(estimator, TOY, 2)
  close(got, -differentiate(loss))
  assert np.abs(got).max() > 0.01


def visits(toy=TOY):
  """[P, S], how often each state is met in one response."""
  found = np.zeros(toy.params.shape[:2])
  for i, p in enumerate(enumeration.response_probabilities(toy)):
    for n, response in enumerate(toy.responses):
      for t in range(len(response)):
        found[i, toy.prefixes.index(response[:t])] += p[n]
  return found


def blind_gradient(of_rows):
  """∇ of the sum over states met of f(row): blind to which are met."""
  often = visits()
  return differentiate(lambda rows: (often * of_rows(rows)).sum())


def test_entropy_bonus_and_value_error():
  entropy = lambda rows: -(jnp.exp(rows) * rows).sum(axis=-1)
  got = enumeration.expected_gradient(compose(loss=est.entropy_bonus(0.4)), TOY)
  close(got, 0.4 * blind_gradient(entropy))
  critic = est.add(est.score_function(), est.value_error(0.5, 0.2))
  target = est.chain(est.at_last_token(), est.lambda_return(1.0, 1.0))
  assert_unbiased(compose(loss=critic, value_target=target), TOY, 1)


def test_divergences_in_the_loss():
  """k1 has no gradient, k2 that of KL(π‖π_ref), k3 that of KL(π_ref‖π)."""
  ref = jax.nn.log_softmax(jnp.asarray(TOY.reference))
  forward = lambda rows: (jnp.exp(rows) * (rows - ref)).sum(axis=-1)
  reverse = lambda rows: (jnp.exp(ref) * (ref - rows)).sum(axis=-1)
  with pytest.raises(ValueError, match='k1'):
    est.kl_penalty(0.1, est.k1)
  k1 = est.TokenLoss(
    lambda outputs, batch: est.k1(outputs.log_probs, batch.ref_log_probs)
  )
  got = lambda loss: -enumeration.expected_gradient(compose(loss=loss), TOY, 1)
  close(got(k1), 0.0)
  k2, k3 = got(est.kl_penalty(1.0, est.k2)), got(est.kl_penalty(1.0, est.k3))
  close(k2, blind_gradient(forward))
  close(k3, blind_gradient(reverse))
  # Neither is the gradient of the whole response's KL.
  whole = enumeration.exact_gradient(TOY) - enumeration.exact_gradient(TOY, 1.0)
  off = lambda x: np.linalg.norm(x - whole) / np.linalg.norm(whole)
  assert 0.05 < off(k2) < off(k3)
  # With a mean over the response, k1 is pressure on its length alone.
  mean = compose(loss=k1, weights=est.sequence_mean())
  assert np.abs(enumeration.expected_gradient(mean, TOY, 1)).max() > 0.01
