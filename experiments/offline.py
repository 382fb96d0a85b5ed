"""Learning from stored responses, as the main phase of a run.

Either the task supplies the responses, and all steps learn from them; or a run
consists of rounds: first some steps sample and score responses and select which
to keep, then others learn from them.  Each sampling step writes its selection
to `rounds/NUMBER.npz` in the run's folder, where NUMBER is the number of the
step in the phase, from 0.  A resumed round reads these files.
"""

import pathlib
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import build, stored_runs, supervised, validation
from experiments.data import Data
from experiments.schedule import Cycle, Evaluation, Result
from experiments.validation import failure_counts
from jaxrl_llm import estimators, processes, rollouts, sharding, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import stored
from jaxrl_llm.rollouts.collect import (
  Setting,
  complete,
  failures_of_step,
  reward_metrics,
)
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


class Offline:
  """Likelihood or preference losses as the main phase; see `schedule.Phase`.

  Args:
    config: the whole configuration.
    model: the model to train.
    data: data of the task.
    key: PRNG key of the run.
    folder: folder of the run.
    method: method of the script.
  """

  reference = None
  curves = types.MappingProxyType({'eval/reward': 'held-out reward'})

  def __init__(self, config, model, data, key, folder, method: Method):
    self._config, self._model, self._method = config, model, method
    self.key = key
    self.cycle = rounds(config)
    self.estimator = build.reference(config)
    self.keeps_reference = method.restarts
    self._folder = pathlib.Path(folder) / 'rounds'
    self.rewards = build.reward_parts(config)
    self._given = None
    if self.cycle.sampling:
      self._encoded = build.encode(config, data.train, model.tokenizer)
      self._sampling = sources.PromptSource(
        self._encoded, config.rollout.prompts, config.seed
      )
      self._generation = build.generation(
        config,
        model,
        self._encoded.pad_id,
        samples=config.rollout.samples,
        temperature=config.rollout.temperature,
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
    self._optimizer, self._schedule = build.optimizer(
      config.optimizer, updates(config)
    )
    self._trainer = supervised.trainer(
      config, model, self.estimator, self._optimizer
    )
    self._held_out = validation.build_held_out(
      config, model, data.held_out, self.rewards, None
    )

  def begin(self, policy_params) -> training.TrainState:
    return build.init_state(policy_params, self._optimizer, self.estimator)

  def shapes(self, policy_params) -> training.TrainState:
    state = jax.eval_shape(self.begin, policy_params)
    return sharding.with_shardings(state)

  def start(self, state: training.TrainState) -> list[str]:
    del state
    return []

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
    metrics |= {
      'learning_rate': rate,
      'rounds/round': turn,
      'rounds/groups': len(pool.prompts),
      'rounds/epoch': (update + 1)
      * self._config.rounds.batch
      / len(pool.prompts),
    }
    return Result(state, metrics, {'step_time': time.perf_counter() - start})

  def save(self):
    return {}

  def load(self, values) -> None:
    del values  # the files of a round are read when it is trained on

  def fingerprint(self):
    prompts = sources.PromptSource(self._encoded, 1, self._config.seed)
    return {
      'training': prompts.fingerprint(),
      'held-out': self._held_out.fingerprint(),
    }

  def evaluate(self, trainable, step: int, stop) -> Evaluation:
    held = self._held_out._replace(key=jax.random.fold_in(self.key, 4))
    policy = trainable['policy']
    evaluation = validation.evaluate(
      held, policy, step, self._config.log.table, stop=stop
    )
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

  def finish(self, trainable, folder) -> list[str]:
    trained = self._model._replace(params=trainable['policy'])
    stored_runs.export(trained, folder / 'hf')
    return ['hf/ (for transformers)']

  def describe(self) -> list[str]:
    held, settings = self._held_out.encoded, self._config.rounds
    lines = [
      f'{len(self._encoded.rows):,} training and {len(held.rows):,} held-out '
      f'prompts; dropped as over budget: {self._encoded.dropped:,} and '
      f'{held.dropped:,}'
    ]
    if self._given is None:
      lines.append(
        f'rounds of {self.cycle.sampling} steps of sampling and '
        f'{self.cycle.learning} updates of {settings.batch}; '
        + (
          'each starts from the initial model'
          if self._method.restarts
          else 'each continues from the previous one'
        )
      )
      return lines
    return [*lines, *self._given.notes]

  def _sample(self, state, number: int, index: int, stop) -> Result:
    """Samples and scores a batch, and writes the groups to learn from.

    Args:
      state: state of the policy that samples.
      number: number of the step.
      index: number of earlier steps that sampled.
      stop: polled stop signal.
    """
    start = time.perf_counter()
    params = state.trainable['policy']
    responses = rollouts.respond(
      self._model.config,
      params,
      self._sampling.batch(index),
      self._generation,
      self._model.tokenizer,
      self.rewards,
      jax.random.fold_in(jax.random.fold_in(self.key, 1), number),
    )
    sampled = time.perf_counter()
    if stop is not None:
      stop.check()
    setting = Setting(
      self._model.config,
      self._model.tokenizer,
      estimators.Needs(),
      self.rewards,
      self._generation,
    )
    data = complete(setting, state.trainable, {}, responses)
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
      pool = self._scored(params, Given(self._encoded, pool), stop)
    self._write(self._file(number), pool)
    metrics = reward_metrics(responses, data)
    metrics['rounds/chosen'] = len(groups)
    failures = failures_of_step(responses)
    metrics |= failure_counts(failures)
    timings = {
      'rollout_time': sampled - start,
      'step_time': time.perf_counter() - start,
    }
    tokens = int(mask.sum())
    shown = _signs(groups, rewards.shape[:2])
    return Result(state, metrics, timings, tokens, responses, shown, failures)

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
      self._model.config,
      params,
      part.pool,
      part.encoded,
      supervised.batch(self._config),
      supervised.decoding(self._model),
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
