"""Diagnostics against loops over plain numbers."""

import math

import numpy as np
import pytest
import toys

from jaxrl_llm import estimators as est
from jaxrl_llm.estimators import diagnostics


@pytest.fixture(scope='module')
def data():
  rollouts, outputs = toys.random_rollouts(0, dtype=np.float32)
  return rollouts, outputs, est.dr_grpo(9).prepare(rollouts)


def tokens_of(batch):
  return list(zip(*np.nonzero(batch.mask & batch.valid), strict=True))


@pytest.mark.parametrize('low, high', [(0.2, None), (0.1, 0.3)])
def test_per_token(data, low, high):
  _, outputs, batch = data
  got = {
    name: np.asarray(metric(outputs, batch))
    for name, metric in diagnostics.per_token(low, high).items()
  }
  above = low if high is None else high
  cut = {'low': 0, 'high': 0}
  for p, g, t in tokens_of(batch):
    new, old = outputs.log_probs[p, g, t], float(batch.log_probs[p, g, t])
    ratio, advantage = math.exp(new - old), float(batch.advantages[p, g, 0])
    is_low = ratio < 1 - low and advantage < 0
    is_high = ratio > 1 + above and advantage > 0
    assert got['entropy'][p, g, t] == outputs.entropy[p, g, t]
    kl = ratio - 1 - math.log(ratio)
    assert got['approx_kl'][p, g, t] == pytest.approx(kl, abs=1e-5)
    assert bool(got['clip_ratio/low'][p, g, t]) == is_low
    assert bool(got['clip_ratio/high'][p, g, t]) == is_high
    cut['low'] += is_low
    cut['high'] += is_high
  assert min(cut.values()) > 0


def test_critic_per_token():
  rollouts, outputs = toys.random_rollouts(0, dtype=np.float32)
  batch = est.ppo().prepare(rollouts)
  got = {
    name: np.asarray(metric(outputs, batch))
    for name, metric in diagnostics.critic_per_token(0.1).items()
  }
  cut = []
  for p, g, t in tokens_of(batch):
    new, old = float(outputs.values[p, g, t]), float(batch.values[p, g, t])
    target = float(batch.value_targets[p, g, t])
    near = min(max(new, old - 0.1), old + 0.1)
    assert got['critic/value_mean'][p, g, t] == pytest.approx(new)
    error = max((new - target) ** 2, (near - target) ** 2)
    assert got['critic/value_loss'][p, g, t] == pytest.approx(
      0.5 * error, rel=1e-3, abs=1e-6
    )
    cut.append((near - target) ** 2 > (new - target) ** 2)
    assert bool(got['critic/clip_ratio'][p, g, t]) == cut[-1]
  assert any(cut) and not all(cut)


def test_explained_variance():
  rollouts, _ = toys.random_rollouts(0, dtype=np.float32)
  batch = est.ppo(lam=1.0).prepare(rollouts)
  returns, values = [], []
  for p, g, t in tokens_of(batch):
    returns.append(float(rollouts.rewards[p, g, 0]))
    values.append(float(rollouts.values[p, g, t]))
  residual = np.array(returns) - np.array(values)
  expected = 1 - residual.var() / np.var(returns)
  got = float(diagnostics.explained_variance(batch))
  assert expected < 0 and got == pytest.approx(expected, rel=1e-4)
  # A critic that is right up to a constant explains all, a constant nothing.
  same = lambda x: batch.replace(values=np.where(batch.mask, x, np.nan))
  ours = lambda x: float(diagnostics.explained_variance(same(x)))
  assert ours(batch.value_targets + 3.0) == pytest.approx(1.0, abs=1e-5)
  assert ours(0.7) == pytest.approx(0.0, abs=1e-5)


def test_nothing_to_explain_is_no_number():
  """All rewards equal: what varies in the targets is rounding alone."""
  rollouts, _ = toys.random_rollouts(0, dtype=np.float32)
  for reward in (0.0, 0.3, 1.0):
    rewards = np.full_like(rollouts.rewards, reward)
    batch = est.ppo(lam=1.0).prepare(rollouts.replace(rewards=rewards))
    assert math.isnan(diagnostics.explained_variance(batch))


def test_effective_sample_size():
  where = np.array([True, True, False, True])
  size = lambda x: float(diagnostics.effective_sample_size(np.array(x), where))
  assert size([0.0, 0.0, 9.0, 0.0]) == pytest.approx(3.0)
  w = np.array([1.0, 2.0, 5.0])
  expected = w.sum() ** 2 / (w**2).sum()
  logs = np.log([1.0, 2.0, 3.0, 5.0])
  assert size(logs) == pytest.approx(expected, rel=1e-5)
  # Weights that would overflow count relative to each other.
  assert size(logs + 900.0) == pytest.approx(expected, rel=1e-4)
  nothing = np.zeros(4, bool)
  assert float(diagnostics.effective_sample_size(logs, nothing)) == 0.0


def test_sampler_statistics_against_loops():
  rollouts, _ = toys.random_rollouts(1)
  random = np.random.default_rng(0)
  shift = random.normal(0.0, 0.3, rollouts.mask.shape)
  rollouts = rollouts.replace(sampler_log_probs=rollouts.log_probs - shift)
  weights, tokens = [], []
  for p, g in np.ndindex(*rollouts.mask.shape[:2]):
    if rollouts.valid[p, g, 0]:
      kept = shift[p, g][rollouts.mask[p, g]]
      weights.append(math.exp(kept.sum()))
      tokens += kept.tolist()
  got = diagnostics.sampler_statistics(rollouts)
  size = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
  assert float(got['sampler/effective_samples']) == pytest.approx(
    size, rel=1e-5
  )
  mean = -sum(tokens) / len(tokens)
  assert float(got['sampler/kl']) == pytest.approx(mean, rel=1e-5)


def test_clip_ratios_are_where_the_gradient_is_cut(data):
  import jax

  _, outputs, batch = data
  metrics = diagnostics.per_token(0.1, 0.3)
  reported = metrics['clip_ratio/low'](outputs, batch)
  reported |= metrics['clip_ratio/high'](outputs, batch)
  loss = est.clipped(0.1, 0.3)
  slope = jax.grad(lambda o: (loss.apply(o, batch) * batch.weights).sum())(
    outputs.replace(log_probs=np.nan_to_num(outputs.log_probs))
  ).log_probs
  for p, g, t in tokens_of(batch):
    if batch.advantages[p, g, 0] != 0:
      assert (slope[p, g, t] == 0) == reported[p, g, t]


def test_distances_to_reference_and_sampler(data):
  _, outputs, batch = data
  kl = diagnostics.reference_kl(outputs, batch)
  gap = diagnostics.log_prob_difference(outputs, batch)
  other = batch.replace(sampler_log_probs=batch.ref_log_probs)
  gap_to_sampler = diagnostics.log_prob_difference(outputs, other)
  for p, g, t in tokens_of(batch):
    new = outputs.log_probs[p, g, t]
    old, ref = batch.log_probs[p, g, t], batch.ref_log_probs[p, g, t]
    assert kl[p, g, t] == pytest.approx(float(new - ref), abs=1e-6)
    assert gap[p, g, t] == pytest.approx(abs(float(new - old)), abs=1e-6)
    assert gap_to_sampler[p, g, t] == pytest.approx(abs(float(kl[p, g, t])))


def test_group_statistics():
  rollouts, _ = toys.random_rollouts(1, samples=3, dtype=np.float32)
  rewards = rollouts.rewards.copy()
  rewards[1] = 0.3
  got = diagnostics.group_statistics(rollouts.replace(rewards=rewards))
  valid = rollouts.valid[..., 0]
  groups = [rewards[p, valid[p], 0] for p in range(3)]
  assert got['reward'] == pytest.approx(np.concatenate(groups).mean(), rel=1e-5)
  deviation = np.mean([group.std(ddof=1) for group in groups])
  assert got['reward_std'] == pytest.approx(deviation, rel=1e-4)
  assert got['frac_reward_zero_std'] == pytest.approx(1 / 3)


def test_groups_without_a_statistic_are_left_out():
  rollouts, _ = toys.random_rollouts(1, samples=2, dtype=np.float32)
  rewards = np.array([[1, 0], [5, 9], [2, 7]], np.float32)[..., None]
  valid = np.array([[1, 1], [0, 0], [0, 1]], bool)[..., None]
  got = diagnostics.group_statistics(
    rollouts.replace(rewards=rewards, valid=valid)
  )
  assert got['reward_std'] == pytest.approx(math.sqrt(0.5))
  assert got['frac_reward_zero_std'] == pytest.approx(1 / 2)
  nothing = np.zeros_like(valid)
  got = diagnostics.group_statistics(
    rollouts.replace(rewards=rewards, valid=nothing)
  )
  assert len(got) == 3 and all(np.isnan(value) for value in got.values())


def test_completion_statistics():
  lengths = np.array([[3, 1], [4, 4]])
  mask = np.arange(4)[None, None] < lengths[..., None]
  finished = np.array([[True, True], [False, True]])[..., None]
  got = diagnostics.completion_statistics(mask, finished)
  assert {name: float(value) for name, value in got.items()} == {
    'completions/mean_length': 3.0,
    'completions/max_length': 4.0,
    'completions/clipped_ratio': 0.25,
  }
