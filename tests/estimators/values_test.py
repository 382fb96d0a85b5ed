"""Sources of values: what branches earn, by hand and by enumeration."""

import numpy as np
import pytest
from listed import LONG, TOY, assert_unbiased, close, compose, penalized
from selection import mostly_slow

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')

enumeration, positions = est.enumeration, est.positions
KL = 1.0


def branch_rows():
  """One prompt, four branches of up to three tokens; one is not valid."""
  lengths = np.array([3, 2, 3, 0])
  mask = np.arange(3)[None] < lengths[:, None]
  numbers = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, np.nan], [1, 1, 1], [0] * 3])
  return est.Rollouts(
    tokens=np.zeros((1, 4, 3), np.int32),
    mask=mask[None],
    log_probs=numbers[None],
    rewards=np.array([10.0, 20.0, np.nan, np.nan])[None, :, None],
    valid=np.array([True, True, False, False])[None, :, None],
    ref_log_probs=np.zeros((1, 4, 3)),
    token_rewards=100 * numbers[None],
  )


@pytest.mark.parametrize(
  'shaping, expected',
  [
    (None, (10, 20)),
    (est.at_last_token(), (10, 20)),
    (est.penalize_overlong(3, 2), (9, 19.5)),
    (est.subtract_response_kl(0.5), (10 - 3.5, 20 - 12)),
    # Only tokens behind the fork count: two of the first, one of the second.
    (
      est.chain(est.at_last_token(), est.subtract_token_kl(0.5)),
      (10 - 3, 20 - 8),
    ),
    (
      est.chain(est.at_last_token(), est.add_token_rewards()),
      (10 + 600, 20 + 1600),
    ),
  ],
)
def test_what_branches_earn(shaping, expected):
  rows, forked_at = branch_rows(), np.full((1, 4, 1), 1)
  got = est.branch_returns(shaping, rows.rewards, rows, forked_at)
  np.testing.assert_allclose(got[0, :, 0], [*expected, 0, 0])


def trepo(rule, *shaping, count=2, samples=1):
  """`trepo` with a reward of several parts."""
  values = est.branches(count, samples, rule)
  return compose(*shaping, est.gae(1.0, 0.0, values), loss=est.clipped(0.2))


def forking(estimator, **changes):
  """Other branches for an estimator whose program does not depend on them."""
  branches = estimator.needs.branches._replace(**changes)
  return estimator._replace(needs=estimator.needs._replace(branches=branches))


TOKEN_REWARDS = np.random.default_rng(5).normal(size=LONG.params.shape)
ANY_RULE = positions.fixed(1)
# name: (estimator, the gradient it ought to have)
SHAPED = {
  'overlong': (
    trepo(ANY_RULE, est.penalize_overlong(4, 3), est.at_last_token()),
    enumeration.exact_gradient(penalized(LONG, 4, 3)),
  ),
  'response KL': (
    trepo(ANY_RULE, est.subtract_response_kl(KL), est.at_last_token()),
    enumeration.exact_gradient(LONG, kl=KL),
  ),
  'token KL, steered': (
    trepo(
      ANY_RULE,
      est.at_last_token(),
      est.subtract_token_kl(est.adaptive_kl(KL, 1.0, 100)),
    ),
    enumeration.exact_gradient(LONG, kl=KL),
  ),
}
RULES = {
  'fixed': dict(positions=positions.fixed(1, 3)),
  'uniform': dict(positions=positions.uniform(), count=1, samples=2),
  'delimiter': dict(positions=positions.delimiter(0)),
  'entropy': dict(positions=positions.entropy_above(0.65)),
}


@pytest.mark.parametrize('rule', mostly_slow(RULES, 'uniform', 'entropy'))
@pytest.mark.parametrize('name', SHAPED)
def test_a_shaped_reward_stays_unbiased_and_branches_alone_do_not(name, rule):
  estimator, exact = SHAPED[name]
  estimator = forking(estimator, **RULES[rule])
  assert_unbiased(estimator, LONG, exact=exact)
  unshaped = forking(estimator, shaping=None)
  assert enumeration.examine(unshaped, LONG, exact=exact).bias > 0.01


def test_token_rewards_are_a_part_of_what_branches_earn():
  toy = LONG._replace(token_rewards=TOKEN_REWARDS)
  both = toy.rewards + enumeration.discounted(toy, TOKEN_REWARDS)
  exact = enumeration.exact_gradient(toy._replace(rewards=both))
  estimator = trepo(
    positions.fixed(1, 3), est.at_last_token(), est.add_token_rewards()
  )
  assert_unbiased(estimator, toy, exact=exact)


PARTLY = est.gae(1.0, 0.6, est.branches_with_critic(1, 1, positions.fixed(1)))
# name: (estimator, toy, options of `examine`)
ANY_CRITIC = {
  'fixed': (est.trepo_critic(2, 1, positions.fixed(1, 2)), TOY, {}),
  'λ between 0 and 1': (compose(est.at_last_token(), PARTLY), TOY, {}),
  'uniform, with KL': (
    est.trepo_critic(1, 2, positions.uniform(), kl=KL),
    LONG,
    dict(exact=enumeration.exact_gradient(LONG, kl=KL)),
  ),
}


@pytest.mark.parametrize('name', ANY_CRITIC)
def test_a_critic_behind_branches_biases_nothing(name):
  """Its values are random; one response per prompt is enough."""
  estimator, toy, options = ANY_CRITIC[name]
  report = assert_unbiased(estimator, toy, samples=1, **options)
  better = toy._replace(values=enumeration.exact_values(toy))
  if not options:
    found = enumeration.examine(estimator, better, samples=1)
    assert found.variance < report.variance


def test_what_the_critic_is_fitted_to_has_the_values_as_its_mean():
  """E[target · f(state)] = E[U · f(state)], with ∇H of the state for f."""
  values = est.branches_with_critic(2, 2, positions.fixed(1, 3))
  targets = est.chain(est.at_last_token(), est.monte_carlo_return(values))
  bootstrapped = est.chain(est.at_last_token(), est.lambda_return(1.0, 0.0))

  def weighing(field, target):
    loss = est.TokenLoss(
      lambda outputs, batch: -batch[field] * outputs.entropy,
      est.Needs(critic=True),
    )
    return compose(loss=loss, value_target=target)

  mean = lambda field, target, toy: enumeration.expected_gradient(
    weighing(field, target), toy, samples=1
  )
  exact = LONG._replace(values=enumeration.exact_values(LONG))
  expected = mean('values', targets, exact)
  close(mean('value_targets', targets, LONG), expected)
  off = mean('value_targets', bootstrapped, LONG) - expected
  assert np.abs(off).max() > 0.01
