"""Preferences: who is preferred, margins by hand, extremes, refusals."""

import jax.numpy as jnp
import loops
import numpy as np
import pytest
import toys

from jaxrl_llm import estimators as est


def make_rollouts(rewards, lengths, valid=None):
  if valid is not None:
    valid = jnp.array(valid)[None, :, None]
  zeros = jnp.zeros((1, len(rewards), 3))
  return toys.plain_rollouts(
    [rewards], lengths, 3, valid=valid, ref_log_probs=zeros
  )


def test_pairs_that_teach():
  """Equal rewards, an invalid response, an empty one: none is a preference."""
  data = make_rollouts(
    [1.0, 4.0, 2.0, 2.0, 1.0, 0.0, 1.0, 0.0],
    [3, 1, 3, 3, 3, 3, 3, 0],
    [True] * 4 + [True, False] + [True] * 2,
  )
  got = est.distinct_pairs(data)[0, :, 0]
  np.testing.assert_array_equal(got, [True, True] + [False] * 6)


def test_odd_groups_are_refused():
  data = make_rollouts([1.0, 2.0, 3.0], [3] * 3)
  for recipe in (est.dpo(), est.dpop(), est.ipo(), est.reward_model()):
    with pytest.raises(ValueError, match='3 per prompt is odd'):
      recipe.prepare(data)


def case(better, worse, swapped=False):
  """One pair with the given log π/π_ref, all of it on the first token."""
  ratios = [worse, better] if swapped else [better, worse]
  data = make_rollouts([0.0, 1.0] if swapped else [1.0, 0.0], [1, 1])
  log_probs = jnp.array(ratios, jnp.float32)[None, :, None]
  return data, est.Outputs(
    log_probs=jnp.pad(log_probs, ((0, 0), (0, 0), (0, 2)))
  )


def loss_of(estimator, *arguments, **keywords):
  return float(loops.evaluate(estimator, *case(*arguments, **keywords))[0])


@pytest.mark.parametrize('swapped', [False, True])
def test_golden_losses(swapped):
  """Margins 0.3 − (−0.2) and −0.4 − 0.1; β 2; λ 5 meets the loss of 0.4."""
  up, down = (0.3, -0.2), (-0.4, 0.1)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  expected = {
    (est.dpo(2.0), up): -np.log(sigmoid(2 * 0.5)),
    (est.dpo(2.0), down): -np.log(sigmoid(2 * -0.5)),
    (est.dpop(2.0, 5.0), up): -np.log(sigmoid(2 * 0.5)),
    (est.dpop(2.0, 5.0), down): -np.log(sigmoid(2 * (-0.5 - 5 * 0.4))),
    (est.ipo(2.0), up): (0.5 - 0.25) ** 2,
    (est.ipo(2.0), down): (-0.5 - 0.25) ** 2,
  }
  for (estimator, ratios), value in expected.items():
    got = loss_of(estimator, *ratios, swapped=swapped)
    assert got == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize('estimator', [est.dpo(1.0), est.dpop(1.0, 50.0)])
def test_extreme_margins_are_finite(estimator):
  for ratios in ((500.0, -500.0), (-500.0, 500.0)):
    loss, gradient = loops.evaluate(estimator, *case(*ratios))
    assert np.isfinite(loss)
    assert np.isfinite(gradient.log_probs).all()


def scored(*rows):
  """Outputs of a reward model: its scores after each token."""
  values = jnp.asarray(rows, jnp.float32)[None]
  return est.Outputs(log_probs=jnp.zeros(values.shape), values=values)


def test_a_score_is_that_after_the_last_token():
  """Against torch: lengths 3 and 1, 1 and 2, 2 and 2; NaN behind the ends."""
  torch = pytest.importorskip('torch')
  nan = np.nan
  data = make_rollouts([1, 0, -1, 0.5, 3, 2], [3, 1, 1, 2, 2, 2])
  outputs = scored(
    [9.0, -9.0, 0.7],
    [1.1, nan, nan],
    [-2.0, nan, nan],
    [5.0, 0.25, nan],
    [8.0, 40.0, nan],
    [8.0, -40.0, nan],
  )
  loss, gradient = loops.evaluate(est.reward_model(), data, outputs)
  better = torch.tensor([0.7, 0.25, 40.0], requires_grad=True)
  worse = torch.tensor([1.1, -2.0, -40.0], requires_grad=True)
  expected = -torch.nn.functional.logsigmoid(better - worse).mean()
  expected.backward()
  assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
  slopes = np.zeros((6, 3))
  slopes[[0, 3, 4], [2, 1, 1]] = better.grad
  slopes[[1, 2, 5], [0, 0, 1]] = worse.grad
  np.testing.assert_allclose(gradient.values[0], slopes, rtol=1e-6, atol=1e-30)
  np.testing.assert_array_equal(gradient.log_probs, 0.0)


def test_extreme_scores_are_finite():
  data = make_rollouts([1, 0], [2, 3])
  for extreme in (1e4, -1e4):
    far = scored([0.0, extreme, 0.0], [0.0, 0.0, -extreme])
    loss, gradient = loops.evaluate(est.reward_model(), data, far)
    assert float(loss) == pytest.approx(max(0.0, -2 * extreme), rel=1e-6)
    assert np.isfinite(gradient.values).all()
