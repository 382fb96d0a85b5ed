"""A step of every algorithm that the loop can supply, on a tiny model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build, phases, runs
from experiments.configs import quickstart
from jaxrl_llm.checkpoints import Checkpoints
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import RewardPart

CLIPS = {'clip_ratio/low', 'clip_ratio/high'}
# One for each thing that an estimator may need, and what its record holds
# beside the usual.
ALGORITHMS = {
  'reinforce_baseline': set(),
  'remax': set(),
  'obl_reinforce': set(),
  'rl_zvp': CLIPS,
  'reinforce_plus_plus': CLIPS | {'kl'},
}


@pytest.fixture(scope='module')
def setting():
  config = quickstart.get_config()
  config.rollout.update(prompts=4, samples=4, max_tokens=12)
  config.model.architecture.update(
    hidden_size=16, intermediate_size=16, num_layers=1
  )
  model = build.model(config.model, config.seed)
  return config, model, build.dataset(config, model.tokenizer)


def count_ones(completions):
  """Something that random responses earn."""
  return [text.count('1') / 4 for text in completions]


def begin(setting, algorithm):
  config, model, data = setting
  config = config.copy_and_resolve_references()
  config.algorithm = algorithm
  rl = phases.Reinforcement(config, model, data.train, jax.random.key(0))
  rl.reference = model.params
  rl.rewards = [RewardPart('ones', count_ones)]
  params = jax.tree.map(jnp.copy, model.params)
  return rl, build.init_state(params, rl.optimizer, rl.estimator)


@pytest.mark.parametrize('name', ALGORITHMS)
def test_a_step(setting, name):
  extra = ALGORITHMS[name]
  rl, state = begin(setting, dict(name=name))
  before = jax.device_get(state.trainable)
  result = rl.step(state, 0)
  assert extra <= set(result.metrics)
  assert not (CLIPS - extra) & set(result.metrics)
  for name, value in result.metrics.items():
    assert np.isfinite(value), name
  assert result.metrics['skipped'] == 0 and result.metrics['grad_norm'] > 0
  moved = jax.tree.map(
    lambda x, y: np.abs(x - y).max(),
    before,
    jax.device_get(result.state.trainable),
  )
  assert max(jax.tree.leaves(moved)) > 0


def test_running_numbers_move_once_per_batch(setting):
  rl, state = begin(setting, dict(name='reinforce_baseline', decay=0.5))
  assert float(state.running['reward_mean']) == 0.0
  mean = 0.0
  for step in range(2):
    result = rl.step(state, step)
    mean = 0.5 * mean + 0.5 * result.metrics['reward']
    # What was subtracted is the mean of earlier batches.
    state = result.state
    assert float(state.running['reward_mean']) == pytest.approx(mean, rel=1e-5)


def test_a_checkpoint_holds_running_numbers(setting, tmp_path):
  rl, state = begin(setting, dict(name='reinforce_baseline', decay=0.5))
  state = rl.step(state, 0).state
  tree = {'state': state, 'key': jax.random.key_data(rl.key)}
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(1, tree, {})
    checkpoints.wait()
    _, restored, _ = checkpoints.restore(tree)
  expected = float(state.running['reward_mean'])
  assert (
    expected and float(restored['state'].running['reward_mean']) == expected
  )
  # A model is read without the algorithm, whose file may be gone.
  config = setting[0].copy_and_resolve_references()
  config.algorithm = dict(name='gone.py:mine')
  (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
  params = runs.load(tmp_path).model.params
  for ours, theirs in zip(
    jax.tree.leaves(params),
    jax.tree.leaves(state.trainable['policy']),
    strict=True,
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_a_step_with_branches(setting):
  """TRePO: its advantages are differences of the branches' mean rewards."""
  rl, state = begin(setting, dict(name='trepo', count=2, samples=3))
  params = jax.tree.map(jnp.copy, state.trainable['policy'])
  _, data, _, extra = rl.collect(state, 0)
  where, values = np.asarray(data.branch_mask), np.asarray(data.branch_values)
  mask, rewards = np.asarray(data.mask), np.asarray(data.rewards)
  assert 0 < where.sum(axis=2).max() <= 2 and not where[..., 0].any()
  assert not (where & ~mask).any() and len(np.unique(values[where])) > 3
  assert extra > where.sum() * 3  # of at least one token each
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
  _, again, _, _ = rl.collect(state, 0)
  np.testing.assert_array_equal(again.branch_values, values)
  result = rl.step(state, 0)
  assert result.metrics['grad_norm'] > 0 and result.metrics['skipped'] == 0
  assert result.tokens == mask.sum() + extra


@pytest.mark.parametrize('name', ['ppo', 'vapo'])
def test_what_the_loop_cannot_supply_yet_is_refused(setting, name):
  rl, state = begin(setting, dict(name=name))
  with pytest.raises(UserError, match='cannot supply'):
    rl.step(state, 0)
