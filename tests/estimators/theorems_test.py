"""The theorems behind the estimators, on languages whose responses are listed.

He et al., `Response-Level Rewards Are All You Need
<https://arxiv.org/abs/2506.02553>`_, 2025.  The oracle of the token rewards'
problem never sees the reward of a response: it is Bellman's equation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import TOY, assert_unbiased, close, compose

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')

enumeration = est.enumeration


@functools.partial(jax.jit, static_argnums=0)
def _bellman(prefixes, params, token_rewards, gamma):
  def value(rows, prefix=()):
    if prefix not in prefixes:
      return 0.0
    row, total = prefixes.index(prefix), 0.0
    p = jax.nn.softmax(rows[row])
    for token in range(rows.shape[1]):
      later = value(rows, (*prefix, token))
      total += p[token] * (token_rewards[row, token] + gamma * later)
    return total

  return jax.grad(value)(params)


def bellman_gradient(toy, gamma):
  """∇ of the value of the empty prefix under token rewards and γ."""
  found = _bellman(toy.prefixes, toy.params[0], toy.token_rewards[0], gamma)
  return np.asarray(found)[None]


# They see the response's reward alone: one sum of hidden token rewards.
BY_RESPONSE = {
  'reinforce': est.reinforce(),
  'rloo': est.rloo(),
  'remax': est.remax(),
  'trepo': est.trepo(2, 1, est.positions.fixed(1)),
}


@pytest.mark.parametrize('name', BY_RESPONSE)
def test_theorem_1(name):
  """Response rewards model any token rewards that add up to them, any γ."""
  for seed in (0, 1, 2):
    gamma = np.random.default_rng(seed).uniform(0.3, 0.95)
    toy = enumeration.toy(seed, gamma=gamma)
    exact = bellman_gradient(toy, gamma)
    close(enumeration.exact_gradient(toy), exact)
    report = enumeration.examine(BY_RESPONSE[name], toy, exact=exact)
    assert report.exact
    close(report.gradient, exact)
    # The same rewards taken as if undiscounted are another problem.
    wrong = enumeration.discounted(toy, toy.token_rewards, 1.0)
    wrong = enumeration.exact_gradient(toy._replace(rewards=wrong))
    assert np.abs(wrong - exact).max() > 0.01


def outer_discount(gamma):
  """Lemma 1's γ^{t−1} in front of a token's discounted reward to go."""

  def apply(advantages, rollouts):
    powers = gamma ** jnp.arange(rollouts.mask.shape[2])
    return advantages * powers[None, None]

  return est.AdvantageTransform(apply)


def test_lemma_1_token_rewards_give_the_same_gradient():
  gamma = 0.7
  toy = enumeration.toy(3, gamma=gamma)
  exact = enumeration.exact_gradient(toy)
  tokens_alone = toy._replace(rewards=np.zeros_like(toy.rewards))
  to_go = est.at_last_token(), est.add_token_rewards(), est.reward_to_go(gamma)
  lemma = compose(*to_go, outer_discount(gamma))
  got = enumeration.examine(lemma, tokens_alone, 1, exact=exact)
  close(got.gradient, exact)
  # The usual form, without the outer factor, is another problem's.
  usual = enumeration.examine(compose(*to_go), tokens_alone, 1, exact=exact)
  assert usual.cosine < 0.999


def test_lemma_2():
  """A baseline that knows only the prefix before a token has no gradient."""

  def apply(advantages, rollouts):
    return rollouts.values

  of_prefix = compose(est.AdvantageTransform(apply, est.Needs(critic=True)))
  got = enumeration.expected_gradient(of_prefix, TOY, 1)
  close(got, 0.0)
  # One that knows the token has.
  after = lambda advantages, rollouts: jnp.roll(rollouts.values, -1, axis=2)
  of_token = compose(est.AdvantageTransform(after, est.Needs(critic=True)))
  assert np.abs(enumeration.expected_gradient(of_token, TOY, 1)).max() > 0.01


def test_corollary_gamma_has_to_be_one():
  """With the reward on the last token, γ < 1 is another objective.

  It is E[γ^{T−1} RM] with Lemma 1's outer factor, and none without.
  """
  gamma = 0.6
  discounted = est.at_last_token(), est.reward_to_go(gamma)
  lengths = TOY.mask.sum(axis=1)
  short = TOY._replace(rewards=TOY.rewards * gamma ** (lengths - 1))
  lemma = enumeration.examine(
    compose(*discounted, outer_discount(gamma)), TOY, 1
  )
  close(lemma.gradient, enumeration.exact_gradient(short))
  assert lemma.bias > 0.1 and lemma.cosine < 0.99
  usual = enumeration.examine(compose(*discounted), TOY, 1)
  assert usual.bias > 0.1 and usual.cosine < 0.99
  exact_critic = TOY._replace(values=enumeration.exact_values(TOY))
  with_critic = compose(est.at_last_token(), est.gae(gamma, 1.0, est.critic()))
  report = enumeration.examine(with_critic, exact_critic, 1)
  assert report.bias > 0.1 and report.cosine < 0.999
  # Equal rewards and γ < 1: the shorter, the better.
  equal = TOY._replace(rewards=np.ones_like(TOY.rewards))
  push = enumeration.expected_gradient(
    compose(*discounted, outer_discount(gamma)), equal, 1
  )
  lengths_gradient = enumeration.exact_gradient(
    TOY._replace(rewards=lengths[None].astype(float))
  )
  assert (push * lengths_gradient).sum() < -0.01


def test_theorem_2():
  """U_t − U_{t−1} is unbiased: by an exact critic, for any λ."""
  by_critic = {
    lam: compose(est.at_last_token(), est.gae(1.0, lam, est.critic()))
    for lam in (0.0, 0.5)
  }
  toys = [enumeration.toy(seed) for seed in (0, 1, 2)]
  toys = [x._replace(values=enumeration.exact_values(x)) for x in toys]
  for toy in toys:
    for estimator in by_critic.values():
      assert_unbiased(estimator, toy, 1)
    reinforce = enumeration.examine(BY_RESPONSE['reinforce'], toy, 1)
    best = enumeration.examine(by_critic[0.0], toy, 1)
    assert best.variance < 0.6 * reinforce.variance


def exact_advantages(toy):
  """[P, N, T], what the estimator of Theorem 2 gives each token."""
  toy = toy._replace(values=enumeration.exact_values(toy))
  transform = est.chain(est.at_last_token(), est.gae(1.0, 0.0, est.critic()))
  shape = toy.rewards.shape + toy.mask.shape[1:]
  rollouts = est.Rollouts(
    tokens=np.broadcast_to(toy.tokens, shape),
    mask=np.broadcast_to(toy.mask, shape),
    log_probs=np.zeros(shape),
    rewards=toy.rewards[..., None],
    values=toy.values[:, toy.states],
  )
  return np.asarray(jax.jit(transform.apply)(rollouts.rewards, rollouts))


def test_advantages_are_martingale_differences():
  """They telescope, are uncorrelated, and split the reward's variance."""
  toy = enumeration.toy(4, words=2, max_length=4, prompts=2)
  advantages = exact_advantages(toy)
  p = enumeration.response_probabilities(toy)
  start = (p * toy.rewards).sum(axis=1, keepdims=True)
  close(advantages.sum(axis=2), toy.rewards - start)
  products = np.einsum('pn,pns,pnt->pst', p, advantages, advantages)
  squares = np.einsum('ptt->pt', products)
  off_diagonal = products - np.eye(4) * squares[:, None]
  close(off_diagonal, 0.0)
  variance = (p * (toy.rewards - start) ** 2).sum(axis=1)
  close(squares.sum(axis=1), variance)
  assert squares.min() > 0.001
  # Given the prefix before a token, its advantage has mean zero.
  for state in range(len(toy.prefixes)):
    at = (toy.states == state) & toy.mask
    mean = (p[..., None] * advantages * at).sum(axis=(1, 2))
    np.testing.assert_allclose(mean, 0.0, atol=1e-12)
