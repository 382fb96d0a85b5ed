"""Sources of values: what branches earn, by hand and by enumeration."""

import jax
import numpy as np
import pytest

from jaxrl_llm import estimators as est

enumeration, positions = est.enumeration, est.positions
LIMIT, KL = 3, 1.0
TOY = enumeration.toy(seed=0, words=2, max_length=LIMIT)
LONG = enumeration.toy(seed=0, words=1, max_length=4)
CLOSE = dict(rtol=0, atol=1e-10)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


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
  return est.estimator(
    est.chain(*shaping, est.gae(1.0, 0.0, values)),
    est.clipped(0.2),
    est.sequence_sum(),
  )


def penalized(toy):
  over = toy.mask.sum(axis=1) - (LIMIT - 2)
  return toy._replace(rewards=toy.rewards - np.clip(over / 2, 0, 1))


TOKEN_REWARDS = np.random.default_rng(5).normal(size=LONG.params.shape)
# name: (shaping, toy → the gradient it ought to have)
SHAPED = {
  'overlong': (
    (est.penalize_overlong(LIMIT, 2), est.at_last_token()),
    lambda toy: enumeration.exact_gradient(penalized(toy)),
  ),
  'response KL': (
    (est.subtract_response_kl(KL), est.at_last_token()),
    lambda toy: enumeration.exact_gradient(toy, kl=KL),
  ),
  'token KL': (
    (
      est.at_last_token(),
      est.subtract_token_kl(est.adaptive_kl(KL, 1.0, 100)),
    ),
    lambda toy: enumeration.exact_gradient(toy, kl=KL),
  ),
}
RULES = {
  'fixed': (positions.fixed(1, 2), TOY, {}),
  'uniform': (positions.uniform(), LONG, dict(count=1, samples=2)),
  'delimiter': (positions.delimiter(1), TOY, {}),
  'entropy': (positions.entropy_above(0.8), TOY, {}),
}


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('name', SHAPED)
def test_a_shaped_reward_stays_unbiased_and_branches_alone_do_not(name, rule):
  shaping, exact = SHAPED[name]
  rule, toy, settings = RULES[rule]
  estimator = trepo(rule, *shaping, **settings)
  report = enumeration.examine(estimator, toy, exact=exact(toy))
  assert report.exact
  np.testing.assert_allclose(report.gradient, report.exact_gradient, **CLOSE)
  branches = estimator.needs.branches._replace(shaping=None)
  unshaped = estimator._replace(
    needs=estimator.needs._replace(branches=branches)
  )
  report = enumeration.examine(unshaped, toy, exact=exact(toy))
  assert report.bias > 0.01


def test_token_rewards_are_a_part_of_what_branches_earn():
  toy = LONG._replace(token_rewards=TOKEN_REWARDS)
  both = toy.rewards + enumeration.discounted(toy, TOKEN_REWARDS)
  exact = enumeration.exact_gradient(toy._replace(rewards=both))
  estimator = trepo(
    positions.fixed(1, 3), est.at_last_token(), est.add_token_rewards()
  )
  report = enumeration.examine(estimator, toy, exact=exact)
  assert report.exact
  np.testing.assert_allclose(report.gradient, report.exact_gradient, **CLOSE)
