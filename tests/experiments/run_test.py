"""What a run keeps of a main phase that is cut short before it has learned."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import run
from experiments.configs import quickstart
from experiments.schedule import Cycle, Evaluation, Result, Script
from jaxrl_llm import estimators, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.signals import StopRequested


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


@pytest.mark.slow
@pytest.mark.parametrize(
  'failure', [UserError('a reward is NaN'), StopRequested('SIGTERM')]
)
def test_a_first_step_that_fails_is_tried_again(failure, tmp_path, monkeypatch):
  config = quickstart.get_config()
  config.model.architecture.update(
    hidden_size=16, intermediate_size=16, num_layers=1
  )
  config.task.update(train=24, held_out=8, demonstrations=20)
  config.warm_start.update(steps=1, batch=2)
  config.warm_start.optimizer.warmup_updates = 0
  config.steps = 2
  script = Script(lambda config: None, Doubling)

  def train():
    return run.train(script, config.lock(), tmp_path / 'run', resume=True)

  monkeypatch.setattr(Doubling, 'failure', failure)
  # Also where it begins anew: nothing was learned since the warm start.
  for _ in range(2):
    if isinstance(failure, UserError):
      with pytest.raises(UserError, match='a reward is NaN'):
        train()
    else:
      assert train() == 143
  monkeypatch.setattr(Doubling, 'failure', None)
  assert train() == 0
  assert (tmp_path / 'run' / 'number').read_text() == '4.0'
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record['step'] for record in records] == [1, 2, 3]
  assert [record['eval/number'] for record in records[::2]] == [1.0, 4.0]
