"""A step of training whose responses are all cut off."""

import dataclasses

import jax
import numpy as np
import pytest
import scripts
import steps


def slow(**algorithm):
  return pytest.param(algorithm, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  'algorithm',
  [
    dict(name='grpo'),
    slow(name='dapo', max_length=4, buffer=2),
    slow(name='remax'),
    slow(name='ppo', kl=0.05),
    slow(name='trepo', count=2, samples=2),
    slow(name='trepo_tree', count=2, samples=2),
  ],
  ids=lambda algorithm: algorithm['name'],
)
@pytest.mark.parametrize('equal', [False, True], ids=['varied', 'equal'])
def test_a_step_in_which_every_response_is_cut_off(algorithm, equal):
  config = scripts.tiny_config()
  config.rollout.update(prompts=4, samples=4, max_tokens=4)
  config.algorithm = algorithm
  pay = lambda completions: [0.0 if equal else len(set(t)) for t in completions]
  rl, state, model = steps.begin(config, pay)
  # No token ends a response.
  rl.generation = dataclasses.replace(rl.generation, eos_ids=())
  before = jax.device_get(model.params)
  result = rl.step(state, 0)
  metrics = result.metrics
  assert metrics['completions/clipped_ratio'] == 1.0
  assert metrics['completions/mean_length'] == 4.0
  assert all(np.isfinite(value) for value in metrics.values()), metrics
  assert metrics['skipped'] == 0
  assert np.isfinite(result.advantages).all()
  after = jax.device_get(result.state.trainable['policy'])
  for x in jax.tree.leaves(after):
    assert np.isfinite(x).all()
  if not equal:
    assert metrics['grad_norm'] > 0 and steps.moved(before, after) > 0
