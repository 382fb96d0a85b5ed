"""Learning from stored responses, as the main phase of a run.

Either the task supplies the responses, and all steps learn from them; or a run
consists of rounds: first some steps sample and score responses and select which
to keep, then others learn from them.  Each sampling step writes its selection
to `rounds/NUMBER.npz` in the run's folder, where NUMBER is the number of the
step in the phase, from 0.  A resumed round reads these files.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import build, schedule
from experiments.data import Data
from experiments.schedule import Cycle, Evaluation, Phase, Result
from jaxrl_llm import estimators, processes, sharding, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.rollouts import stored
from jaxrl_llm.rollouts.collect import (
  Keys,
  Setting,
  collect,
  failure_counts,
  reward_metrics,
)
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks import sources


class Given(NamedTuple):
  """Training data that a task supplies.

  Attributes:
    encoded: prompts of the groups, in order.
    pool: the groups.
    notes: lines about the data, such as what was excluded.
  """

  encoded: prompts_lib.EncodedPrompts
  pool: stored.Pool
  notes: tuple[str, ...] = ()


class Method(NamedTuple):
  """The part of a script that is specific to its algorithm.

  Attributes:
    given: (configuration, model, data) → `Given`, the training data that the
      task supplies.
    choose: (valid, rewards), [P, G] each, → groups of a step's responses, as
      in `stored.singles`; `valid` is False for responses without a reward and
      for those that the estimator does not keep.
    restarts: True if every round starts with the initial policy of the first
      round, False if it starts with the policy that sampled.
  """

  given: Callable[[Any, build.Model, Data], Given]
  choose: Callable[[np.ndarray, np.ndarray], np.ndarray]
  restarts: bool = False


def rounds(config) -> Cycle:
  """Returns the rounds of a run; one round if the task supplies the data."""
  settings = config.rounds
  if not settings.sampling:
    return Cycle(0, config.steps or 1)
  return Cycle(settings.sampling, settings.learning)


def updates(config) -> int:
  """Returns the number of updates per round; 0 if there are no updates."""
  return rounds(config).learning if config.steps else 0


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


class Offline(Phase):
  """Likelihood or preference losses as the main phase of a run.

  Args:
    config: the whole configuration.
    model: the model to train.
    data: data of the task.
    key: PRNG key of the run.
    folder: folder of the run.
    method: method of the script.

  Attributes:
    setting: the `Setting` of sampled responses; None if the task supplies them.
  """

  def __init__(self, config, model, data, key, folder, method: Method):
    self._config, self._method = config, method
    self.model, self.key = model, key
    self.cycle = rounds(config)
    self.estimator = build.reference(config)
    self.keeps_reference = method.restarts
    self._folder = pathlib.Path(folder) / 'rounds'
    rewards = build.reward_parts(config)
    self.setting = self._given = None
    if self.cycle.sampling:
      self._encoded = build.encode(config, data.train, model.tokenizer)
      self._sampling = sources.PromptSource(
        self._encoded, config.rollout.prompts, config.seed
      )
      self.setting = Setting(
        model.config,
        model.tokenizer,
        estimators.Needs(),
        rewards,
        build.generation(config, model, self._encoded.pad_id),
      )
    else:
      self._given = method.given(config, model, data)
      self._encoded = self._given.encoded
    self._pairs = None  # held-out pairs, if the task supplies pairs
    if self._given is not None and self.estimator.needs.reference:
      # Only pairs whose prompts are evaluated.
      limit = config.evaluation.prompts or None
      held = data._replace(train=data.held_out[:limit])
      self._pairs = method.given(config, model, held)
    self._learned = None  # (round, pool, source) of the current round
    self.optimizer, self._schedule = build.optimizer(
      config.optimizer, updates(config)
    )
    self._trainer = trainer(config, model, self.estimator, self.optimizer)
    self._held_out = schedule.build_held_out(
      config, model, data.held_out, rewards, None
    )

  def step(self, state: training.TrainState, number: int, stop) -> Result:
    turn, place = divmod(number, self.cycle.steps)
    if place < self.cycle.sampling:
      return self._sample(
        state, number, turn * self.cycle.sampling + place, stop
      )
    if not number and self._pairs is not None:
      self._score_given(state.trainable['policy'], stop)
    start = time.perf_counter()
    if place == self.cycle.sampling:
      params = state.trainable['policy']
      if self._method.restarts:
        params = jax.tree.map(jax.numpy.copy, self.reference)
      state = self.begin(params)
    if self._learned is None or self._learned[0] != turn:
      self._learned = (turn, *self._open(turn))
    _, pool, source = self._learned
    update = place - self.cycle.sampling
    rate = float(self._schedule(int(state.updates)))
    groups = stored.take(pool, source.indices(update))
    state, metrics = self._trainer.step(state, groups, source.batch(update))
    # The trained policy did not sample the pool.
    metrics = {
      name: value
      for name, value in metrics.items()
      if not name.startswith('log_prob_difference/')
    }
    seen = (update + 1) * self._config.rounds.batch
    metrics |= {
      'learning_rate': rate,
      'rounds/round': turn,
      'rounds/groups': len(pool.prompts),
      'rounds/epoch': seen / len(pool.prompts),
    }
    return Result(state, metrics, {'step_time': time.perf_counter() - start})

  def fingerprint(self):
    prompts = sources.PromptSource(self._encoded, 1, self._config.seed)
    return {
      'training': prompts.fingerprint(),
      'held-out': sources.PromptSource(
        self._held_out.encoded, 1, 0
      ).fingerprint(),
    }

  def evaluate(self, trainable, step: int, stop) -> Evaluation:
    held = self._held_out._replace(key=jax.random.fold_in(self.key, 4))
    policy = trainable['policy']
    table = self._config.log.table
    evaluation = schedule.evaluate(held, policy, step, table, stop)
    if self._pairs is None:
      return evaluation
    # Before the first step the policy is the reference.
    margins = np.zeros(len(self._pairs.pool.prompts))
    if step > self._config.warm_start.steps:
      margins = self._margins(policy, stop)
    return evaluation._replace(
      metrics=evaluation.metrics
      | {
        'eval/preference/accuracy': float(np.mean((np.sign(margins) + 1) / 2)),
        'eval/preference/margin': float(margins.mean()),
      }
    )

  def describe(self) -> list[str]:
    held, cycle = self._held_out.encoded, self.cycle
    if self._given is not None:
      notes = self._given.notes
    else:
      origin = 'initial' if self._method.restarts else 'previous'
      notes = (
        f'rounds of {cycle.sampling} steps of sampling and {cycle.learning} '
        f'updates of {self._config.rounds.batch}; each starts from the '
        f'{origin} model',
      )
    return [
      f'{len(self._encoded.rows):,} training and {len(held.rows):,} held-out '
      f'prompts; dropped as over budget: {self._encoded.dropped:,} and '
      f'{held.dropped:,}',
      *notes,
    ]

  def _sample(self, state, number: int, index: int, stop) -> Result:
    """Samples and scores a batch, and writes the groups to learn from.

    Args:
      state: state of the policy that samples.
      number: number of the step.
      index: number of earlier steps that sampled.
      stop: polled stop signal.
    """
    start = time.perf_counter()
    key = jax.random.fold_in(jax.random.fold_in(self.key, 1), number)
    collected = collect(
      self.setting,
      state.trainable,
      {},
      self._sampling.batch(index),
      Keys(*[key] * len(Keys._fields)),
      stop=stop,
    )
    data = collected.rollouts
    mask, valid, rewards, tokens = sharding.to_host(
      (data.mask, data.valid, data.rewards, data.tokens)
    )
    groups = self._method.choose(
      valid[..., 0] & self._kept(data), rewards[..., 0]
    )
    pool = stored.select(
      self._sampling.indices(index),
      groups,
      tokens,
      mask.sum(axis=2),
      rewards[..., 0],
    )
    if self.estimator.needs.reference:
      policy_params = state.trainable['policy']
      pool = self._scored(policy_params, Given(self._encoded, pool), stop)
    self._write(self._file(number), pool)
    metrics = reward_metrics(collected.responses, data)
    metrics['rounds/chosen'] = len(groups)
    return Result(
      state,
      metrics | failure_counts(collected.failures),
      {
        'rollout_time': collected.seconds,
        'step_time': time.perf_counter() - start,
      },
      int(mask.sum()),
      collected.responses,
      _signs(groups, rewards.shape[:2]),
      collected.failures,
    )

  def _kept(self, data: estimators.Rollouts) -> np.ndarray:
    """Marks the responses that the estimator keeps when single, [P, G]."""
    if self.estimator.needs.samples > 1:
      return np.ones(data.mask.shape[:2], bool)
    return sharding.to_host(self.estimator.prepare(data).valid)[..., 0]

  def _open(self, turn: int) -> tuple[stored.Pool, sources.PromptSource]:
    """Returns the pool of a round and the source of its batches."""
    pool = self._pool(turn)
    source = sources.PromptSource(
      prompts_lib.take(self._encoded, pool.prompts),
      self._config.rounds.batch,
      self._config.seed + turn,
    )
    return stored.narrowed(pool), source

  def _pool(self, turn: int) -> stored.Pool:
    if self._given is not None:
      if self.estimator.needs.reference:
        return stored.load_pool(self._folder / 'given.npz')
      return self._given.pool
    first = turn * self.cycle.steps
    pool = stored.join(
      [
        stored.load_pool(self._file(number))
        for number in range(first, first + self.cycle.sampling)
      ]
    )
    if not len(pool.prompts):
      raise UserError(
        f'round {turn} has nothing to learn from: '
        f'{self._config.algorithm.name} kept none of its responses or pairs\n'
        'sample more (config.rounds.sampling), or start from a better model'
      )
    return stored.limit(pool, self._config.rounds.per_prompt)

  def _score_given(self, params, stop) -> None:
    """Writes the reference's log-probabilities of the task's pairs."""
    for name, part in (('given', self._given), ('held_out', self._pairs)):
      scored = self._scored(params, part, stop)
      self._write(self._folder / f'{name}.npz', scored)

  @staticmethod
  def _write(path, pool: stored.Pool) -> None:
    """Writes a pool in process 0, for all processes to read later."""
    processes.on_main(lambda: stored.save_pool(path, pool), str(path))

  def _scored(self, params, part: Given, stop) -> stored.Pool:
    """Returns the pool with a policy's log-probabilities as reference."""
    scored = training.score_pool(
      self.model.config,
      params,
      part.pool,
      part.encoded,
      batch(self._config),
      decoding(self.model),
      self._config.training.chunk,
      stop,
    )
    return part.pool._replace(ref_log_probs=scored)

  def _margins(self, params, stop) -> np.ndarray:
    """Returns margins h of the held-out pairs, [N], nats."""
    before = stored.load_pool(self._folder / 'held_out.npz').ref_log_probs
    now = self._scored(params, self._pairs, stop).ref_log_probs
    ratios = (now - before).sum(axis=2)
    return ratios[:, 0] - ratios[:, 1]

  def _file(self, number: int) -> pathlib.Path:
    return self._folder / f'{number:08d}.npz'


def _signs(groups: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Returns [P, G] for the sample table: 1 for learned, −1 for rejected."""
  signs = np.zeros(shape)
  signs[groups[:, 0], groups[:, 1]] = 1.0
  if groups.shape[1] == 3:
    signs[groups[:, 0], groups[:, 2]] = -1.0
  return signs


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
