"""Updates on responses that are there: a warm start, and what others build on.

A batch is drawn from a pool by `PromptSource`: a function of the seed and the
update's number.
"""

import time
from typing import Any

import jax
import numpy as np

from experiments import build
from experiments.phase import Result
from jaxrl_llm import estimators, rollouts, sharding, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.rollouts import stored
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks import sources


def decoding(model: build.Model) -> policy.Decoding:
  """The model's own distribution, of which likelihoods are maximised."""
  return policy.Decoding(num_tokens=build.known_tokens(model))


def make_update(
  config, model: build.Model, estimator: estimators.Estimator, optimizer
) -> training.Update:
  """The update of `config.rounds.batch` groups at a time."""
  preferences = estimator.needs.samples > 1
  return training.make_update(
    training.policy_forward(
      model.config, decoding(model), config.training.chunk
    ),
    estimator,
    optimizer,
    config.training.micro_prompts or config.rounds.batch,
    {'entropy': lambda outputs, batch: outputs.entropy},
    diagnostics.preference_statistics() if preferences else None,
  )


def score_pool(
  config,
  model: build.Model,
  params,
  pool: stored.Pool,
  encoded: prompts_lib.EncodedPrompts,
  stop=None,
) -> np.ndarray:
  """[N, g, T] log-probabilities of a pool's tokens, nats; 0 behind the ends.

  Args:
    config: the whole configuration.
    model: outline of the policy.
    params: of the policy.
    pool: N groups.
    encoded: what the pool's prompts are positions in.
    stop: polled between parts.
  """
  count = len(pool.prompts)
  size = config.training.micro_prompts or config.rounds.batch
  scored = []
  for start in range(0, count, size):
    if stop is not None:
      stop.check()
    # The last part is filled up, so that one shape is compiled.
    part = [min(i, count - 1) for i in range(start, start + size)]
    groups = stored.take(pool, part)
    found = rollouts.score_tokens(
      model.config,
      params,
      rollouts.to_prompts(prompts_lib.gather(encoded, groups.prompts)),
      sharding.place_rows(groups.tokens),
      decoding(model),
      size,
      config.training.chunk,
    )
    mask = np.arange(groups.tokens.shape[2]) < groups.lengths[..., None]
    scored.append(np.where(mask, sharding.to_host(found.log_probs), 0.0))
  if not scored:
    return np.zeros(pool.tokens.shape, np.float32)
  return np.concatenate(scored)[:count].astype(np.float32)


def take_update(
  update: training.Update,
  estimator: estimators.Estimator,
  state: training.TrainState,
  pool: stored.Pool,
  source: sources.PromptSource,
  number: int,
) -> tuple[training.TrainState, dict[str, Any]]:
  """One update on the groups that a source over a pool's prompts chooses.

  Args:
    update: of `training.make_update`.
    estimator: of the same.
    state: before it.
    pool: what is trained on.
    source: over the prompts of the pool's groups, in their order.
    number: of the batch, from 0.

  Returns:
    The new state, and the metrics on the host.
  """
  chosen = stored.take(pool, source.indices(number))
  batch = jax.jit(estimator.prepare)(stored.to_rollouts(chosen))
  prompts = rollouts.to_prompts(source.batch(number))
  state, metrics = update(state, None, prompts, batch)
  return state, jax.device_get(metrics)


def demonstrations(
  config, model: build.Model, rows: list[dict]
) -> tuple[prompts_lib.EncodedPrompts, stored.Pool]:
  """Prompts and worked solutions as token ids.

  Args:
    config: the whole configuration.
    model: tokenizer and end tokens.
    rows: with a 'solution'.

  Raises:
    UserError: a solution is missing, too long or not expressible, or the
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
    rows: demonstrations, with a 'solution'.
  """

  def __init__(self, config, model: build.Model, rows: list[dict]):
    settings = config.warm_start
    if settings.steps and not rows:
      raise UserError(
        f'config.warm_start.steps is {settings.steps}, but the task '
        'has no demonstrations\nset it to 0, or give rows a solution'
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
    self._estimator = estimators.sft()
    self._update = training.make_update(
      training.policy_forward(
        model.config, decoding(model), config.training.chunk
      ),
      self._estimator,
      self.optimizer,
      settings.batch,
    )

  def step(self, state: training.TrainState, step: int) -> Result:
    """One supervised update."""
    start = time.perf_counter()
    rate = float(self._schedule(int(state.updates)))
    state, metrics = take_update(
      self._update, self._estimator, state, self._pool, self.source, step
    )
    record = {
      'warm_start/loss': metrics['loss'],
      'warm_start/grad_norm': metrics['grad_norm'],
      'warm_start/learning_rate': rate,
      'skipped': metrics['skipped'],
    }
    return Result(state, record, {'step_time': time.perf_counter() - start})
