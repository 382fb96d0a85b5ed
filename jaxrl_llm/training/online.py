"""The training step of online RL, as a value of pure functions.

    trainer = online(model, tokenizer, est.rloo(), adamw(1e-5), rewards,
                     generation)
    state = trainer.init(params)
    for step in range(100):
      state, metrics, sampled = trainer.step(
        state, source.batch(step), jax.random.fold_in(key, step)
      )

A step collects rollouts (samples, scores, and adds everything that the
estimator needs), prepares them (advantages, token weights) and updates the
parameters.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm import estimators, sharding
from jaxrl_llm import minibatches as minibatches_lib
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import Estimator, Rollouts, diagnostics
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.rewards.scoring import Failures
from jaxrl_llm.rollouts.collect import (
  Collected,
  Keys,
  Setting,
  failure_counts,
  reward_metrics,
  split_key,
)
from jaxrl_llm.rollouts.collect import (
  collect as collect_rollouts,
)
from jaxrl_llm.rollouts.groups import Groups, as_sampled
from jaxrl_llm.rollouts.responses import (
  Generation,
  Responses,
  generate,
  score_tokens,
  with_statistics,
)
from jaxrl_llm.tasks.prompts import PromptBatch
from jaxrl_llm.training import critic as critic_lib
from jaxrl_llm.training import update as update_lib
from jaxrl_llm.training.update import TrainState

Array = jax.Array
# Rollouts → a metric for the record.
Measure = Callable[[Rollouts], Array]


class Sampled(NamedTuple):
  """Training data of one step.

  Attributes:
    responses: responses with their texts and scores.
    advantages: [P, G] float, means over each response's tokens.
    tokens: number of generated tokens, including those of branches, greedy
      responses and discarded groups.
    failures: failures of rewards in worker processes, by name in the record.
    timings: seconds of sampling ('rollout_time') and of the whole step
      ('step_time').
  """

  responses: Responses
  advantages: np.ndarray
  tokens: int
  failures: Mapping[str, Failures]
  timings: dict[str, float]


class Trainer(NamedTuple):
  """Online training of one estimator.

  Attributes:
    init: parameters → `TrainState`.  The parameters are copied, so that the
      caller's remain usable although updates donate the state.
    collect: (state, prompts, key, groups=…, stop=…) → `Collected`.
    step: (state, prompts, key, groups=…, stop=…) → (state, metrics, `Sampled`).
      `state` is donated.
    setting: the `Setting` of every call of `collect`.
    make_update: micro_prompts → the jitted update of a minibatch.
  """

  init: Callable[..., TrainState]
  collect: Callable[..., Collected]
  step: Callable[..., tuple[TrainState, dict[str, float], Sampled]]
  setting: Setting
  make_update: Callable[[int], update_lib.Update]


def online(
  model: ModelConfig,
  tokenizer: Any,
  estimator: Estimator,
  optimizer: optax.GradientTransformation,
  rewards: Sequence[RewardPart | Callable],
  generation: Generation,
  *,
  reference: Any = None,
  critic: critic_lib.Critic | None = None,
  micro_prompts: int | None = None,
  minibatches: int = 1,
  epochs: int = 1,
  chunk: int = 256,
  rescore: bool = False,
  per_token: Mapping[str, diagnostics.Diagnostic] | None = None,
  per_batch: Mapping[str, Measure] | None = None,
) -> Trainer:
  """Builds the training step of an estimator.

  Everything in `estimator.needs` is sampled or computed.

  Args:
    model: configuration of the policy.
    tokenizer: the model's tokenizer, from `transformers`.
    estimator: such as `estimators.trepo()`.
    optimizer: optimiser of the policy, or of {'policy': …, 'critic': …} if
      there is a critic, such as `by_part(policy=…, critic=…)`.
    rewards: functions with TRL's signature, each of weight 1, or `RewardPart`s.
    generation: samples per prompt, lengths, temperature.
    reference: parameters of the reference policy, for estimators with a KL.
    critic: `separate(model)` or `shared(model)`, for actor-critic estimators.
    micro_prompts: prompts, with all their responses, in memory at one time;
      None for a whole minibatch.
    minibatches: updates per epoch.
    epochs: passes over a step's rollouts.
    chunk: positions whose logits exist at one time.
    rescore: replaces the sampler's log-probabilities by the trainer's, if
      they differ (bfloat16); see `log_prob_difference`.
    per_token: metrics to average over tokens; None for the default ones.
    per_batch: metrics of a step's rollouts.

  Raises:
    UserError: the estimator needs a critic, a reference, or more samples.
  """
  needs = estimator.needs
  _check(needs, generation, reference, critic)
  values = None
  forward = update_lib.policy_forward(model, generation.decoding, chunk)
  if needs.critic:
    forward = update_lib.actor_critic_forward(
      model, generation.decoding, critic, chunk
    )
    values = functools.partial(critic_lib.score_values, model, critic)
  if per_token is None:
    per_token = _usual_metrics(needs)
  setting = Setting(
    model,
    tokenizer,
    needs,
    [as_reward(reward) for reward in rewards],
    generation,
    reference,
    values,
    micro_prompts or 1,
    chunk,
    rescore,
  )

  @functools.cache
  def make_update(size: int) -> update_lib.Update:
    return update_lib.make_update(
      forward, estimator, optimizer, size, per_token
    )

  parts = _Parts(
    setting,
    optimizer,
    critic,
    make_update,
    micro_prompts,
    minibatches,
    epochs,
    jax.jit(estimator.prepare),
    jax.jit(estimator.reweight),
    jax.jit(functools.partial(estimators.update_running, needs)),
    {name: jax.jit(f) for name, f in (per_batch or {}).items()},
  )
  init, collect, step = (
    functools.partial(function, parts) for function in (_init, _collect, _step)
  )
  return Trainer(init, collect, step, setting, make_update)


class _Parts(NamedTuple):
  """Everything that the functions of a trainer close over."""

  setting: Setting
  optimizer: optax.GradientTransformation
  critic: critic_lib.Critic | None
  make_update: Callable[[int], update_lib.Update]
  micro_prompts: int | None
  minibatches: int
  epochs: int
  prepare: Callable[[Rollouts], Any]
  reweight: Callable[[Any], Any]
  advance: Callable[[Rollouts], dict[str, Array]]
  measures: Mapping[str, Measure]

  def size(self, prompts: PromptBatch) -> int:
    """Returns the number of prompts in memory at one time."""
    return self.micro_prompts or max(len(prompts.rows) // self.minibatches, 1)


def _init(parts: _Parts, params: Any) -> TrainState:
  copied = jax.tree.map(jnp.copy, params)
  trainable = {'policy': copied}
  if parts.setting.needs.critic:
    trainable['critic'] = sharding.place(parts.critic.init(copied))
  running = estimators.start_running(parts.setting.needs)
  return update_lib.init_state(trainable, parts.optimizer, running)


def _collect(
  parts: _Parts,
  state: TrainState,
  prompts: PromptBatch,
  key: Array | Keys,
  groups: Groups = as_sampled,
  stop: Any = None,
) -> Collected:
  return collect_rollouts(
    parts.setting._replace(micro_prompts=parts.size(prompts)),
    state.trainable,
    state.running,
    prompts,
    key,
    groups,
    stop,
  )


def _step(
  parts: _Parts,
  state: TrainState,
  prompts: PromptBatch,
  key: Array | Keys,
  groups: Groups = as_sampled,
  stop: Any = None,
) -> tuple[TrainState, dict[str, float], Sampled]:
  start = time.perf_counter()
  keys = split_key(key)
  collected = _collect(parts, state, prompts, keys, groups, stop)
  whole = (collected.responses.prompts, parts.prepare(collected.rollouts))
  running = parts.advance(collected.own)
  record = collected.record | {
    name: measure(collected.rollouts)
    for name, measure in parts.measures.items()
  }
  update = parts.make_update(parts.size(prompts))
  records = []
  for epoch in range(parts.epochs):
    shuffle = jax.random.fold_in(keys.shuffle, epoch)
    for part, batch in minibatches_lib.minibatches(
      whole, parts.minibatches, shuffle
    ):
      state, metrics = update(state, None, part, parts.reweight(batch))
      records.append(metrics)
  state = state.replace(running=running)
  records = jax.device_get(records)
  seconds = time.perf_counter() - start
  metrics = reward_metrics(collected.responses, collected.own)
  metrics |= update_lib.mean_metrics(records) | jax.device_get(record)
  metrics |= failure_counts(collected.failures)
  return state, metrics, _sampled(collected, whole[1].advantages, seconds)


def log_prob_difference(
  setting: Setting, params: Any, prompts: PromptBatch, key: Array
) -> float:
  """Returns the largest |scorer − sampler| log-probability difference, nats.

  Args:
    setting: setting of a trainer.
    params: parameters of the policy.
    prompts: P prompts, to which new responses are sampled.
    key: PRNG key for sampling.
  """
  read, samples = generate(
    setting.model,
    transformer.sampling_layout(setting.model, params),
    prompts,
    with_statistics(setting.generation, setting.needs),
    key,
  )
  again = score_tokens(
    setting.model,
    params,
    read,
    samples.tokens,
    setting.generation.decoding,
    setting.micro_prompts,
    setting.chunk,
  )
  difference = jnp.abs(again.log_probs - samples.log_probs)
  return float(jnp.where(samples.mask, difference, 0.0).max())


def _sampled(
  collected: Collected, advantages: Array, seconds: float
) -> Sampled:
  mask, advantages = sharding.to_host(
    (collected.responses.samples.mask, advantages)
  )
  advantages = advantages[:, : mask.shape[1]]
  # Advantages per token are shown as their mean over the response.
  shown = (np.broadcast_to(advantages, mask.shape) * mask).sum(axis=2)
  return Sampled(
    collected.responses,
    shown / np.maximum(mask.sum(axis=2), 1),
    collected.responses.tokens + collected.tokens,
    collected.failures,
    {'rollout_time': collected.seconds, 'step_time': seconds},
  )


def as_reward(reward: RewardPart | Callable) -> RewardPart:
  """Wraps a function as a reward of weight 1 under the function's name."""
  if isinstance(reward, RewardPart):
    return reward
  return RewardPart(getattr(reward, '__name__', 'reward'), reward)


def _usual_metrics(needs: estimators.Needs) -> dict[str, Any]:
  metrics = diagnostics.per_token()
  if needs.reference:
    metrics['kl'] = diagnostics.reference_kl
  if needs.critic:
    metrics |= diagnostics.critic_per_token()
  return metrics


def _check(needs, generation: Generation, reference, critic) -> None:
  if needs.tree is None and generation.samples < needs.samples:
    raise UserError(
      f'generation.samples is {generation.samples}; the estimator needs at '
      f'least {needs.samples} per prompt'
    )
  if needs.reference and reference is None:
    raise UserError(
      'the estimator needs a reference policy, but none was passed\n'
      'pass online(…, reference=params)'
    )
  if needs.critic and critic is None:
    raise UserError(
      'the estimator needs a critic, but none was passed\n'
      'pass online(…, critic=training.separate(model))'
    )
