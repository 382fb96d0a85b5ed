"""Values of states against known ones, by simulation and by enumeration."""

import numpy as np
import pytest

from jaxrl_llm import audit
from jaxrl_llm import estimators as est
from tests.audit.gradients_test import check_scatter

enumeration = est.enumeration
BRANCHES, STATES, PROMPTS = 24, 6, 40


def simulate(random):
  """Success probabilities of states in clusters, and coin tosses."""
  prompt = random.beta(2.0, 2.0, size=(PROMPTS, 1))
  true = np.clip(prompt + random.normal(0.0, 0.2, (PROMPTS, STATES)), 0, 1)
  clusters = np.repeat(np.arange(PROMPTS), STATES)
  true, prompt = true.ravel(), np.repeat(prompt.ravel(), STATES)
  toss = random.random((len(true), BRANCHES)) < true[:, None]
  return true, prompt, clusters, toss.astype(float)


def population():
  """(E p(1 − p), Var U, E (prompt − U)²), by a large simulation."""
  random = np.random.default_rng(99)
  many = [simulate(random)[:2] for _ in range(4000)]
  true, prompt = np.concatenate(many, axis=1)
  return (
    (true * (1 - true)).mean(),
    true.var(),
    np.square(prompt - true).mean(),
  )


def test_errors_of_values():
  random = np.random.default_rng(0)
  within, between, of_prompt = population()
  total = within + between
  found = []
  for _ in range(200):
    true, prompt, clusters, returns = simulate(random)
    predictions = {
      'exact': true,
      'off by 0.1': true + 0.1 * random.choice([-1, 1], true.shape),
      'prompt': prompt,
    }
    found.append(audit.value_errors(returns, predictions, clusters, (1, 4)))
  expected = {
    'truth': 0.0,
    'mean of 1 branches': within,
    'mean of 4 branches': within / 4,
    'exact': 0.0,
    'off by 0.1': 0.01,
    'prompt': of_prompt,
  }
  assert list(found[0]) == list(expected)
  for name, error in expected.items():
    if name != 'truth':
      check_scatter([one[name].squared_error for one in found], error)
    explained = 1 - (within + error) / total
    check_scatter([one[name].explained for one in found], explained)
  assert found[0]['truth'].squared_error == (0.0, 0.0)


def test_branches_without_a_reward_are_left_out():
  random = np.random.default_rng(2)
  true, prompt, clusters, returns = simulate(random)
  absent = returns.copy()
  absent[:, 1::2] = np.nan
  ours = audit.value_errors(absent, {'prompt': prompt}, clusters, (2,))
  fewer = audit.value_errors(
    returns[:, ::2], {'prompt': prompt}, clusters, (2,)
  )
  for name, value in fewer.items():
    np.testing.assert_allclose(ours[name], value, rtol=1e-12)
  absent[0, 2:] = np.nan
  with pytest.raises(ValueError, match='1 returns'):
    audit.value_errors(absent, {}, clusters)
  with pytest.raises(ValueError, match='1 clusters'):
    audit.value_errors(returns, {}, 0 * clusters)


TOY = enumeration.toy(seed=2, words=2, max_length=4)


def walks(n, seed):
  """Sampled responses with the values along them, [n, 1 + 4], and rewards."""
  random = np.random.default_rng(seed)
  p = enumeration.response_probabilities(TOY)[0]
  chosen = random.choice(len(p), n, p=p)
  values = enumeration.exact_values(TOY)[0]
  mask, states = TOY.mask[chosen], TOY.states[chosen]
  along = np.where(mask, values[states], np.nan)
  return random, chosen, along, TOY.rewards[0, chosen]


def exact_variance():
  p = enumeration.response_probabilities(TOY)[0]
  rewards = TOY.rewards[0]
  return p @ np.square(rewards - p @ rewards)


def test_differences_of_values_split_the_variance():
  random, chosen, along, rewards = walks(6000, seed=3)
  alone = np.arange(len(chosen))
  found = audit.doob(along, 0 * along, rewards, alone)
  true = exact_variance()
  for estimate in (found.squares, found.variance):
    assert abs(estimate.value - true) < 3 * estimate.error
    assert estimate.error < 0.05 * true
  assert abs(found.difference.value) < 3 * found.difference.error
  assert found.difference.error < 0.05 * true
  # At some of the places only, as a rule for positions leaves it.
  along[:, 2] = np.nan
  found = audit.doob(along, 0 * along, rewards, alone)
  assert abs(found.squares.value - true) < 3 * found.squares.error


def test_noise_of_the_values_is_taken_off():
  random, chosen, along, rewards = walks(6000, seed=4)
  noise = np.full(along.shape, 0.3)
  noisy = along + np.sqrt(noise) * random.normal(size=along.shape)
  found = audit.doob(noisy, noise, rewards, np.arange(len(chosen)))
  true = exact_variance()
  for estimate in (found.squares, found.variance):
    assert abs(estimate.value - true) < 3 * estimate.error
  # Not taken off, it shows.
  found = audit.doob(noisy, 0 * noise, rewards, np.arange(len(chosen)))
  assert found.squares.value - true > 10 * found.squares.error


def test_other_values_do_not_split_the_variance():
  random, chosen, along, rewards = walks(6000, seed=5)
  shift = random.normal(size=len(TOY.prefixes))
  wrong = along + np.where(TOY.mask[chosen], shift[TOY.states[chosen]], 0.0)
  wrong[:, 0] = along[:, 0]
  found = audit.doob(wrong, 0 * wrong, rewards, np.arange(len(chosen)))
  assert abs(found.difference.value) > 10 * found.difference.error
