"""Credit: against rlax, and by hand where values are known at few states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import quick_jit

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')

T = 6


def make_rollouts(lengths, rewards=None, **fields):
  """One prompt; NaN outside the mask of every field, [G, T]."""
  mask = np.arange(T)[None] < np.array(lengths)[:, None]
  rewards = np.zeros(len(lengths)) if rewards is None else np.array(rewards)
  arrays = {}
  for name, x in fields.items():
    x = np.broadcast_to(np.asarray(x), mask.shape)
    arrays[name] = x[None] if x.dtype == bool else np.where(mask, x, 0.0)[None]
  zeros = np.zeros(mask.shape)[None]
  return est.Rollouts(
    tokens=zeros.astype(np.int32),
    mask=mask[None],
    rewards=rewards[None, :, None],
    **({'log_probs': zeros} | arrays),
  )


def apply(transform, data, array=None):
  """[G, T]."""
  array = data.rewards if array is None else np.asarray(array)[None]
  run = quick_jit(lambda a, d: transform.apply(a, d))
  return np.asarray(run(jnp.asarray(array), data))[0]


LENGTHS = [6, 4, 1, 0]
random_of = lambda seed: np.random.default_rng(seed).normal(
  size=(len(LENGTHS), T)
)


def test_another_speaker_may_stand_between_the_policys_tokens():
  """What a tool wrote is outside the mask; the response ends once."""
  mask = np.array([[[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1]]], bool)
  data = make_rollouts([T, T], rewards=[1.0, 2.0]).replace(mask=mask)
  at_end = apply(est.at_last_token(), data)
  expected = [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 2]]
  np.testing.assert_array_equal(at_end, expected)
  to_go = apply(est.reward_to_go(), data, at_end)
  np.testing.assert_array_equal(to_go, mask[0] * [[1.0], [2.0]])
  where = np.array([[[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0]]], bool)
  held = est.hold(np.array([[[3.0] * T, [5, 5, 5, 7, 7, 7]]]), where, mask)
  np.testing.assert_array_equal(
    held[0], mask[0] * [[3.0] * T, [0, 5, 0, 7, 7, 7]]
  )


@pytest.mark.parametrize('gamma, lam', [(1.0, 0.9), (0.8, 0.7), (0.9, 1.0)])
def test_gae_and_lambda_returns_are_those_of_rlax(gamma, lam):
  rlax = pytest.importorskip('rlax')
  rewards, values = random_of(0), random_of(1)
  data = make_rollouts(LENGTHS, values=values)
  got = apply(est.gae(gamma, lam, est.critic()), data, rewards)
  target = apply(est.lambda_return(gamma, lam), data, rewards)
  for i, length in enumerate(LENGTHS):
    np.testing.assert_array_equal(got[i, length:], 0.0)
    if not length:
      continue
    # rlax wants the value after the last token too: an ended response's is 0.
    rows = rewards[i, :length], np.full(length, gamma)
    after = np.append(values[i, 1:length], 0.0)
    theirs = rlax.truncated_generalized_advantage_estimation(
      *map(jnp.asarray, rows), lam, jnp.append(values[i, :length], 0.0)
    )
    np.testing.assert_allclose(got[i, :length], theirs, rtol=1e-10)
    theirs = rlax.lambda_returns(*map(jnp.asarray, rows), after, lam)
    np.testing.assert_allclose(target[i, :length], theirs, rtol=1e-10)


def test_token_rewards_and_token_kl():
  rewards, old, ref = (random_of(seed) for seed in range(3))
  data = make_rollouts(
    LENGTHS, token_rewards=rewards, log_probs=old, ref_log_probs=ref
  )
  inside = data.mask[0]
  start = np.ones((4, T))
  got = apply(est.add_token_rewards(), data, start)
  np.testing.assert_allclose(got, np.where(inside, 1 + rewards, 1.0))
  got = apply(est.subtract_token_kl(0.3), data, start)
  np.testing.assert_allclose(got, np.where(inside, 1 - 0.3 * (old - ref), 1.0))
  assert est.add_token_rewards().needs == est.Needs(token_rewards=True)
  assert est.subtract_token_kl(0.3).needs == est.Needs(reference=True)


def fork(*places):
  return np.isin(np.arange(T), places)


def branched(places, rewards=(5.0, 1.0, 2.0), lengths=(6, 6, 6), **fields):
  """The value before token t is 10 t; the first response forks at `places`."""
  mask = np.zeros((3, T), bool)
  mask[0] = fork(*places)
  return make_rollouts(
    lengths,
    rewards,
    branch_values=np.where(mask, 10.0 * np.arange(T), np.nan),
    branch_mask=mask,
    **fields,
  )


VALUES = est.branches(4, 4, est.positions.uniform())


def credit(data, fill=None, values=VALUES, gamma=1.0, lam=0.0):
  transform = est.gae(gamma, lam, values, fill)
  return apply(est.chain(est.at_last_token(), transform), data)


def test_hold():
  """Roots are the siblings' means: 1.5, 3.5 and 3."""
  got = credit(branched([2, 3]))
  first = [20 - 1.5] * 2 + [30 - 20] + [5 - 30] * 3
  np.testing.assert_allclose(got[0], first)
  np.testing.assert_allclose(got[1], 1 - 3.5)
  np.testing.assert_allclose(got[2], 2 - 3)
  got = credit(branched([2, 3, 5], lengths=(4, 6, 6)))
  first = [20 - 1.5] * 2 + [30 - 20] + [5 - 30] + [0, 0]
  np.testing.assert_allclose(got[0], first)


def test_segments_with_lambda_and_gamma():
  """Forks at 2 and 3: δ of three segments, discounted by their lengths."""
  gamma, lam = 0.9, 0.7
  rewards = random_of(3)[:3]
  data = branched([2, 3])
  # Branches have no γ; another source with values at a few states may.
  given = VALUES._replace(needs=est.Needs())
  got = apply(est.gae(gamma, lam, given), data, rewards)
  r = rewards[0]
  last = r[3] + gamma * r[4] + gamma**2 * r[5] - 30
  middle = r[2] + gamma * 30 - 20
  root = rewards[1:].sum() / 2  # what the siblings earned
  first = r[0] + gamma * r[1] + gamma**2 * 20 - root
  middle += lam * gamma * last
  first += lam * gamma**2 * middle
  np.testing.assert_allclose(got[0], [first] * 2 + [middle] + [last] * 3)


CRITIC = est.branches_with_critic(4, 4, est.positions.uniform())


def test_lambda_reaches_over_what_is_a_baseline_alone():
  """A = δ + λ A of the next fresh state, against its value and no other."""
  values = random_of(1)[:3]
  data = branched([2, 4], values=values)
  got = credit(data, values=CRITIC, lam=0.7)[0]
  last = 5 - 40
  middle = 40 - 20 + 0.7 * last
  np.testing.assert_allclose(got[4], 5 - values[0, 4])
  np.testing.assert_allclose(got[3], 40 - values[0, 3] + 0.7 * last)
  np.testing.assert_allclose(got[2], 40 - values[0, 2] + 0.7 * last)
  np.testing.assert_allclose(got[0], 20 - values[0, 0] + 0.7 * middle)


def test_whiten_over_tokens():
  advantages = random_of(0)
  data = make_rollouts(LENGTHS)
  got = apply(est.whiten(epsilon=0.5), data, advantages)
  inside = data.mask[0]
  x = advantages[inside]
  np.testing.assert_allclose(
    got[inside], (x - x.mean()) / np.sqrt(x.var() + 0.5), rtol=1e-12
  )
  np.testing.assert_array_equal(got[~inside], 0.0)


def test_whiten_tells_equal_numbers_by_comparing():
  with jax.enable_x64(False):
    equal = np.full((4, T), 0.3, np.float32)
    data = make_rollouts(LENGTHS)
    got = apply(est.whiten(epsilon=1e-30), data, equal)
    np.testing.assert_array_equal(got, 0.0)


@pytest.mark.parametrize(
  'fill, expected',
  [
    (est.hold, [0.25, 0.75, 0.75]),
    (est.interpolate_values, [0.25, 0.375, 0.375]),
  ],
)
def test_credit_begins_at_the_policys_own_first_token(fill, expected):
  """A forced prefix or a tool's output comes first: V₀ is before token 1."""
  shape = 1, 2, 4
  forks = np.broadcast_to(np.arange(4) == 2, shape)
  rollouts = est.Rollouts(
    tokens=np.zeros(shape, np.int32),
    mask=np.broadcast_to(np.arange(4) > 0, shape),
    log_probs=np.zeros(shape),
    rewards=np.array([[[1.0], [0.0]]]),
    branch_values=np.where(forks, 0.25, 0.0),
    branch_mask=forks,
  )
  values = est.branches(1, 4, est.positions.fixed(2))
  credit = est.chain(est.at_last_token(), est.gae(1.0, 0.0, values, fill))
  found = credit.apply(rollouts.rewards, rollouts)
  np.testing.assert_allclose(found[0, 0], [0.0, *expected], atol=1e-12)
