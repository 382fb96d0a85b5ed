"""Responses that are all cut off, and padding behind them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from experiments import build, checks, reinforcement
from experiments.configs import quickstart
from jaxrl_llm import estimators as est
from jaxrl_llm import policy, training
from jaxrl_llm.rewards import RewardPart

PROMPTS, SAMPLES, LENGTH = 2, 4, 5
# Each kind of weighting, and of loss.
RECIPES = {
  'rloo': est.rloo(),
  'grpo': est.grpo(),
  'dr_grpo': est.dr_grpo(7),
  'dapo': est.dapo(7, 2),
  'gspo': est.gspo(),
  'sft': est.sft(),
}


def widened(rollouts, more):
  """The same with so many positions of padding behind each response."""
  width = (0, 0), (0, 0), (0, more)
  return toys.changed(
    rollouts, lambda a: a if a.shape[2] == 1 else np.pad(a, width)
  )


def loss_and_size(name, rollouts):
  """A float32 loss of a transformer, and the size of what it is a sum of.

  Terms of both signs cancel: rounding is that of their sum without signs.
  """
  config, params = toys.make_policy(num_layers=1)
  prompts = toys.make_prompts([3, 1])
  estimator, optimizer = RECIPES[name], optax.sgd(0.1)
  batch = jax.jit(estimator.prepare)(rollouts)
  update = training.make_update(
    training.policy_forward(config, policy.Decoding()),
    estimator,
    optimizer,
    PROMPTS,
  )
  trainable = {'policy': jax.tree.map(jnp.copy, params)}
  state = training.init_state(trainable, optimizer)
  _, metrics = update(state, None, prompts, batch)

  @jax.jit
  def terms(log_probs):
    loss = lambda x: estimator.loss(
      est.Outputs(log_probs=x, entropy=jnp.zeros_like(x)), batch
    )
    return jnp.abs(jax.grad(loss)(log_probs) * log_probs)

  log_probs = jax.jit(policy.score, static_argnames='config')(
    config, params, prompts, batch.tokens
  ).log_probs
  kept = np.asarray(batch.mask & batch.valid)
  size = np.asarray(terms(jnp.where(kept, log_probs, 0.0)))[kept].sum()
  return np.asarray(metrics['loss']), size


@pytest.mark.parametrize(
  'name, full, more',
  [('dapo', False, 11)]
  + [
    pytest.param(name, full, more, marks=pytest.mark.slow)
    for name in RECIPES
    for full in (False, True)
    for more in (3, 11)
  ],
)
def test_padding_changes_a_loss_by_its_last_bit(name, full, more):
  rollouts, _ = toys.random_rollouts(
    1, PROMPTS, SAMPLES, LENGTH, full=full, dtype=np.float32
  )
  rollouts = toys.rows_for(RECIPES[name], rollouts)
  narrow, size = loss_and_size(name, rollouts)
  wide, _ = loss_and_size(name, widened(rollouts, more))
  assert narrow.dtype == np.float32 and np.isfinite(narrow) and narrow != 0
  ulp = np.spacing(np.float32(max(abs(narrow), size)))
  print(name, full, more, narrow, size, (wide - narrow) / ulp)
  assert abs(wide - narrow) <= ulp


@functools.cache
def setting():
  config = quickstart.get_config()
  config.rollout.update(prompts=4, samples=4, max_tokens=4)
  config.model.architecture.update(
    hidden_size=16, intermediate_size=16, num_layers=1
  )
  model = build.model(config.model, config.seed)
  return config, model, build.dataset(config, model.tokenizer)


def slow(**algorithm):
  return pytest.param(algorithm, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  'algorithm',
  [
    slow(name='grpo'),
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
  config, model, data = setting()
  config = config.copy_and_resolve_references()
  config.algorithm = algorithm
  checks.check(config)
  rl = reinforcement.Reinforcement(config, model, data.train, jax.random.key(0))
  # No token ends a response.
  rl.generation = dataclasses.replace(rl.generation, eos_ids=())
  rl.reference = model.params
  pay = lambda completions: [0.0 if equal else len(set(t)) for t in completions]
  rl.rewards = [RewardPart('pay', pay)]
  before = jax.device_get(model.params)
  result = rl.step(rl.begin(jax.tree.map(jnp.copy, model.params)), 0)
  metrics = result.metrics
  assert metrics['completions/clipped_ratio'] == 1.0
  assert metrics['completions/mean_length'] == 4.0
  assert all(np.isfinite(value) for value in metrics.values()), metrics
  assert metrics['skipped'] == 0
  assert np.isfinite(result.advantages).all()
  after = jax.device_get(result.state.trainable['policy'])
  for x in jax.tree.leaves(after):
    assert np.isfinite(x).all()
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, after)
  if not equal:
    assert metrics['grad_norm'] > 0 and max(jax.tree.leaves(moved)) > 0
