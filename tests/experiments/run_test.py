"""What a run keeps of a main phase that is cut short before it has learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scripts

from experiments import run
from experiments.schedule import Cycle, Evaluation, Result, Script
from jaxrl_llm import estimators, training
from jaxrl_llm.errors import UserError


class Doubling:
  """A main phase whose state is not that of the warm start.

  Its step doubles a number; the first one may fail, as a reward may.
  """

  cycle, keeps_reference, reference = Cycle(), False, None
  curves = {'eval/number': 'number'}
  estimator = estimators.sft()
  failure = None

  def __init__(self, config, model, data, key, folder):
    self.key = key

  def begin(self, policy_params):
    trainable = {'policy': policy_params, 'number': jnp.ones(3)}
    return training.init_state(trainable, optax.adam(1e-3))

  def shapes(self, policy_params):
    return jax.eval_shape(self.begin, policy_params)

  def start(self, state):
    return []

  def step(self, state, number, stop):
    if self.failure is not None:
      raise self.failure
    doubled = state.trainable | {'number': 2 * state.trainable['number']}
    return Result(state.replace(trainable=doubled), {'loss': 1.0}, {})

  def save(self):
    return {}

  def load(self, values):
    pass

  def fingerprint(self):
    return {'own': {}}

  def evaluate(self, trainable, step, stop):
    number = trainable.get('number', np.ones(3))
    return Evaluation({'eval/number': float(number[0])})

  def finish(self, trainable, folder):
    (folder / 'number').write_text(str(float(trainable['number'][0])))
    return ['number']

  def describe(self):
    return []


def configuration(prompts: int):
  """Of a run that is over in a moment."""
  config = scripts.tiny_config()
  config.task.update(train=12, held_out=8, demonstrations=20)
  config.warm_start.update(steps=0, batch=2)
  config.warm_start.optimizer.warmup_updates = 0
  config.rollout.prompts = prompts
  config.steps = 9
  config.checkpoints.every = 2
  config.evaluation.every = 4
  return config


@pytest.mark.slow
def test_a_first_step_that_fails_is_tried_again(tmp_path, monkeypatch):
  config, workdir = configuration(prompts=4), tmp_path / 'run'
  config.warm_start.steps, config.steps = 1, 2
  script = Script(lambda config: None, Doubling)
  train = lambda: run.train(script, config.lock(), workdir, resume=True)
  with monkeypatch.context() as patch:
    patch.setattr(Doubling, 'failure', UserError('a reward is NaN'))
    for _ in range(2):
      with pytest.raises(UserError, match='a reward is NaN'):
        train()
  assert train() == 0
  assert (workdir / 'number').read_text() == '4.0'
  records = scripts.records(workdir)
  assert [record['step'] for record in records] == [1, 2, 3]
  assert [record['eval/number'] for record in records[::2]] == [1.0, 4.0]
