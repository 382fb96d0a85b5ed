"""The step as a value: what it leaves to its caller, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
  moved = jax.tree.map(
    lambda x, y: jnp.abs(x - y).max(), params, state.trainable['policy']
  )
  assert max(jax.tree.leaves(moved)) > 0
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
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    one.trainable,
    two.trainable,
  )


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
