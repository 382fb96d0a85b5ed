"""Baselines: values worked out by hand, rare groups, and refusals."""

import jax.numpy as jnp
import loops
import numpy as np
import pytest
import toys

from jaxrl_llm import estimators as est


def make_rollouts(rewards, valid=None, lengths=None, norms=None, **fields):
  """Rollouts of given rewards, [P, G]; a response is two tokens at most."""
  valid = None if valid is None else jnp.asarray(valid)[..., None]
  found = toys.plain_rollouts(rewards, lengths, 2, valid=valid, **fields)
  # All on the first token; outside the mask is garbage.
  norms = np.zeros(np.shape(rewards)) if norms is None else np.array(norms)
  of_tokens = norms[..., None] * np.array([1.0, 0.0])
  return found.replace(score_norms=jnp.where(found.mask, of_tokens, 1e6))


def apply(transform, rollouts):
  return loops.apply(transform, rollouts)[..., 0]


def check(transform, rollouts, expected):
  np.testing.assert_allclose(apply(transform, rollouts), expected, rtol=1e-6)


def test_golden_values():
  data = make_rollouts([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
  nothing = [0, 0, 0]
  check(est.subtract_group_mean(), data, [[-2, -1, 3], nothing])
  check(est.subtract_leave_one_out_mean(), data, [[-3, -1.5, 4.5], nothing])
  # mean 3, deviation √((4 + 1 + 9) / 2) = √7 with G − 1 = 2 below.
  expected = np.array([-2, -1, 3]) / (np.sqrt(7.0) + 0.5)
  check(est.standardize(epsilon=0.5), data, [expected, nothing])


def test_weighted_by_length():
  data = make_rollouts([[1.0, 4.0, 7.0]], lengths=[[2, 1, 1]])
  whole = (2 * 1 + 4 + 7) / 4
  check(
    est.subtract_weighted_mean(est.length()),
    data,
    [[1 - whole, 4 - whole, 7 - whole]],
  )
  check(
    est.subtract_weighted_leave_one_out_mean(est.length()),
    data,
    [[1 - 11 / 2, 4 - 9 / 3, 7 - 6 / 3]],
  )


def test_siblings_that_weigh_nothing_count_alike():
  norms = [[0.0, 0.0, 2.0]]
  data = make_rollouts([[1.0, 4.0, 7.0]], norms=norms)
  loo = est.subtract_weighted_leave_one_out_mean(est.score_norm())
  # The last one's siblings weigh nothing: their plain mean is 2.5.
  check(loo, data, [[1 - 7, 4 - 7, 7 - 2.5]])
  none = make_rollouts([[1.0, 4.0, 7.0]], norms=np.zeros((1, 3)))
  check(loo, none, [[-4.5, 0.0, 4.5]])
  check(est.subtract_weighted_mean(est.score_norm()), none, [[-3.0, 0.0, 3.0]])


def test_one_heavy_response_does_not_blur_its_own_baseline():
  """1e8 of weight, subtracted from the whole, would leave float32 nothing."""
  data = make_rollouts([[5.0, 1.0, 3.0]], norms=[[1e8, 1.0, 1.0]])
  loo = est.subtract_weighted_leave_one_out_mean(est.score_norm())
  assert apply(loo, data)[0, 0] == pytest.approx(3.0, rel=1e-6)


TRANSFORMS = {
  'group mean': est.subtract_group_mean(),
  'leave one out': est.subtract_leave_one_out_mean(),
  'standardize': est.standardize(epsilon=0.0),
  'weighted': est.subtract_weighted_mean(est.length()),
  'weighted leave one out': est.subtract_weighted_leave_one_out_mean(
    est.length()
  ),
}
of_groups = pytest.mark.parametrize('name', TRANSFORMS)


@of_groups
def test_one_or_no_valid_response_learns_nothing(name):
  data = make_rollouts(
    [[3.0, 5.0], [3.0, 5.0]], [[True, False], [False, False]]
  )
  np.testing.assert_array_equal(apply(TRANSFORMS[name], data), 0.0)
  assert TRANSFORMS[name].needs.samples == 2


@of_groups
def test_deviation_of_equal_fractions_is_not_divided_by(name):
  """Float32 gives equal k/1000 a mean that differs from them by a rounding."""
  rewards = np.full((1000, 7), np.arange(1000)[:, None] / 1000, np.float32)
  data = make_rollouts(rewards)
  mean = data.rewards.sum(axis=1, keepdims=True) / 7
  assert (np.asarray(data.rewards - mean) != 0).any()
  np.testing.assert_array_equal(apply(TRANSFORMS[name], data), 0.0)


def test_partners():
  data = make_rollouts([[1.0, 4.0, 2.0, -1.0]])
  check(est.subtract_partner(), data, [[-3.0, 3.0, 3.0, -3.0]])
  valid = [[True, False, True, True]]
  data = make_rollouts([[1.0, 4.0, 2.0, -1.0]], valid)
  assert apply(est.subtract_partner(), data)[0, 0] == 0.0
  check(est.subtract_partner(), data, [[0.0, 3.0, 3.0, -3.0]])
  with pytest.raises(ValueError, match='3 per prompt is odd'):
    apply(est.subtract_partner(), make_rollouts([[1.0, 2.0, 3.0]]))


def test_running_mean_knows_earlier_batches_only():
  """b = 0, then 0.2 · mean of the first batch, then decayed towards the next.

  Invalid rewards do not enter, and a batch without valid ones leaves b alone.
  """
  transform = est.subtract_running_mean(decay=0.8)
  valid = [[True, True], [False, True]]
  batches = [
    make_rollouts([[1.0, 2.0], [np.nan, 6.0]], valid),  # mean 3
    make_rollouts([[4.0, 0.0], [np.nan, 5.0]], valid),  # mean 3
    make_rollouts([[1.0, 2.0], [3.0, 6.0]], np.zeros((2, 2), bool)),
    make_rollouts([[10.0, 10.0], [10.0, 10.0]]),
  ]
  expected = [0.0, 0.6, 0.8 * 0.6 + 0.6, 1.08, 0.8 * 1.08 + 2.0]
  running = est.start_running(transform.needs)
  for batch, before, after in zip(
    batches, expected[:-1], expected[1:], strict=True
  ):
    batch = batch.replace(running=running)
    (value,) = running.values()
    assert float(value) == pytest.approx(before, rel=1e-6)
    got = apply(transform, batch)
    rewards = np.asarray(batch.rewards)[..., 0]
    np.testing.assert_allclose(got, rewards - before, rtol=1e-5)
    running = est.update_running(transform.needs, batch)
    (value,) = running.values()
    assert float(value) == pytest.approx(after, rel=1e-6)
    assert value.dtype == jnp.float32
