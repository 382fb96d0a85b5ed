"""Supervised learning of solutions, and the trainer of stored groups."""

import time

from experiments import build
from experiments.schedule import Result
from jaxrl_llm import estimators, sharding, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.rollouts import stored
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks import sources


def decoding(model: build.Model) -> policy.Decoding:
  """Returns the model's distribution, whose likelihood is maximised."""
  return policy.Decoding(num_tokens=build.known_tokens(model))


def trainer(
  config, model: build.Model, estimator: estimators.Estimator, optimizer
) -> training.OfflineTrainer:
  """Builds the trainer that takes `config.rounds.batch` groups at a time."""
  preferences = estimator.needs.samples > 1
  return training.offline(
    model.config,
    estimator,
    optimizer,
    decoding=decoding(model),
    micro_prompts=batch(config),
    chunk=config.training.chunk,
    per_token={'entropy': lambda outputs, batch: outputs.entropy},
    per_response=diagnostics.preference_statistics() if preferences else None,
  )


def batch(config) -> int:
  """Returns the number of groups in memory at one time."""
  return config.training.micro_prompts or config.rounds.batch


def demonstrations(
  config, model: build.Model, rows: list[dict]
) -> tuple[prompts_lib.EncodedPrompts, stored.Pool]:
  """Encodes prompts and worked solutions as token ids.

  Args:
    config: the whole configuration.
    model: model with tokenizer and end tokens.
    rows: rows with a 'solution'.

  Raises:
    UserError: a solution is missing, too long or cannot be encoded, or the
      tokenizer has no end token.
  """
  encoded = build.encode(config, rows, model.tokenizer)
  solutions = build.encode_targets(config, encoded.rows, model, 'solution')
  count = len(solutions)
  pool = stored.given(
    range(count),
    [[ids] for ids in solutions],
    [[1.0]] * count,
    encoded.pad_id,
  )
  return encoded, pool


class WarmStart:
  """Maximum likelihood of the task's worked solutions.

  Args:
    config: the whole configuration.
    model: the model to train.
    rows: demonstrations with a 'solution'.
  """

  def __init__(self, config, model: build.Model, rows: list[dict]):
    settings = config.warm_start
    if settings.steps and not rows:
      raise UserError(
        f'config.warm_start.steps is {settings.steps}, but the task '
        'has no demonstrations\nset it to 0, or add a solution to the rows'
      )
    self.steps = settings.steps
    self.optimizer, self._schedule = build.optimizer(
      settings.optimizer, self.steps
    )
    if not self.steps:
      return
    sharding.check_rows(settings.batch, 1, 'config.warm_start.batch')
    encoded, self._pool = demonstrations(config, model, rows)
    self.source = sources.PromptSource(encoded, settings.batch, config.seed)
    self._trainer = training.offline(
      model.config,
      estimators.sft(),
      self.optimizer,
      decoding=decoding(model),
      chunk=config.training.chunk,
    )

  def step(self, state: training.TrainState, step: int) -> Result:
    """Takes one supervised update."""
    start = time.perf_counter()
    rate = float(self._schedule(int(state.updates)))
    groups = stored.take(self._pool, self.source.indices(step))
    state, metrics = self._trainer.step(state, groups, self.source.batch(step))
    record = {
      'warm_start/loss': metrics['loss'],
      'warm_start/grad_norm': metrics['grad_norm'],
      'warm_start/learning_rate': rate,
      'skipped': metrics['skipped'],
    }
    return Result(state, record, {'step_time': time.perf_counter() - start})
