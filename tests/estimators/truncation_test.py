"""Responses that are all cut off, and padding behind them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from experiments import build, checks, online
from experiments.configs import quickstart
from jaxrl_llm import estimators as est
from jaxrl_llm import training
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.sampling import policy

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


@jax.jit
def of_outputs(rollouts, outputs):
  """Loss of each recipe, from log-probabilities that are given."""
  return {
    name: estimator.loss(
      outputs, estimator.prepare(toys.rows_for(estimator, rollouts))
    )
    for name, estimator in RECIPES.items()
  }


@pytest.mark.parametrize('full', [False, True])
def test_padding_changes_a_loss_by_at_most_its_last_bit(full):
  """In float32; in float64 `contracts_test` asserts it of every recipe."""
  rollouts, outputs = toys.random_rollouts(
    1, PROMPTS, SAMPLES, LENGTH, full=full, dtype=np.float32
  )
  narrow = of_outputs(rollouts, outputs)
  for more in (3, 11):
    wide = of_outputs(widened(rollouts, more), widened(outputs, more))
    for name, loss in narrow.items():
      assert loss.dtype == np.float32 and np.isfinite(loss) and loss != 0
      ulp = np.spacing(np.float32(abs(loss)))
      assert abs(wide[name] - loss) <= ulp, name


def of_model(name, rollouts):
  """Loss of a transformer, and Σ |∂ loss / ∂ log-probability|."""
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
  found = jax.jit(policy.score, static_argnames='config')(
    config, params, prompts, batch.tokens
  )
  loss = lambda x: estimator.loss(
    est.Outputs(log_probs=x, entropy=found.entropy), batch
  )
  kept = np.asarray(batch.mask & batch.valid)
  pull = jax.jit(jax.grad(loss))(jnp.where(kept, found.log_probs, 0.0))
  return np.asarray(metrics['loss']), np.abs(pull)[kept].sum()


@pytest.mark.slow
@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('name', RECIPES)
def test_padding_behind_a_transformer(name, full):
  """The loss moves with its log-probabilities, and they by their rounding.

  Attention sums over more keys, in another order: these log-probabilities, of
  up to 4.7 nats, move by up to 7.2e-7.
  """
  rollouts, _ = toys.random_rollouts(
    1, PROMPTS, SAMPLES, LENGTH, full=full, dtype=np.float32
  )
  rollouts = toys.rows_for(RECIPES[name], rollouts)
  narrow, pull = of_model(name, rollouts)
  assert narrow.dtype == np.float32 and np.isfinite(narrow) and narrow != 0
  for more in (3, 11):
    wide, _ = of_model(name, widened(rollouts, more))
    moved = abs(wide - narrow)
    assert moved <= 2e-6 * pull + np.spacing(abs(narrow))
    # RLOO's loss is a difference of larger numbers.
    units = 64 if name == 'rloo' else 4
    assert moved <= units * np.spacing(abs(narrow))


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
  config, model, data = setting()
  config = config.copy_and_resolve_references()
  config.algorithm = algorithm
  checks.check(config)
  rl = online.Steps(config, model, data.train, jax.random.key(0))
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
