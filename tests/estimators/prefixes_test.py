"""Baselines of siblings that share a prefix, and their biased relatives."""

import numpy as np
import pytest
from listed import TOY, assert_unbiased, close, compose, examine
from loops import apply

from jaxrl_llm import estimators as est
from jaxrl_llm.estimators.exact import relatives

pytestmark = pytest.mark.usefixtures('float64')

loo = est.subtract_prefix_leave_one_out_mean


@pytest.mark.parametrize(
  'prior, weighted, running',
  [
    (0.0, False, {}),
    (1.0, False, {}),
    (0.5, True, {}),
    (est.prefix_prior(), False, {'prefix_prior': 0.3}),
  ],
)
def test_no_bias(prior, weighted, running):
  estimator = compose(loo(prior, weighted))
  assert_unbiased(estimator, TOY, 3, running=running)


def group(rewards, tokens, valid=None, norms=None, **fields):
  """Rollouts of one prompt; −1 is no token."""
  tokens = np.array(tokens)[None]
  column = lambda x: np.array(x)[None, :, None]
  return est.Rollouts(
    tokens=tokens,
    mask=tokens >= 0,
    log_probs=np.zeros(tokens.shape),
    rewards=column(rewards),
    valid=column([True] * len(rewards) if valid is None else valid),
    score_norms=None if norms is None else np.array(norms)[None],
    **fields,
  )


TOKENS = [[1, 2, 3], [1, 2, 4], [1, 5, -1], [6, 2, 3]]
REWARDS = [8.0, 4.0, 1.0, 2.0]


def test_by_hand():
  data = group(REWARDS, TOKENS)
  got = np.asarray(apply(loo(prior=0.0), data))[0]
  whole = 7 / 3
  np.testing.assert_allclose(got[0], [8 - whole, 8 - 2.5, 8 - 4])
  np.testing.assert_allclose(got[2], [1 - 14 / 3, 1 - 6, 0])
  # Alone: the whole group's.
  np.testing.assert_allclose(got[3], 2 - 13 / 3)
  shrunk = np.asarray(apply(loo(prior=2.0), data))[0]
  np.testing.assert_allclose(shrunk[0, 1], 8 - (5 + 2 * whole) / 4)
  norms = [[9, 9, 9], [1, 3, 9], [1, 1, 9], [1, 9, 9.0]]
  data = group(REWARDS, TOKENS, norms=norms)
  weighed = np.asarray(apply(loo(0.0, score_weighted=True), data))[0]
  np.testing.assert_allclose(weighed[0, 1], 8 - (3 * 4 + 1 * 1) / 4)


def test_a_response_that_is_not_valid_is_no_sibling():
  rewards = [8.0, np.nan, 1.0, 2.0]
  data = group(rewards, TOKENS, valid=[True, False, True, True])
  got = np.asarray(apply(loo(prior=0.0), data))[0]
  np.testing.assert_allclose(got[0], [8 - 1.5, 8 - 1, 8 - 1.5])


def test_the_prior_is_noise_over_spread():
  """Two prefixes of four responses: values 0 and 6, of noise ±1."""
  rewards = [1.0, -1.0, 1.0, -1.0, 7.0, 5.0, 7.0, 5.0]
  tokens = [[1, 9]] * 4 + [[2, 9]] * 4
  prior = est.prefix_prior(decay=0.0)
  data = group(rewards, tokens)
  got = prior.update(5.0, data)
  rewards = np.array(rewards)
  noise, spread = [], []
  for i in range(8):
    for t in (0, 1):
      same = [j for j in range(8) if j != i and (t == 0 or j // 4 == i // 4)]
      noise.append(rewards[same].var(ddof=1))
      whole = np.delete(rewards, i).mean()
      around = (rewards[same].mean() - whole) ** 2
      spread.append(around - noise[-1] / len(same))
  close(got, np.clip(sum(noise) / sum(spread), 0, 100))
  # Nobody has two siblings: nothing is learnt.
  assert prior.update(5.0, group([1.0, 2.0], [[1], [2]])) == 5.0


@pytest.mark.parametrize(
  'transform, bias',
  [
    (relatives.own_token_shared(), 0.05),
    (relatives.own_reward_inside(), 0.1),
    (relatives.value_difference(), 0.05),
    (
      est.chain(est.at_last_token(), relatives.cut_before_unlikely(3, 1, 0.5)),
      0.01,
    ),
  ],
)
def test_relatives_are_biased(transform, bias):
  report = examine(compose(transform), TOY, 2)
  assert report.bias > bias
  # At the best scale, too.
  assert report.cosine < 1 - bias**2 / 8
