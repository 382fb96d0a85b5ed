"""The step as a value: what it leaves to its caller, and what it refuses."""

import jax
import numpy as np
import optax
import pytest
import steps
import trees

from jaxrl_llm import estimators as est
from jaxrl_llm import minibatches, rollouts, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.tasks import prompts, sources, vocabulary

TOKENIZER = vocabulary.character_tokenizer('0123456789+=')
MODEL = ModelConfig(len(TOKENIZER), 16, 32, 1, 2, max_length=64, tied=True)
ROWS = [{'prompt': f'{a}+{b}='} for a in range(4) for b in range(4)]
ENCODED = prompts.encode_prompts(ROWS, TOKENIZER, max_tokens=8)
GENERATION = rollouts.Generation(
  samples=4,
  max_tokens=6,
  eos_ids=(TOKENIZER.eos_token_id,),
  pad_id=ENCODED.pad_id,
)


def ones(completions, **columns):
  return [text.count('1') / 6 for text in completions]


def make(estimator, **settings):
  return training.online(
    MODEL, TOKENIZER, estimator, optax.sgd(0.1), [ones], GENERATION, **settings
  )


@pytest.fixture(scope='module')
def params():
  return transformer.init(MODEL, jax.random.key(0))


NEEDS = {
  'rloo': est.rloo(),
  'grpo with a reference': est.grpo(kl=0.1),
  'remax': est.remax(),
  'trepo': est.trepo(count=1, samples=2),
  'ppo': est.ppo(),
}


@pytest.mark.parametrize('name', NEEDS)
def test_steps_leave_the_callers_parameters_usable(name, params):
  """Also as the reference, which a second step reads again."""
  before = jax.device_get(params)
  trainer = make(NEEDS[name], reference=params, critic=training.separate(MODEL))
  state, key = trainer.init(params), jax.random.key(1)
  source = sources.PromptSource(ENCODED, 4, seed=0)
  for step in range(2):
    state, metrics, sampled = trainer.step(
      state, source.batch(step), jax.random.fold_in(key, step)
    )
    assert np.isfinite(metrics['loss']) and metrics['skipped'] == 0
    assert sampled.advantages.shape == (4, 4)
    assert len(sampled.responses.completions) == 16
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(params))
  assert steps.moved(params, state.trainable['policy']) > 0
  assert int(state.updates) == 2


def test_a_step_is_a_function_of_state_prompts_and_key(params):
  source = sources.PromptSource(ENCODED, 4, seed=0)
  results = []
  for micro_prompts in (None, 2):
    trainer = make(est.rloo(), micro_prompts=micro_prompts)
    state, metrics, sampled = trainer.step(
      trainer.init(params), source.batch(0), jax.random.key(2)
    )
    results.append((state, metrics, sampled.responses.completions))
  (one, _, texts), (two, _, again) = results
  assert texts == again
  trees.assert_close(one.trainable, two.trainable)


def test_epochs_differ_in_order_and_running_numbers_move(params, monkeypatch):
  orders, split = [], minibatches.minibatches

  def watched(*arguments):
    parts = list(split(*arguments))
    orders.append(np.concatenate([part.tokens for part, _ in parts]).tolist())
    return parts

  monkeypatch.setattr(minibatches, 'minibatches', watched)
  trainer = make(est.reinforce_baseline(0.8), minibatches=2, epochs=2)
  batch = sources.PromptSource(ENCODED, 8, seed=0).batch(0)
  state, metrics, _ = trainer.step(
    trainer.init(params), batch, jax.random.key(3)
  )
  first, second = orders
  assert first != second and sorted(first) == sorted(second)
  assert int(state.updates) == 4
  (running,) = state.running.values()
  expected = pytest.approx(0.2 * metrics['reward'], rel=1e-5)
  assert 0 < float(running) == expected


def test_what_is_missing_is_named():
  with pytest.raises(UserError, match='reference=params'):
    make(est.grpo(kl=0.1))
  with pytest.raises(UserError, match='critic=training.separate'):
    make(est.ppo())


# TRL's example of rewards for several tasks: each is None for the others'.


def math_reward(prompts, completions, task, **kwargs):
  return [
    text.count('1') / 6 if name == 'math' else None
    for text, name in zip(completions, task, strict=True)
  ]


def coding_reward(prompts, completions, task, **kwargs):
  return [
    text.count('+') / 6 if name == 'coding' else None
    for text, name in zip(completions, task, strict=True)
  ]


def test_rewards_of_two_tasks_train_both(params):
  """Each returns None for the other's prompts, as in TRL's documentation."""
  rows = [
    row | {'task': ('math', 'coding')[i % 2]} for i, row in enumerate(ROWS)
  ]
  encoded = prompts.encode_prompts(rows, TOKENIZER, max_tokens=8)
  source = sources.PromptSource(encoded, 16, seed=0)
  parts = est.rloo(), optax.adam(0.02), [math_reward, coding_reward]
  trainer = training.online(MODEL, TOKENIZER, *parts, GENERATION)
  state, means = trainer.init(params), []
  for step in range(25):
    key = jax.random.fold_in(jax.random.key(4), step)
    state, metrics, sampled = trainer.step(state, source.batch(step), key)
    scores = sampled.responses.scores
    assert scores.valid.all() and not scores.failures
    assert metrics['rewards/math_reward/none'] == 32
    both = [metrics[f'rewards/{n}_reward/mean'] for n in ('math', 'coding')]
    assert metrics['reward'] == pytest.approx(np.mean(both), rel=1e-5)
    means.append(both)
  first, last = np.mean(means[:3], axis=0), np.mean(means[-3:], axis=0)
  assert (last > first + 0.2).all(), (first, last)


def test_a_response_without_any_score_leaves_its_group(params):
  """The others' baseline is the mean of what is left."""

  def sometimes(completions):
    return [len(t) / 6 if len(t) % 2 else None for t in completions]

  def never(completions):
    return [None] * len(completions)

  trainer = training.online(
    MODEL, TOKENIZER, est.rloo(), optax.sgd(0.1), [sometimes, never], GENERATION
  )
  batch = sources.PromptSource(ENCODED, 8, seed=0).batch(0)
  _, _, sampled = trainer.step(trainer.init(params), batch, jax.random.key(5))
  scores = sampled.responses.scores
  shape = sampled.advantages.shape
  rewards, valid = scores.total.reshape(shape), scores.valid.reshape(shape)
  assert 0 < valid.sum() < valid.size
  for group, scored, found in zip(
    rewards, valid, sampled.advantages, strict=True
  ):
    expected = np.zeros(len(group))
    for i in np.flatnonzero(scored):
      others = [group[j] for j in np.flatnonzero(scored) if j != i]
      expected[i] = group[i] - np.mean(others) if others else 0.0
    np.testing.assert_allclose(found, expected, atol=1e-6)
