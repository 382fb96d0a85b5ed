"""Composition: merged needs, refusals that name what is missing, plain sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import changed, random_rollouts, with_branch_rows

from jaxrl_llm import estimators as est

identity = lambda advantages, rollouts: advantages


def needing(**needs):
  transform = est.AdvantageTransform(identity, est.Needs(**needs))
  return est.estimator(transform, est.score_function(), est.sequence_sum())


def test_branch_rows_are_refused_where_none_are_needed():
  rollouts, _ = random_rollouts(0)
  with pytest.raises(ValueError, match='take for responses'):
    est.rloo().prepare(with_branch_rows(rollouts))


def test_branch_rows_train_what_they_added_and_do_not_count():
  """Row 2 keeps two tokens of row 1: its own are four, N is three."""
  rollouts, _ = random_rollouts(0, samples=4, invalid=False)
  size = rollouts.mask.shape
  column = lambda *x: np.broadcast_to(
    np.array(x)[None, :, None], (*size[:2], 1)
  )
  rollouts = rollouts.replace(
    mask=np.ones(size, bool),
    parents=column(0, 1, 1, 3),
    forked_at=column(0, 0, 2, 0),
  )
  rule = est.Branches(1, 1, est.positions.fixed(2), trained=True)
  batch = needing(branches=rule).prepare(rollouts)
  expected = np.ones(size, bool)
  expected[:, 2, :2] = False
  np.testing.assert_array_equal(batch.mask, expected)
  np.testing.assert_array_equal(batch.whole, column(True, True, False, True))
  # Behind the fork row 1 and its branch share a weight.
  shares = expected.astype(float)
  shares[:, 1:3, 2:] = 1 / 2
  np.testing.assert_allclose(batch.weights, shares / (3 * size[0]), rtol=1e-6)
  part = changed(batch, lambda x: x[:1])
  weighed = needing(branches=rule).reweight(part)
  np.testing.assert_allclose(weighed.weights, shares[:1] / 3, rtol=1e-6)


def test_needs_of_all_parts_are_merged():
  estimator = est.estimator(
    est.subtract_group_mean(),
    est.add(est.clipped(0.2), est.kl_penalty(0.1)),
    est.sequence_sum(),
  )
  assert estimator.needs == est.Needs(samples=2, reference=True)
  three, five = est.Needs(samples=3), est.Needs(samples=5, branches='a')
  assert est.merge_needs(three, five) == five
  assert est.merge_needs() == est.Needs()
  with pytest.raises(ValueError, match='branches of their own'):
    est.merge_needs(five, est.Needs(branches='b'))


@pytest.mark.parametrize(
  'fields',
  [
    dict(rewards=np.zeros((3, 4))),
    dict(rewards=np.zeros((3, 4, 5))),
    dict(mask=np.ones((3, 4, 1), bool)),
    dict(valid=np.ones((3, 1, 1), bool)),
    dict(greedy_rewards=np.zeros((3, 1))),
    dict(ref_log_probs=np.zeros((3, 4, 1))),
    dict(values=np.zeros((3, 1, 5))),
  ],
)
def test_wrong_shapes_are_refused_not_broadcast(fields):
  rollouts, _ = random_rollouts(0)
  [name] = fields
  with pytest.raises(ValueError, match=f'`{name}` in the rollouts is'):
    est.reinforce().prepare(rollouts.replace(**fields))


def test_parts_that_do_not_fit_are_refused():
  loss, weights = est.score_function(), est.sequence_sum()
  with pytest.raises(ValueError, match='begin with `at_last_token'):
    est.estimator(est.reward_to_go(), loss, weights)
  with pytest.raises(ValueError, match='go together'):
    est.estimator(est.identity(), est.value_error(0.5), weights)
  target = est.chain(est.at_last_token(), est.lambda_return(1.0, 1.0))
  with pytest.raises(ValueError, match='go together'):
    est.estimator(est.identity(), loss, weights, value_target=target)


@pytest.mark.parametrize(
  'name', ['grpo', 'rloo', 'dr_grpo', 'opo', 'reinforce']
)
def test_a_nan_reward_stays_in_sight(name):
  rollouts, _ = random_rollouts(0, invalid=False)
  rewards = rollouts.rewards.copy()
  rewards[1, 2] = np.nan
  recipe = est.dr_grpo(5) if name == 'dr_grpo' else getattr(est, name)()
  batch = recipe.prepare(rollouts.replace(rewards=rewards))
  assert np.isnan(batch.advantages[1]).any()
  assert np.isfinite(batch.advantages[0]).all()


def test_prepare_stops_every_gradient():
  rollouts, outputs = random_rollouts(0, invalid=False)
  clean = np.where(rollouts.mask, rollouts.log_probs, 0.0)
  ref = np.where(rollouts.mask, rollouts.ref_log_probs, 0.0)
  new = jnp.where(rollouts.mask, outputs.log_probs, 0.0)

  def loss(log_probs, ref_log_probs, rewards):
    estimator = est.rloo(kl=0.2)
    batch = estimator.prepare(
      rollouts.replace(
        log_probs=log_probs, ref_log_probs=ref_log_probs, rewards=rewards
      )
    )
    return estimator.loss(est.Outputs(log_probs=new), batch)

  arguments = [jnp.asarray(x) for x in (clean, ref, rollouts.rewards)]
  assert abs(loss(*arguments)) > 0.01
  for gradient in jax.grad(loss, (0, 1, 2))(*arguments):
    np.testing.assert_array_equal(gradient, 0.0)


def test_rewards_keep_their_fractions():
  """No array takes its type from the integer tokens."""
  rollouts, _ = random_rollouts(0, samples=2, invalid=False)
  rewards = np.full(rollouts.rewards.shape, 0.25, np.float32)
  batch = est.reinforce().prepare(rollouts.replace(rewards=rewards))
  np.testing.assert_array_equal(batch.advantages, 0.25)


def test_weigh_follows_the_rows_of_a_minibatch():
  """The weights of a part are those of a batch that is nothing but the part."""
  rollouts, _ = random_rollouts(0, prompts=4)
  part = lambda x: changed(x, lambda a: a[1:3])
  for estimator in (est.grpo(), est.sft()):
    weighed = estimator.reweight(part(estimator.prepare(rollouts)))
    alone = estimator.prepare(part(rollouts))
    np.testing.assert_array_equal(weighed.weights, alone.weights)
    np.testing.assert_array_equal(weighed.advantages, alone.advantages)
