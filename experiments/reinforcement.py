"""Online RL: what one step samples, learns and records.

A step depends on the state, the step's number and the configuration, on the
reference, and on whose log-probabilities count (`rescore`).
"""

import functools
import hashlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build, critics
from experiments.collection import Collection
from experiments.failures import failure_counts, failure_messages, of_step
from experiments.learner import Learner
from experiments.phase import Result
from jaxrl_llm import estimators, minibatches, rollouts, sharding, training
from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.models import transformer
from jaxrl_llm.rewards.failures import Failures
from jaxrl_llm.rollouts import branch_values, branches
from jaxrl_llm.training import critic


class Collected(NamedTuple):
  """What one step sampled.

  Attributes:
    responses: to the step's prompts.
    rollouts: of them, with everything that the estimator needs.
    timings: seconds.
    tokens: generated beside the responses: greedy ones, branches, groups that
      hints or refilling replaced.
    record: numbers of data tools and branches.
    own: the rollouts' rows that are responses, without branches.
    failures: of rewards in worker processes, by name in the record.
  """

  responses: rollouts.Responses
  rollouts: estimators.Rollouts
  timings: dict[str, float]
  tokens: int
  record: dict[str, float]
  own: estimators.Rollouts
  failures: Mapping[str, Failures]


class Reinforcement:
  """Online reinforcement learning.

  Args:
    config: the whole configuration.
    model: the model to train.
    rows: training prompts.
    key: PRNG key of the run.

  Attributes:
    key: as given; a resumed run sets the one of its checkpoint.
    reference: parameters of the reference policy, if the estimator needs it.
    estimator, critic, optimizer, begin, shapes: of a `Learner`.
    rescore: whether the trainer recomputes the sampler's log-probabilities.
  """

  def __init__(self, config, model: build.Model, rows: list[dict], key):
    self._config = config
    self._model = model
    self.key = key
    for name, prompts in (
      ('config.rollout.prompts', config.rollout.prompts),
      ('config.training.micro_prompts', build.micro_prompts(config)),
    ):
      sharding.check_rows(prompts, config.rollout.samples, name)
    encoded = build.encode(config, rows, model.tokenizer)
    self.dropped = encoded.dropped
    self._collection = Collection(config, encoded, model.tokenizer)
    self.source = self._collection.source
    self.generation = build.generation(
      config,
      model,
      encoded.pad_id,
      samples=config.rollout.samples,
      temperature=config.rollout.temperature,
    )
    self.rewards = build.reward_parts(config)
    self._told = set()
    learner = self._learner = Learner(config, model)
    self.estimator, self.critic = learner.estimator, learner.critic
    self.optimizer = learner.optimizer
    self.begin, self.shapes = learner.begin, learner.shapes
    needs = self.estimator.needs
    self.generation = rollouts.with_statistics(self.generation, needs)
    self.reference = None
    self.rescore = False
    self._micro_prompts = learner.micro_prompts
    if self.critic is not None:
      self._explained = jax.jit(critics.explained_variance(config))
    self._prepare = jax.jit(self.estimator.prepare)
    self._advance = jax.jit(
      functools.partial(estimators.update_running, self.estimator.needs)
    )
    self._weigh = jax.jit(self.estimator.weigh)

  def collect(self, state: training.TrainState, step: int, stop=None):
    """Samples, scores and completes the rollouts of one step.

    Returns:
      `Collected`.
    """
    times = [time.perf_counter()]
    sampled_by = transformer.sampling_layout(
      self._model.config, state.trainable['policy']
    )
    respond = functools.partial(
      rollouts.respond,
      self._model.config,
      sampled_by,
      tokenizer=self._model.tokenizer,
      rewards=self.rewards,
    )
    needs = self.estimator.needs
    drawn = self._collection.draw(
      functools.partial(
        respond,
        generation=self.generation,
        keep_cache=needs.branches is not None,
      ),
      self.key,
      step,
      stop,
    )
    responses, extra, record = drawn.responses, drawn.tokens, drawn.record
    baseline = None
    if needs.greedy:
      # Of the prompts that are trained on, hints included.
      baseline = respond(
        batch=drawn.batch,
        generation=rollouts.greedy(self.generation),
        key=self.key,  # not used
      )
    branched = None
    if needs.branches:
      branched = self._branch(sampled_by, responses, step)
    del sampled_by, respond
    # The keys and values have served.
    responses = responses._replace(cache=None)
    times.append(time.perf_counter())
    if stop is not None:
      stop.check()
    complete = functools.partial(self._complete, state)
    own = data = complete(responses, needs, baseline, rescore=self.rescore)
    if branched is not None:
      asked = branch_values.row_needs(needs)
      # Of branches that are values alone only a KL reads log-probabilities.
      reads = needs.branches.trained or asked.reference
      rows = complete(
        branched.responses,
        asked,
        rescore=self.rescore and reads,
        at_once=self.generation.samples,
      )
      if needs.branches.trained:
        data = branch_values.add_rows(data, rows, branched.forks)
      else:
        data = branch_values.add_values(
          data, rows, branched.forks, needs.branches
        )
      extra += branched.tokens
      record = record | branched.statistics
    if baseline is not None:
      extra += int(baseline.samples.mask.sum())
    times = {'rollout_time': times[1] - times[0]}
    failures = of_step(responses, baseline, branched and branched.responses)
    return Collected(responses, data, times, extra, record, own, failures)

  def _complete(
    self, state, responses, needs, baseline=None, rescore=False, at_once=None
  ):
    """Rollouts of responses: adds what has to be computed of them."""
    values = None
    if needs.critic:
      values = critic.score_values(
        self._model.config,
        self.critic,
        state.trainable,
        responses.prompts,
        responses.samples.tokens,
        self._micro_prompts,
      )
    return rollouts.to_rollouts(
      self._model.config,
      state.trainable['policy'],
      self.reference,
      responses,
      self.generation,
      needs,
      self._micro_prompts,
      self._config.training.chunk,
      rescore,
      baseline,
      state.running,
      values,
      at_once,
    )

  def _branch(self, params, responses, step: int):
    """Samples and scores the branches that the estimator asks for."""
    return branches.branch(
      self._model.config,
      params,
      responses,
      self.generation,
      self.estimator.needs.branches,
      self._model.tokenizer,
      self.rewards,
      jax.random.fold_in(jax.random.fold_in(self.key, 3), step),
    )

  def log_prob_difference(self, state: training.TrainState, step: int):
    """Largest |trainer − sampler| log-probability of a step's responses."""
    prompts, samples = rollouts.generate(
      self._model.config,
      transformer.sampling_layout(
        self._model.config, state.trainable['policy']
      ),
      self.source.batch(step),
      self.generation,
      jax.random.fold_in(jax.random.fold_in(self.key, 1), step),
    )
    again = rollouts.score_tokens(
      self._model.config,
      state.trainable['policy'],
      prompts,
      samples.tokens,
      self.generation.decoding,
      self._micro_prompts,
      self._config.training.chunk,
    )
    difference = jnp.abs(again.log_probs - samples.log_probs)
    return float(jnp.where(samples.mask, difference, 0.0).max())

  def step(self, state: training.TrainState, step: int, stop=None) -> Result:
    """Samples, scores, and takes the step's updates."""
    start = time.perf_counter()
    responses, data, timings, extra, record, own, failures = self.collect(
      state, step, stop
    )
    whole = (responses.prompts, self._prepare(data))
    running = self._advance(own)
    if self.critic is not None:
      record = record | {'critic/explained_variance': self._explained(data)}
    key = jax.random.fold_in(jax.random.fold_in(self.key, 2), step)
    rates = self._learner.rates(int(state.updates))
    records = []
    for epoch in range(self._config.training.epochs):
      for prompts, batch in minibatches.minibatches(
        whole, self._config.training.minibatches, jax.random.fold_in(key, epoch)
      ):
        batch = self._weigh(batch)
        state, metrics = self._learner.update(state, None, prompts, batch)
        records.append(metrics)
    state = state.replace(running=running)
    records = jax.device_get(records)
    timings['step_time'] = time.perf_counter() - start
    mask, advantages = sharding.to_host(
      (responses.samples.mask, whole[1].advantages)
    )
    metrics = reward_metrics(responses, own) | update_metrics(records)
    metrics |= jax.device_get(record) | rates | failure_counts(failures)
    advantages = advantages[:, : mask.shape[1]]
    # A per-token advantage is shown by its mean over the response.
    shown = (np.broadcast_to(advantages, mask.shape) * mask).sum(axis=2)
    shown = shown / np.maximum(mask.sum(axis=2), 1)
    tokens = int(mask.sum()) + extra
    when = f'at RL step {step}'
    messages = failure_messages(failures, when, self._told)
    return Result(state, metrics, timings, tokens, responses, shown, messages)


def reward_metrics(
  responses: rollouts.Responses, data: estimators.Rollouts
) -> dict[str, float]:
  """Numbers of rewards and lengths, in TRL's names."""
  metrics = jax.device_get(_rollout_metrics(data, responses.samples.finished))
  for name, scores in responses.scores.parts.items():
    known = scores[~np.isnan(scores)]
    metrics[f'rewards/{name}/mean'] = known.mean() if known.size else np.nan
    metrics[f'rewards/{name}/std'] = known.std() if known.size else np.nan
    metrics[f'rewards/{name}/none'] = int(np.isnan(scores).sum())
  metrics['completions/hash'] = _hash(responses.samples)
  return metrics


def _hash(samples) -> int:
  """48 bits of the sha256 of the responses' tokens: exact also as a float."""
  tokens, mask = sharding.to_host((samples.tokens, samples.mask))
  content = np.where(mask, tokens, -1).astype('<i4').tobytes()
  return int.from_bytes(hashlib.sha256(content).digest()[:6], 'big')


def update_metrics(records: list[dict[str, Any]]) -> dict[str, float]:
  """Numbers of one step's updates: means over them, but for two.

  The log-probability difference is that of the first update, whose parameters
  are those that sampled; `skipped` is the longest run of skips.
  """
  metrics = {
    name: float(np.mean([record[name] for record in records]))
    for name in records[0]
  }
  for name in records[0]:
    if name.startswith('log_prob_difference/'):
      metrics[name] = float(records[0][name])
  metrics['skipped'] = int(max(record['skipped'] for record in records))
  return metrics


@jax.jit
def _rollout_metrics(data: estimators.Rollouts, finished):
  metrics = diagnostics.group_statistics(data)
  metrics |= diagnostics.completion_statistics(data.mask, finished)
  if data.sampler_log_probs is not None:
    metrics |= diagnostics.sampler_statistics(data)
  return metrics
