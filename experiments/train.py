"""Online reinforcement learning of a language model.

    python -m experiments.train --config=experiments/configs/quickstart.py

A run writes everything into one folder, `--workdir` (default: runs/ and the
configuration's name), and `--resume` continues it, bit for bit:

    python -m experiments.train --workdir=runs/quickstart --resume

Without --config it is continued by its own config.json, whose functions named
as file.py:function or module:function are executed with --trust_code alone.
"""

import types

import jax
import numpy as np

from experiments import (
  build,
  checks,
  cli,
  critics,
  run,
  stored_runs,
  validation,
)
from experiments.phase import Evaluation, Script
from experiments.reinforcement import Reinforcement
from experiments.schedule import Round
from jaxrl_llm import training
from jaxrl_llm.errors import UserError


class Online:
  """Online RL as the main phase of a run; see `phase.Phase`.

  Args:
    config: the whole configuration.
    model: the model to train.
    data: of the task.
    key: PRNG key of the run.
    folder: of the run.
  """

  round = Round()
  curves = types.MappingProxyType({'eval/reward': 'held-out reward'})

  def __init__(self, config, model: build.Model, data, key, folder):
    del folder
    self._config, self._model = config, model
    self._rl = Reinforcement(config, model, data.train, key)
    self._prompts = len(data.train)
    self._held_out = validation.build_held_out(
      config, model, data.held_out, self._rl.rewards, _held_out_key(key)
    )
    self.estimator = self._rl.estimator
    self.keeps_reference = self.estimator.needs.reference
    self.begin, self.shapes = self._rl.begin, self._rl.shapes
    self.step = self._rl.step

  @property
  def key(self):
    return self._rl.key

  @key.setter
  def key(self, key):
    self._rl.key = key
    self._held_out = self._held_out._replace(key=_held_out_key(key))

  @property
  def reference(self):
    return self._rl.reference

  @reference.setter
  def reference(self, params):
    self._rl.reference = params

  def start(self, state: training.TrainState) -> list[str]:
    """Decides whose log-probabilities count."""
    difference = self._rl.log_prob_difference(state, 0)
    limit = self._config.rollout.log_prob_tolerance
    if not np.isfinite(difference):
      raise UserError(
        f'log-probabilities of sampler and trainer differ by {difference}\n'
        "the model's parameters give no finite log-probabilities"
      )
    self._rl.rescore = difference > limit
    if not self._rl.rescore:
      return []
    return [
      f'sampler and trainer differ by {difference:.2g} nats, more than '
      f'{limit:.2g}: the trainer recomputes log-probabilities'
    ]

  def save(self):
    return {'rescore': self._rl.rescore}

  def load(self, values) -> None:
    self._rl.rescore = values['rescore']

  def fingerprint(self):
    return {
      'rl': self._rl.source.fingerprint(),
      'held-out': self._held_out.fingerprint(),
    }

  def evaluate(self, trainable, step: int, stop) -> Evaluation:
    return validation.evaluate(
      self._held_out,
      trainable['policy'],
      step,
      self._config.log.table,
      self._rl.reference,
      stop,
    )

  def finish(self, trainable, folder) -> list[str]:
    trained = self._model._replace(params=trainable['policy'])
    stored_runs.export(trained, folder / 'hf')
    return ['hf/ (for transformers)']

  def describe(self) -> list[str]:
    held = self._held_out.encoded
    lines = [
      f'{self._prompts - self._rl.dropped:,} training and '
      f'{len(held.rows):,} held-out prompts; dropped as over '
      f'budget: {self._rl.dropped:,} and {held.dropped:,}'
    ]
    per_step = self._config.rollout.prompts
    known = self._prompts - self._rl.dropped
    if per_step > known:
      lines.append(
        f'{per_step:,} prompts per step (config.rollout.prompts) of {known:,}: '
        'each step repeats some'
      )
    if self._rl.critic is not None:
      lines.append(critics.describe(self._config))
    return lines


def _held_out_key(key):
  return jax.random.fold_in(key, 4)


SCRIPT = Script(checks.check, Online)


def train(config, workdir, resume: bool = False) -> int:
  """Trains in a folder; see `run.train`."""
  return run.train(SCRIPT, config, workdir, resume)


if __name__ == '__main__':
  run.define_flags()
  cli.run(lambda: run.main(SCRIPT))
