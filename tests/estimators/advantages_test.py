"""Shaping, chaining and KL in the reward: values by hand, and refusals."""

import jax.numpy as jnp
import loops
import numpy as np
import pytest
from toys import plain_rollouts

from jaxrl_llm import estimators as est

NAN = float('nan')


def apply(transform, rollouts):
  return loops.apply(transform, rollouts)[..., 0]


def test_chain_applies_in_reading_order():
  double = est.AdvantageTransform(lambda a, r: 2.0 * a, est.Needs(greedy=True))
  square = est.AdvantageTransform(lambda a, r: a * a, est.Needs(samples=3))
  both = est.chain(double, square)
  data = plain_rollouts([[3.0]])
  assert apply(both, data) == 36.0
  assert apply(est.chain(square, double), data) == 18.0
  assert both.needs == est.Needs(samples=3, greedy=True)
  np.testing.assert_array_equal(apply(est.chain(), data), 3.0)


SHAPING = {
  'overlong': est.penalize_overlong(5, 2),
  'response KL': est.subtract_response_kl(0.1),
  'token KL': est.subtract_token_kl(0.1),
  'token rewards': est.add_token_rewards(),
}


@pytest.mark.parametrize('name', SHAPING)
def test_what_stands_before_branches_is_asked_for_them_too(name):
  """All of it, however the chain is nested; where it needs nothing, nothing."""
  credit = est.gae(1.0, 0.0, est.branches(2, 3, est.positions.uniform()))
  shaping = in_place(SHAPING[name])
  whole = est.chain(*shaping)
  for order in (
    est.chain(*shaping, credit, est.whiten()),
    est.chain(whole, credit),
    est.chain(whole, est.chain(credit, est.whiten())),
  ):
    assert order.needs.branches.shaping == whole
    assert order.needs.reference == whole.needs.reference
  nested = est.chain(shaping[0], est.chain(shaping[1], credit))
  assert nested.needs.branches.shaping == whole
  assert hash(nested.needs.branches) == hash(order.needs.branches)
  assert est.chain(credit).needs.branches.shaping is None


KL = (est.subtract_token_kl(0.1),)


def test_branches_that_are_shaped_differently_are_two_things():
  credit = est.gae(1.0, 0.0, est.branches(2, 3, est.positions.uniform()))
  reward = est.at_last_token()
  one, other = (est.chain(reward, *x, credit) for x in ((), KL))
  est.merge_needs(one.needs, est.chain(reward, credit).needs)
  with pytest.raises(ValueError, match='branches of their own'):
    est.merge_needs(one.needs, other.needs)


def in_place(shaping):
  """A shaping transform where its level wants it."""
  if shaping.takes == 'response':
    return shaping, est.at_last_token()
  return est.at_last_token(), shaping


LEAVE_ONE_OUT = est.subtract_leave_one_out_mean()


@pytest.mark.parametrize(
  'transforms',
  [
    (est.subtract_token_kl(0.3), est.at_last_token()),
    (est.at_last_token(), est.subtract_response_kl(0.3)),
    (est.at_last_token(), LEAVE_ONE_OUT),
    (est.at_every_token(), est.reward_to_go()),
    (est.at_last_token(), est.reward_to_go(), est.reward_to_go()),
    (est.reward_to_go(), est.at_last_token()),
    (est.at_last_token(), est.identity(), est.standardize()),
    (est.chain(est.at_last_token(), est.identity()), est.standardize()),
  ],
)
def test_levels_have_to_fit(transforms):
  with pytest.raises(ValueError, match='of the chain takes a number per'):
    est.chain(*transforms)


@pytest.mark.parametrize('values', ['critic', 'branches'])
def test_values_are_of_rewards(values):
  """Against a centred reward they would point away from the gradient."""
  source = {
    'critic': est.critic(),
    'branches': est.branches(2, 3, est.positions.uniform()),
  }[values]
  credit = est.gae(1.0, 0.0, source)
  for first in (est.standardize(), est.chain(LEAVE_ONE_OUT)):
    with pytest.raises(ValueError, match='no longer a reward'):
      est.chain(first, est.at_last_token(), credit)
    with pytest.raises(ValueError, match='no longer a reward'):
      est.chain(first, est.chain(est.at_last_token(), credit))
  est.chain(est.at_last_token(), credit, est.whiten())


@pytest.mark.parametrize(
  'make',
  [
    lambda: est.penalize_overlong(4, 0),
    lambda: est.penalize_overlong(4, 5),
    lambda: est.adaptive_kl(0.0, 1.0, 10),
    lambda: est.adaptive_kl(0.1, 0.0, 10),
    lambda: est.subtract_running_mean(9),
    lambda: est.standardize(-1.0),
    lambda: est.branches(0, 4, est.positions.uniform()),
    lambda: est.branches(4, 0, est.positions.uniform()),
    lambda: est.branches(4, 4, est.positions.uniform),
    lambda: est.gae(1.0, 95.0, est.critic()),
    lambda: est.gae(1.1, 0.5, est.critic()),
    lambda: est.gae(0.9, 0.5, est.branches(4, 4, est.positions.uniform())),
    lambda: est.positions.delimiter('\n'),
    lambda: est.clipped(-0.1),
    lambda: est.clipped(0.2, -0.1),
    lambda: est.clipped_weight(0.2, -0.1),
    lambda: est.mask_outside(2.0, 0.5),
    lambda: est.truncate(0.0),
    lambda: est.constant_length(-3),
    lambda: est.logistic_preference(-1.0),
    lambda: est.squared_preference(0.0),
    lambda: est.kl_penalty(est.adaptive_kl(0.1, 1.0, 10)),
  ],
)
def test_arguments_out_of_range_are_refused(make):
  with pytest.raises(ValueError):
    make()


def test_overlong_penalty():
  """0 up to 5 − 2 tokens, then a ramp to 1 at 5, and no further."""
  data = plain_rollouts([[1.0] * 5], [[0, 3, 4, 5, 2]])
  got = apply(est.penalize_overlong(max_length=5, buffer=2), data)
  np.testing.assert_allclose(got, [[1.0, 1.0, 0.5, 0.0, 1.0]])
  got = apply(est.penalize_overlong(max_length=3, buffer=2), data)
  np.testing.assert_allclose(got, [[1.0, 0.0, 0.0, 0.0, 0.5]])


def with_kl():
  """A response of KL − 0.5, one of 2."""
  log_probs = jnp.array([[[-1.0, -2.0, NAN, NAN, NAN], [-0.5] + [NAN] * 4]])
  reference = jnp.array([[[-1.5, -1.0, NAN, NAN, NAN], [-2.5] + [NAN] * 4]])
  return plain_rollouts(
    [[1.0, 0.0]], [[2, 1]], log_probs=log_probs, ref_log_probs=reference
  )


@pytest.mark.parametrize(
  'target, error',
  [(0.6, 0.2), (0.75 / 1.1, 0.1), (0.75 / 0.95, -0.05), (3.0, -0.2)],
)
def test_adaptive_kl_moves_towards_its_target(target, error):
  """Mean KL 0.75 of 2 responses; the relative error is clipped at 0.2."""
  steered = est.adaptive_kl(0.5, target, horizon=10)
  transform = est.subtract_response_kl(steered)
  running = est.start_running(transform.needs)
  assert float(running['kl_coefficient']) == 0.5
  data = with_kl().replace(running=running)
  got = apply(transform, data)
  np.testing.assert_allclose(got, [[1.0 + 0.5 * 0.5, -0.5 * 2]], rtol=1e-6)
  after = est.update_running(transform.needs, data)['kl_coefficient']
  expected = 0.5 * (1 + 2 / 10 * error)
  assert float(after) == pytest.approx(expected, rel=1e-5)


def test_adaptive_kl_counts_valid_responses_only():
  steered = est.adaptive_kl(0.5, target=1.0, horizon=10)
  needs = est.subtract_token_kl(steered).needs
  data = with_kl().replace(running=est.start_running(needs))
  second = data.replace(valid=jnp.array([[[False], [True]]]))
  after = est.update_running(needs, second)['kl_coefficient']
  assert float(after) == pytest.approx(0.5 * (1 + 1 / 10 * 0.2), rel=1e-5)
  none = data.replace(valid=jnp.zeros((1, 2, 1), bool))
  after = est.update_running(needs, none)['kl_coefficient']
  assert float(after) == 0.5


def test_two_numbers_of_one_name_are_refused():
  parts = [
    est.subtract_response_kl(est.adaptive_kl(0.5, 1.0, 10)),
    est.subtract_response_kl(est.adaptive_kl(0.1, 1.0, 10)),
  ]
  with pytest.raises(ValueError, match='share a name'):
    est.chain(*parts)
  both = est.chain(
    parts[0],
    est.subtract_response_kl(est.adaptive_kl(0.1, 1.0, 10, name='other')),
  )
  assert set(est.start_running(both.needs)) == {'kl_coefficient', 'other'}
