"""Reward model training on pairs of a preferred and a rejected response.

    python -m experiments.reward_model \\
      --config=experiments/configs/hh_rlhf_reward_model.py

The pairs come from the task's columns prompt, chosen and rejected;
`experiments.label` makes such rows from a model's samples and any reward
function.  The trunk is initialised from the language model in `config.model`.
`config.steps` is the number of updates on `config.rounds.batch` pairs each; the
loss is that of Bradley and Terry.  Accuracy and calibration are measured on
held-out pairs.  --workdir and --resume are the same as in `experiments.train`.

The run writes `hf/`, a folder that `transformers` opens as
AutoModelForSequenceClassification.  To use it as a reward and as the initial
critic:

    config.rewards = dict(
      proxy=dict(name='reward_model', path='runs/NAME/hf'),
      gold=dict(name='sentiment', weight=0.0),  # logged only
    )
    config.critic.path = 'runs/NAME/hf'

  hf/               trunk, head and tokenizer
  calibration.json  accuracy, log-loss and reliability on held-out pairs
  calibration.png
"""

import json
import pathlib
import time
import types

import numpy as np

from experiments import build, checks, cli, offline_checks, run
from experiments.schedule import Cycle, Evaluation, Phase, Result, Script
from jaxrl_llm import processes, runs, sharding, training
from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.evaluation import calibration
from jaxrl_llm.models import value_head
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.rollouts import stored, to_prompts
from jaxrl_llm.runs.metrics import cannot_write
from jaxrl_llm.tasks import pairs as pairs_lib
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks import sources
from jaxrl_llm.training import critic
from jaxrl_llm.training import reward_model as reward_model_lib


def check(config) -> None:
  """Raises UserError for settings that the script does not support."""
  offline_checks.check(config, names=('reward_model',), sampled=False)
  if config.rewards:
    raise UserError(
      'config.rewards is set, but a reward model learns from pairs alone\n'
      'remove it; `experiments.label` makes pairs from rewards'
    )
  checks.check_unused(
    config, ['warm_start.steps'], 'but a reward model does not generate text'
  )


def encode(config, model: build.Model, rows: list[dict]):
  """Encodes pairs as prompts and a pool; excludes or refuses those too long.

  The common beginning of a pair's texts is read once, as its prompt, up to
  `config.prompts.max_tokens`; the rest belongs to the responses, which may have
  `config.rollout.max_tokens` each.

  Returns:
    (EncodedPrompts, Pool).

  Raises:
    UserError: a row is not a pair, or too long.
  """
  shared, budget = config.prompts.max_tokens, config.rollout.max_tokens
  build.check_room(config, model)
  pairs = pairs_lib.encode_pairs(
    rows,
    model.tokenizer,
    max_tokens=None,
    **build.around_prompts(config),
  )
  responses = [
    [pair.prompt[shared:] + ids for ids in (pair.chosen, pair.rejected)]
    for pair in pairs
  ]
  lengths = [max(map(len, both)) for both in responses]
  kept = [i for i, length in enumerate(lengths) if length <= budget]
  long = len(rows) - len(kept)
  if long and (config.prompts.overlong == 'error' or not kept):
    raise UserError(
      f'{long} of {len(rows)} pairs have a text of more than '
      f'config.rollout.max_tokens, {budget}, after the {shared} of '
      f'config.prompts.max_tokens; the longest has {max(lengths)}\n'
      "raise them, or exclude such pairs with config.prompts.overlong='drop'"
    )
  encoded = prompts_lib.from_ids(
    [pairs[i].prompt[:shared] for i in kept],
    [rows[i] for i in kept],
    model.tokenizer,
    shared,
  )._replace(dropped=long)
  pool = stored.given(
    range(len(kept)),
    [responses[i] for i in kept],
    [[1.0, 0.0]] * len(kept),
    encoded.pad_id,
  )
  return encoded, stored.narrowed(pool)


class RewardModeling(Phase):
  """Bradley-Terry training as the main phase of a run.

  Args:
    config: the whole configuration.
    model: the language model that the trunk is initialised from.
    data: data of the task.
    key: PRNG key of the run, which is not used.
    folder: folder of the run.
  """

  curves = types.MappingProxyType({'eval/accuracy': 'held-out accuracy'})

  def __init__(self, config, model: build.Model, data, key, folder):
    self._config, self.model, self.key = config, model, key
    self.cycle = Cycle(0, config.steps or 1)
    self.estimator = build.reference(config)
    self._critic = critic.separate(model.config)
    self._encoded, self._pool = encode(config, model, data.train)
    limit = config.evaluation.prompts or None
    self._held_out = encode(config, model, data.held_out[:limit])
    self._source = sources.PromptSource(
      self._encoded, config.rounds.batch, config.seed
    )
    self.optimizer, self._schedule = build.optimizer(
      config.optimizer, self.cycle.learning
    )
    self._micro = config.training.micro_prompts or config.rounds.batch
    self._trainer = training.offline(
      model.config,
      self.estimator,
      self.optimizer,
      micro_prompts=self._micro,
      forward=reward_model_lib.forward(model.config),
      per_response=diagnostics.score_statistics(),
    )

  def begin(self, policy_params) -> training.TrainState:
    return training.init_state(
      {'critic': self._critic.init(policy_params)}, self.optimizer
    )

  def step(self, state, number: int, stop) -> Result:
    del stop
    start = time.perf_counter()
    rate = float(self._schedule(int(state.updates)))
    groups = stored.take(self._pool, self._source.indices(number))
    prompts = self._source.batch(number)
    state, metrics = self._trainer.step(state, groups, prompts)
    record = {
      'loss': metrics['loss'],
      'grad_norm': metrics['critic/grad_norm'],
      'learning_rate': rate,
      'skipped': metrics['skipped'],
      'rounds/epoch': (number + 1)
      * self._config.rounds.batch
      / len(self._encoded.rows),
      **{name: metrics[name] for name in diagnostics.score_statistics()},
    }
    return Result(state, record, {'step_time': time.perf_counter() - start})

  def fingerprint(self):
    held, _ = self._held_out
    return {
      'training': self._source.fingerprint(),
      'held-out': sources.PromptSource(held, 1, 0).fingerprint(),
    }

  def evaluate(self, trainable, step: int, stop) -> Evaluation:
    del step
    result = calibration.examine(self._margins(trainable, stop))
    return Evaluation(
      {
        'eval/accuracy': result.accuracy.mean,
        'eval/log_loss': result.log_loss.mean,
        'eval/calibration_error': result.error,
        'eval/temperature': result.temperature,
      }
    )

  def finish(self, trainable, folder: pathlib.Path) -> list[str]:
    params = trainable['critic']
    folders.save_trunk(
      folder / 'hf',
      self._critic.config,
      params['trunk'],
      params['value'],
      tokenizer=self.model.tokenizer,
      source=self.model.source,
    )
    result = calibration.examine(self._margins(trainable))
    text = json.dumps(_plain(result), indent=1, allow_nan=False) + '\n'
    if processes.is_main():
      path = folder / 'calibration.json'
      try:
        write_atomically(path, text)
      except OSError as error:
        raise cannot_write(path, error.strerror) from error
      _plot(folder / 'calibration.png', result)
    return ['hf/ (for transformers)', 'calibration.json', 'calibration.png']

  def describe(self) -> list[str]:
    held, _ = self._held_out
    return [
      f'{len(self._encoded.rows):,} training and {len(held.rows):,} held-out '
      f'pairs; excluded as over budget: {self._encoded.dropped:,} and '
      f'{held.dropped:,}'
    ]

  def _margins(self, trainable, stop=None) -> np.ndarray:
    """Returns s⁺ − s⁻ of the held-out pairs, [N], nats."""
    encoded, pool = self._held_out
    count, scores = len(pool.prompts), []
    for start in range(0, count, self._micro):
      if stop is not None:
        stop.check()
      # The last part is padded, so that few shapes are compiled.
      part = [min(i, count - 1) for i in range(start, start + self._micro)]
      scores.append(
        value_head.score(
          self.model.config,
          trainable['critic'],
          to_prompts(prompts_lib.gather(encoded, part)),
          stored.take(pool, part).tokens,
          stored.take(pool, part).lengths,
          self._micro,
        )
      )
    both = np.concatenate(sharding.to_host(scores))[:count].astype(np.float64)
    return both[:, 0] - both[:, 1]


def _plain(value):
  """Converts to JSON values: NaN and the infinities become null."""
  if hasattr(value, '_asdict'):
    return {name: _plain(x) for name, x in value._asdict().items()}
  if isinstance(value, list | tuple):
    return [_plain(x) for x in value]
  return None if isinstance(value, float) and not np.isfinite(value) else value


def _plot(path: pathlib.Path, result: calibration.Calibration) -> None:
  """Plots the reliability diagram."""
  filled = [one for one in result.bins if one.count]
  points = np.array([[one.confidence, one.accuracy] for one in filled]).T
  runs.plot_curve(
    path,
    {
      f'{result.count:,} held-out pairs': (points[0], points[1]),
      'perfect calibration': (np.array([0.5, 1.0]), np.array([0.5, 1.0])),
    },
    xlabel='confidence σ(|s⁺ − s⁻|), mean of a bin',
    ylabel='share of pairs ranked correctly',
    title=f'calibration error {result.error:.3f}',
  )


SCRIPT = Script(check, RewardModeling)


if __name__ == '__main__':
  run.define_flags()
  cli.run(lambda: run.main(SCRIPT))
