"""A step of every algorithm that the loop can supply, on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
import steps
from steps import moved

from experiments.schedule import failure_messages
from jaxrl_llm.models import transformer
from jaxrl_llm.rewards import RewardPart, Workers
from jaxrl_llm.rollouts import branches
from jaxrl_llm.runs import Meter

CLIPS = {'clip_ratio/low', 'clip_ratio/high'}
# One for each thing that an estimator may need, and what its record holds
# beside the usual.
BRANCHES = dict(count=2, samples=2)
ALGORITHMS = [
  (dict(name='reinforce_baseline', decay=0.5), set()),
  (dict(name='remax'), set()),
  (dict(name='obl_reinforce'), set()),
  (dict(name='rl_zvp'), CLIPS),
  (dict(name='reinforce_plus_plus'), CLIPS | {'kl'}),
  (dict(name='trepo', score_weighted=True, **BRANCHES), CLIPS),
  (dict(name='trepo_tree', **BRANCHES), CLIPS),
  (dict(name='vine_ppo', delimiters=(4,), **BRANCHES), CLIPS),
]


def begin(algorithm, critic=None):
  config = scripts.tiny_config()
  config.rollout.update(prompts=4, samples=4, max_tokens=12)
  config.algorithm = algorithm
  config.critic.update(critic or {})
  return steps.begin(config)


@pytest.mark.slow
@pytest.mark.parametrize('algorithm, extra', ALGORITHMS)
def test_a_step(algorithm, extra):
  rl, state, _ = begin(algorithm)
  before = jax.device_get(state.trainable)
  result = rl.step(state, 0)
  assert extra <= set(result.metrics)
  assert not (CLIPS - extra) & set(result.metrics)
  for name, value in result.metrics.items():
    assert np.isfinite(value), name
  assert result.metrics['skipped'] == 0 and result.metrics['grad_norm'] > 0
  assert moved(before, jax.device_get(result.state.trainable)) > 0
  # Branches are no responses: these statistics are of responses alone.
  rewards = result.responses.scores.total
  assert result.metrics['reward'] == pytest.approx(rewards.mean(), abs=1e-6)
  assert result.advantages.shape == (4, 4)


@pytest.mark.slow
def test_failures_in_workers_are_recorded(tmp_path):
  (tmp_path / 'odd.py').write_text(
    'def odd(completions):\n'
    '  if len(completions[0]) % 2 == 0: raise ValueError("even")\n'
    '  return [1.0]\n'
  )
  rl, state, _ = begin(dict(name='trepo'))
  with Workers(f'{tmp_path}/odd.py:odd', workers=1, timeout=60) as workers:
    rl.rewards = [RewardPart('odd', workers), *rl.rewards]
    result = rl.step(state, 0)
  even = np.array([len(x) % 2 == 0 for x in result.responses.completions])
  assert 0 < even.sum() < len(even)
  assert result.metrics['rewards/odd/failed'] == even.sum()
  assert result.metrics['rewards/odd/failed/error'] == even.sum()
  assert result.metrics['rewards/odd/none'] == 0
  np.testing.assert_array_equal(result.responses.scores.valid, ~even)
  assert result.metrics['branches/rewards/odd/failed'] > 0
  assert 'rewards/ones/failed' not in result.metrics
  reported = set()
  first = failure_messages(result.failures, 'at step 1', reported)
  assert len(first) == 2 and all('ValueError: even' in x for x in first)
  assert failure_messages(result.failures, 'at step 2', reported) == []


def test_a_step_with_branches(monkeypatch):
  """TRePO: its advantages are differences of the branches' mean rewards."""
  rl, state, model = begin(dict(name='trepo', count=2, samples=3))
  params = jax.tree.map(jnp.copy, state.trainable['policy'])
  host = jax.device_get(params)
  collected = rl.collect(state, 0)
  data, extra = collected.rollouts, collected.tokens
  where, values = np.asarray(data.branch_mask), np.asarray(data.branch_values)
  mask, rewards = np.asarray(data.mask), np.asarray(data.rewards)
  assert 0 < where.sum(axis=2).max() <= 2 and not where[..., 0].any()
  assert not (where & ~mask).any() and len(np.unique(values[where])) > 3
  forks = collected.record['branches/forks']
  assert extra >= forks * 3 > 0  # of at least one token each
  earned = steps.count_ones(collected.responses.completions)
  np.testing.assert_array_equal(rewards.ravel(), earned)
  batch = rl.estimator.prepare(data)
  for p, g in np.ndindex(mask.shape[:2]):
    others = np.delete(rewards[p, :, 0], g).mean()
    knots = [0, *np.flatnonzero(where[p, g]), mask[p, g].sum()]
    known = [others, *values[p, g][where[p, g]], rewards[p, g, 0]]
    for a, b, low, high in zip(
      knots, knots[1:], known, known[1:], strict=False
    ):
      np.testing.assert_allclose(
        batch.advantages[p, g, a:b], high - low, rtol=0, atol=1e-6
      )
  # The same step again is the same, branches included.
  state = state.replace(trainable={'policy': params})
  again = rl.collect(state, 0).rollouts
  np.testing.assert_array_equal(again.branch_values, values)
  result = rl.step(state, 0)
  assert result.metrics['grad_norm'] > 0 and result.metrics['skipped'] == 0
  assert result.tokens == mask.sum() + extra
  compiled, sampled_by = Meter(), []
  branch = branches.branch

  def watched(config, params, *rest):
    sampled_by.append(jax.tree.map(np.array, params))
    return branch(config, params, *rest)

  monkeypatch.setattr(branches, 'branch', watched)
  layout = transformer.sampling_layout(
    model.config, result.state.trainable['policy']
  )
  assert moved(host, result.state.trainable['policy']) > 0
  left = jax.tree.map(np.array, layout)
  compiled.take()
  rl.step(result.state, 1)
  assert compiled.take().programs == 0
  # Branches continue with what the last update has left.
  jax.tree.map(np.testing.assert_array_equal, sampled_by[-1], left)


ADAPTIVE = dict(name='adaptive_kl', initial=0.1, target=0.5, horizon=20)
WITH_CRITIC = {
  'ppo': (dict(name='ppo', kl=ADAPTIVE), dict(trunk='separate', warmup=1)),
  'vapo': (dict(name='vapo'), dict(trunk='shared')),
}


@pytest.fixture(
  scope='module', params=['ppo', pytest.param('vapo', marks=pytest.mark.slow)]
)
def actor_critic(request):
  """(name, phase, its first state on the host, three results)."""
  algorithm, section = WITH_CRITIC[request.param]
  rl, state, _ = begin(algorithm, section)
  # Before an update: a step takes the state over.
  start, results, compiled = jax.tree.map(np.array, state), [], Meter()
  for step in range(3):
    result = rl.step(state, step)
    state = result.state
    host = jax.tree.map(np.array, state)
    timings = {'programs': compiled.take().programs}
    results.append(result._replace(state=host, timings=timings))
  return request.param, rl, start, results


def test_steps_with_a_critic(actor_critic):
  name, _, start, results = actor_critic
  states = [start] + [result.state for result in results]
  for i, (old, new) in enumerate(zip(states, states[1:], strict=False)):
    assert moved(old.trainable['critic'], new.trainable['critic']) > 0
    waits = name == 'ppo' and i == 0
    trained = moved(old.trainable['policy'], new.trainable['policy']) > 0
    metrics = results[i].metrics
    assert trained != waits and (metrics['learning_rate'] == 0) == waits
    assert metrics['critic/learning_rate'] > 0
    assert metrics['critic/grad_norm'] > 0 and metrics['grad_norm'] > 0
    assert metrics['skipped'] == 0 and set(metrics) >= CLIPS
    assert all(np.isfinite(value) for value in metrics.values())
  # The head begins at zero, and a warm-up has a schedule of its own.
  assert results[0].metrics['critic/value_mean'] == 0.0
  assert results[2].metrics['critic/value_mean'] != 0.0
  rate = results[int(name == 'ppo')].metrics['learning_rate']
  assert rate == pytest.approx(2e-4 / 10)
  programs = [result.timings['programs'] for result in results]
  # After the critic's warm-up the policy's schedule is one more.
  assert programs[0] and programs[1] <= 1 and not programs[2]
  if name == 'ppo':  # Its KL coefficient has begun to adapt.
    coefficients = [state.running['kl_coefficient'] for state in states]
    assert coefficients[0] == np.float32(0.1)
    assert len(set(map(float, coefficients))) == len(coefficients)
