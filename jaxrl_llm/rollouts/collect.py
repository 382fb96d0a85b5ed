"""Fulfils an estimator's `Needs`: samples, scores and completes rollouts.

prompts ── respond ──► responses ── complete ──► Rollouts
              │ groups: hints, refilling            │ reference, critic,
              └ greedy responses, branches          └ statistics of tokens
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import (
  Needs,
  Rollouts,
  diagnostics,
  leaf_weights,
  score_all_leaves,
)
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.rewards.scoring import Failures
from jaxrl_llm.rollouts import branch_values, branches
from jaxrl_llm.rollouts.groups import Groups, as_sampled
from jaxrl_llm.rollouts.responses import (
  Generation,
  Responses,
  greedy,
  respond,
  score_tokens,
  with_statistics,
)
from jaxrl_llm.sampling import policy
from jaxrl_llm.sampling.allocation import Systematic
from jaxrl_llm.tasks.prompts import PromptBatch

Array = jax.Array
# (trainable, prompts, tokens [P, G, T], micro_prompts) → values [P, G, T].
Values = Callable[[Any, policy.Prompts, Array, int], Array]


class Keys(NamedTuple):
  """PRNG keys of one step, one for each use."""

  responses: Array
  shuffle: Array
  branches: Array
  refill: Array
  hints: Array


def split_key(key: Array | Keys) -> Keys:
  """Splits the key of a step into one key per use."""
  return key if isinstance(key, Keys) else Keys(*jax.random.split(key, 5))


class Setting(NamedTuple):
  """Everything that stays constant between the rollouts of different steps.

  Attributes:
    model: configuration of the policy.
    tokenizer: tokenizer of the model.
    needs: needs of the estimator.
    rewards: reward functions with their weights.
    generation: settings of the responses, with the statistics that `needs`
      requires.
    reference: parameters of the reference policy, read if needed.
    values: function that computes a critic's values, called if needed.
    micro_prompts: prompts, with all their responses, scored at one time.
    chunk: positions whose logits exist at one time.
    rescore: replaces the sampler's log-probabilities by the scorer's, if
      the sampler's are not exact enough (bfloat16).
  """

  model: ModelConfig
  tokenizer: Any
  needs: Needs
  rewards: Sequence[RewardPart]
  generation: Generation
  reference: Any = None
  values: Values | None = None
  micro_prompts: int = 1
  chunk: int = 256
  rescore: bool = False


class Collected(NamedTuple):
  """Rollouts of one step.

  Attributes:
    responses: responses to the step's prompts.
    rollouts: their rollouts, with everything that the estimator needs.
    own: the rollouts of the responses alone, without branches.
    tokens: number of tokens generated in addition to the responses: greedy
      responses, branches, and groups that hints or refilling replaced.
    record: metrics of groups and branches.
    failures: failures of rewards in worker processes, by name in the record.
    seconds: sampling time.
  """

  responses: Responses
  rollouts: Rollouts
  own: Rollouts
  tokens: int
  record: dict[str, float]
  failures: Mapping[str, Failures]
  seconds: float


def collect(
  setting: Setting,
  trainable: Any,
  running: Mapping[str, Array],
  prompts: PromptBatch,
  key: Array | Keys,
  groups: Groups = as_sampled,
  stop: Any = None,
) -> Collected:
  """Samples, scores and completes the rollouts of one step.

  Args:
    setting: everything that stays constant between steps.
    trainable: {'policy': parameters}, with a critic also {'critic': …}.
    running: the estimator's numbers that persist across batches.
    prompts: P prompts.
    key: PRNG key of the step, or its `Keys`.
    groups: selects the groups of responses to train on.
    stop: object whose `check()` is called between the parts and may raise.

  Raises:
    UserError: a reward function fails or returns something that is not a
      reward; also as in `complete`.
  """
  start = time.perf_counter()
  keys, needs = split_key(key), setting.needs
  generation = with_statistics(setting.generation, needs)
  if needs.tree is not None:
    allocation = Systematic(needs.tree)
    generation = dataclasses.replace(generation, allocation=allocation)
  sampled_by = transformer.sampling_layout(setting.model, trainable['policy'])
  answer = functools.partial(
    respond,
    setting.model,
    sampled_by,
    tokenizer=setting.tokenizer,
    rewards=setting.rewards,
  )
  sample = functools.partial(
    answer, generation=generation, keep_cache=needs.branches is not None
  )
  drawn = groups(sample, prompts, keys, stop)
  responses = drawn.responses
  baseline = branched = None
  if needs.greedy:
    # For the prompts that are trained on, hints included.
    baseline = answer(
      batch=drawn.batch, generation=greedy(generation), key=keys.responses
    )
  if needs.branches:
    branched = branches.branch(
      setting.model,
      sampled_by,
      responses,
      generation,
      needs.branches,
      setting.tokenizer,
      setting.rewards,
      keys.branches,
    )
  del sampled_by, answer, sample
  # The keys and values are no longer needed.
  responses = responses._replace(cache=None)
  seconds = time.perf_counter() - start
  if stop is not None:
    stop.check()
  setting = setting._replace(generation=generation)
  completed = complete(setting, trainable, running, responses, baseline)
  rollouts, tokens, record = completed, drawn.tokens, drawn.record
  if branched is not None:
    rollouts = _add_branches(setting, trainable, running, completed, branched)
    tokens += branched.tokens
    record = record | branched.statistics
  if baseline is not None:
    tokens += baseline.tokens
  return Collected(
    responses,
    rollouts,
    completed,
    tokens,
    record,
    failures_of_step(responses, baseline, branched and branched.responses),
    seconds,
  )


def _add_branches(
  setting: Setting, trainable, running, completed: Rollouts, branched
) -> Rollouts:
  """Adds branches to the rollouts, as values of states or as rows."""
  needs = branch_values.row_needs(setting.needs)
  trained = setting.needs.branches.trained
  # If branches only provide values, only a KL reads their log-probabilities.
  reads = trained or needs.reference
  rows = complete(
    setting._replace(needs=needs, rescore=setting.rescore and reads),
    trainable,
    running,
    branched.responses,
    at_once=setting.generation.samples,
  )
  if trained:
    return branch_values.add_rows(completed, rows, branched.forks)
  return branch_values.add_values(
    completed, rows, branched.forks, setting.needs.branches
  )


def complete(
  setting: Setting,
  trainable: Any,
  running: Mapping[str, Array],
  responses: Responses,
  baseline: Responses | None = None,
  at_once: int | None = None,
) -> Rollouts:
  """Adds everything that an estimator needs to responses.

  Args:
    setting, trainable, running: as for `collect`.
    responses: responses returned by `respond`.
    baseline: greedy responses to the same prompts; read if needed.  A missing
      reward counts as 0, which does not bias the gradient.
    at_once: number of responses to a prompt scored at one time; None for all.

  Raises:
    UserError: the estimator needs token rewards, which are not supported, or a
      critic or reference that the setting lacks.
  """
  needs, samples = setting.needs, responses.samples
  _check(setting)
  score = functools.partial(
    score_tokens,
    setting.model,
    prompts=responses.prompts,
    tokens=samples.tokens,
    decoding=setting.generation.decoding,
    micro_prompts=setting.micro_prompts,
    chunk=setting.chunk,
    at_once=at_once,
  )
  values = None
  if needs.critic:
    values = setting.values(
      trainable, responses.prompts, samples.tokens, setting.micro_prompts
    )
  statistics = samples
  unknown = needs.entropy and samples.entropy is None
  unknown |= needs.score_norms and samples.score_norms is None
  if setting.rescore or unknown:
    statistics = score(trainable['policy'])
  ref_log_probs = None
  if needs.reference:
    ref_log_probs = score(setting.reference).log_probs
  # Scores come last: until here, work was only dispatched to the device.
  scores = responses.scores
  shape = samples.finished.shape
  rewards, valid = sharding.place_rows(
    (
      scores.total.reshape(shape).astype(np.float32),
      scores.valid.reshape(shape),
    )
  )
  trees = {}
  if needs.tree is not None:
    names = ('parents', 'forked_at', 'node_weights')
    trees = {name: getattr(responses.grown, name) for name in names}
  rescored = setting.rescore
  rollouts = Rollouts(
    tokens=samples.tokens,
    mask=samples.mask,
    log_probs=statistics.log_probs if rescored else samples.log_probs,
    sampler_log_probs=samples.log_probs if rescored else None,
    rewards=rewards,
    valid=valid,
    greedy_rewards=_greedy_rewards(baseline) if needs.greedy else None,
    ref_log_probs=ref_log_probs,
    entropy=statistics.entropy if needs.entropy else None,
    score_norms=statistics.score_norms if needs.score_norms else None,
    values=values,
    running=running,
    **trees,
  )
  if needs.tree is not None:
    rollouts = _score_all(rollouts, needs.tree.count)
  return rollouts


_score_all = jax.jit(score_all_leaves, static_argnums=1)
_leaf_weights = jax.jit(leaf_weights)


def _greedy_rewards(baseline: Responses) -> Array:
  """Returns [P, 1, 1] rewards of greedy responses, 0 for those without one."""
  rewards = np.where(baseline.scores.valid, baseline.scores.total, 0.0)
  rewards = rewards.reshape(-1, 1, 1).astype(np.float32)
  return sharding.place_rows(rewards)


def _check(setting: Setting) -> None:
  needs = setting.needs
  if needs.token_rewards:
    raise UserError('rollouts cannot supply token rewards to the estimator yet')
  if needs.critic and setting.values is None:
    raise UserError('the estimator needs a critic, but its values are missing')
  if needs.reference and setting.reference is None:
    raise UserError('the estimator needs a reference policy: reference=…')


def failures_of_step(
  responses: Responses,
  baseline: Responses | None = None,
  branched: Responses | None = None,
) -> dict[str, Failures]:
  """Returns the failures of one step's rewards, by name in the record."""
  failures = {}
  for prefix, part in (
    ('', responses),
    ('greedy/', baseline),
    ('branches/', branched),
  ):
    if part is not None:
      for name, each in part.scores.failures.items():
        failures[f'{prefix}rewards/{name}'] = each
  return failures


def failure_counts(failures: Mapping[str, Failures]) -> dict[str, int]:
  """Returns numbers of failures for the record.

  NAME/failed is of all kinds, and NAME/failed/KIND of one that occurred.
  """
  counts = {f'{name}/failed': each.total for name, each in failures.items()}
  return counts | {
    f'{name}/failed/{kind}': count
    for name, each in failures.items()
    for kind, count in each.counts.items()
    if count
  }


def reward_metrics(responses: Responses, own: Rollouts) -> dict[str, float]:
  """Returns metrics of rewards and lengths, under TRL's names.

  Args:
    responses: responses of one step.
    own: their rollouts, without branches.
  """
  metrics = jax.device_get(_group_metrics(own, responses.samples.finished))
  weights = None
  if own.node_weights is not None:
    weights = sharding.to_host(_leaf_weights(own)).reshape(-1)
  for name, scores in responses.scores.parts.items():
    mean, std = _moments(scores, weights)
    metrics[f'rewards/{name}/mean'], metrics[f'rewards/{name}/std'] = mean, std
    none = np.isnan(scores) & ~responses.scores.failed[name]
    if weights is not None:
      none &= weights > 0
    metrics[f'rewards/{name}/none'] = int(none.sum())
  metrics['completions/hash'] = _hash(responses.samples)
  return metrics


def _moments(scores: np.ndarray, weights: np.ndarray | None):
  """Returns mean and deviation of the known scores; NaN if there are none."""
  known = ~np.isnan(scores)
  if not known.any():
    return np.nan, np.nan
  scores = scores[known]
  if weights is None:
    return scores.mean(), scores.std()
  mean = np.average(scores, weights=weights[known])
  squares = np.average(np.square(scores - mean), weights=weights[known])
  return mean, np.sqrt(squares)


def _hash(samples) -> int:
  """Returns 48 bits of the sha256 of all tokens, exact as a float."""
  tokens, mask = sharding.to_host((samples.tokens, samples.mask))
  content = np.where(mask, tokens, -1).astype('<i4').tobytes()
  return int.from_bytes(hashlib.sha256(content).digest()[:6], 'big')


@jax.jit
def _group_metrics(rollouts: Rollouts, finished):
  metrics = diagnostics.group_statistics(rollouts)
  if rollouts.node_weights is None:
    metrics |= diagnostics.completion_statistics(rollouts.mask, finished)
  else:
    metrics |= diagnostics.tree_statistics(rollouts, finished)
  if rollouts.sampler_log_probs is not None:
    metrics |= diagnostics.sampler_statistics(rollouts)
  return metrics
