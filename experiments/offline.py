"""Learning from responses that are there, as the main phase of a run.

Either the task gives the responses, and all steps learn from them; or a run
goes in rounds: some steps sample and score responses and choose what to keep,
then others learn from that.  What was chosen is written to the run's folder,
`rounds/NUMBER.npz`, a file for each step that samples, by its number in the
phase, from 0; a resumed round reads it there.
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
  """What a task gives to learn from.

  Attributes:
    encoded: prompts of the groups, in their order.
    pool: the groups.
    notes: what was left out, a line each.
  """

  encoded: prompts_lib.EncodedPrompts
  pool: stored.Pool
  notes: tuple[str, ...] = ()


class Method(NamedTuple):
  """How a script learns from responses.

  Attributes:
    given: (configuration, model, data) → what the task's data gives to learn
      from.
    choose: (valid, rewards), [P, G] each, → groups of a step's responses, as
      `stored.singles` gives them; `valid` is False for those without a reward
      and those that the estimator does not keep.
    restarts: whether every round begins with the policy that the first began
      with, or with the one that sampled.
  """

  given: Callable[[Any, build.Model, Data], Given]
  choose: Callable[[np.ndarray, np.ndarray], np.ndarray]
  restarts: bool = False


def rounds(config) -> Cycle:
  """The rounds that a configuration describes; one for what the task gives."""
  settings = config.rounds
  if not settings.sampling:
    return Cycle(0, config.steps or 1)
  return Cycle(settings.sampling, settings.learning)


def updates(config) -> int:
  """How many of them a round takes; 0 where there is none."""
  return rounds(config).learning if config.steps else 0


class Offline:
  """A likelihood or a preference loss as the main phase; see `phase.Phase`.

  Args:
    config: the whole configuration.
    model: the model to train.
    data: of the task.
    key: PRNG key of the run.
    folder: of the run.
    method: of the script.
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
    self._pairs = None  # held-out ones, where the task gives pairs
    if self._given is not None and self.estimator.needs.reference:
      # Those whose prompts are evaluated.
      limit = config.evaluation.prompts or None
      held = data._replace(train=data.held_out[:limit])
      self._pairs = method.given(config, model, held)
    self._learned = None  # (round, pool, source) that is learned from
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
      self._ask_reference(state.trainable['policy'], stop)
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
    # Nothing of the pool was sampled by the policy that is trained.
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
    del values  # a round's files are read when it is learned

  def fingerprint(self):
    prompts = sources.PromptSource(self._encoded, 1, self._config.seed)
    return {
      'training': prompts.fingerprint(),
      'held-out': self._held_out.fingerprint(),
    }

  def evaluate(self, trainable, step: int, stop) -> Evaluation:
    held = self._held_out._replace(key=jax.random.fold_in(self.key, 4))
    policy = trainable['policy']
    found = validation.evaluate(
      held, policy, step, self._config.log.table, stop=stop
    )
    if self._pairs is None:
      return found
    # Before the first step the policy is the reference.
    margins = np.zeros(len(self._pairs.pool.prompts))
    if step > self._config.warm_start.steps:
      margins = self._margins(policy, stop)
    return found._replace(
      metrics=found.metrics
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
          'each begins with the initial model'
          if self._method.restarts
          else 'each goes on from the last'
        )
      )
      return lines
    return [*lines, *self._given.notes]

  def _sample(self, state, number: int, at: int, stop) -> Result:
    """Samples and scores one batch, and writes what of it is to be learned.

    Args:
      state: of the policy that samples.
      number: of the step.
      at: steps that sampled before it.
      stop: polled.
    """
    start = time.perf_counter()
    params = state.trainable['policy']
    responses = rollouts.respond(
      self._model.config,
      params,
      self._sampling.batch(at),
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
    pool = stored.choose(
      self._sampling.indices(at),
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
    """[P, G] which responses the estimator would train on one by one."""
    if self.estimator.needs.samples > 1:
      return np.ones(data.mask.shape[:2], bool)
    return sharding.to_host(self.estimator.prepare(data).valid)[..., 0]

  def _open(self, turn: int) -> tuple[stored.Pool, sources.PromptSource]:
    """What a round learns from, and the order of it."""
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
        return stored.load(self._folder / 'given.npz')
      return self._given.pool
    first = turn * self.cycle.steps
    pool = stored.join(
      [
        stored.load(self._file(number))
        for number in range(first, first + self.cycle.sampling)
      ]
    )
    if not len(pool.prompts):
      raise UserError(
        f'round {turn} has nothing to learn from: of its responses none, or no '
        f'pair, is what {self._config.algorithm.name} keeps\n'
        'sample more (config.rounds.sampling), or begin with a better model'
      )
    return stored.limit(pool, self._config.rounds.per_prompt)

  def _ask_reference(self, params, stop) -> None:
    """Writes down what the reference says of given pairs."""
    for name, given in (('given', self._given), ('held_out', self._pairs)):
      scored = self._scored(params, given, stop)
      self._write(self._folder / f'{name}.npz', scored)

  @staticmethod
  def _write(path, pool: stored.Pool) -> None:
    """Process 0 writes what all processes have, and all read later on."""
    processes.on_main(lambda: stored.save(path, pool), str(path))

  def _scored(self, params, given: Given, stop) -> stored.Pool:
    """The pool with log-probabilities of a policy as the reference's."""
    scored = training.score_pool(
      self._model.config,
      params,
      given.pool,
      given.encoded,
      supervised.batch(self._config),
      supervised.decoding(self._model),
      self._config.training.chunk,
      stop,
    )
    return given.pool._replace(ref_log_probs=scored)

  def _margins(self, params, stop) -> np.ndarray:
    """[N] margins h of the held-out pairs, nats."""
    before = stored.load(self._folder / 'held_out.npz').ref_log_probs
    now = self._scored(params, self._pairs, stop).ref_log_probs
    ratios = (now - before).sum(axis=2)
    return ratios[:, 0] - ratios[:, 1]

  def _file(self, number: int) -> pathlib.Path:
    return self._folder / f'{number:08d}.npz'


def _signs(groups: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """[P, G] for the sample table: 1 for what is learned, −1 for rejected."""
  signs = np.zeros(shape)
  signs[groups[:, 0], groups[:, 1]] = 1.0
  if groups.shape[1] == 3:
    signs[groups[:, 0], groups[:, 2]] = -1.0
  return signs
