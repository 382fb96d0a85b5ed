"""Composes an estimator from advantages, a token loss and token weights."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.trees import fork_shares, whole_responses
from jaxrl_llm.estimators.types import (
  PER_TOKEN,
  AdvantageTransform,
  Array,
  Batch,
  Filter,
  Needs,
  Outputs,
  Rollouts,
  TokenLoss,
  TokenWeights,
  blank,
  blank_rollouts,
  merge_needs,
  valid_responses,
)
from jaxrl_llm.estimators.weights import is_plain_sum


class Estimator(NamedTuple):
  """A policy-gradient estimator.

  Attributes:
    needs: inputs that must be sampled or computed first.
    prepare: whole rollouts → batch.  Uses whole groups and stops gradients.
    reweight: batch → batch with token weights for its rows alone.  `prepare`
      does this for all rows; call it again on each optimiser minibatch.
    loss: (outputs, batch) → scalar, a plain sum over tokens, so that the
      losses and gradients of micro-batches add up exactly.
  """

  needs: Needs
  prepare: Callable[[Rollouts], Batch]
  reweight: Callable[[Batch], Batch]
  loss: Callable[[Outputs, Batch], Array]


def estimator(
  advantages: AdvantageTransform,
  token_loss: TokenLoss,
  weights: TokenWeights,
  *,
  keep: Filter = valid_responses,
  value_target: AdvantageTransform | None = None,
) -> Estimator:
  """Composes an estimator.

    L = Σᵢₜ wᵢₜ ℓᵢₜ,   ℓ = token_loss,   A = advantages(R)

  Args:
    advantages: response rewards → advantages.
    token_loss: the loss of each token.
    weights: token weights of the sum.
    keep: selects the responses to train on and count in N.  Group statistics
      still cover all valid responses.
    value_target: response rewards → targets of a critic.

  Returns:
    An `Estimator`.  Its `prepare` raises ValueError for too few responses per
    prompt and for a required array that is missing or has the wrong shape.

  Raises:
    ValueError: the parts do not fit together.
  """
  needs = _needs_of_parts(advantages, token_loss, weights, keep, value_target)

  def reweight(batch: Batch) -> Batch:
    mask, counted = batch.mask & batch.valid, batch.valid
    if batch.whole is None:
      return batch.replace(weights=weights(mask, counted))
    counted &= batch.whole
    return batch.replace(weights=weights(mask, counted) * batch.shares)

  def prepare(rollouts: Rollouts) -> Batch:
    _check(rollouts, needs)
    rollouts = blank_rollouts(rollouts)
    rewards = rollouts.rewards
    advantage = advantages.apply(rewards, rollouts)
    target = value_target and value_target.apply(rewards, rollouts)
    valid = rollouts.valid & keep(rollouts)
    mask, whole, shares = _own_tokens(rollouts)
    batch = Batch(
      tokens=rollouts.tokens,
      mask=mask,
      log_probs=rollouts.log_probs,
      valid=valid,
      advantages=jnp.where(valid, advantage, 0.0),
      weights=jnp.zeros_like(rollouts.log_probs),
      sampler_log_probs=rollouts.sampler_log_probs,
      ref_log_probs=rollouts.ref_log_probs,
      values=rollouts.values,
      value_targets=target,
      entropy=rollouts.entropy,
      whole=whole,
      shares=shares,
    )
    return jax.lax.stop_gradient(reweight(batch))

  def loss(outputs: Outputs, batch: Batch) -> Array:
    arrays = (outputs.log_probs, outputs.entropy, outputs.values)
    chex.assert_equal_shape(
      [batch.log_probs, batch.weights, *(x for x in arrays if x is not None)]
    )
    outputs, batch = _blank_outside(outputs, batch)
    return jnp.sum(batch.weights * token_loss.apply(outputs, batch))

  return Estimator(needs, prepare, reweight, loss)


def _needs_of_parts(
  advantages: AdvantageTransform,
  token_loss: TokenLoss,
  weights: TokenWeights,
  keep: Filter,
  value_target: AdvantageTransform | None,
) -> Needs:
  """Merges the needs of an estimator's parts.

  Raises:
    ValueError: the parts do not fit together.
  """
  if advantages.takes not in (None, 'response'):
    raise ValueError(
      f'the first transform takes a number per {advantages.takes}; rewards '
      'are per response: begin with `at_last_token()`'
    )
  if token_loss.needs.critic != (value_target is not None):
    raise ValueError(
      '`value_error` and `value_target` go together: one is missing'
    )
  needs = merge_needs(
    advantages.needs,
    token_loss.needs,
    Needs() if value_target is None else value_target.needs,
  )
  related = needs.tree or needs.branches and needs.branches.trained
  if related and keep != valid_responses:
    raise ValueError(
      '`keep` selects among whole groups, but rows may be branches: omit it'
    )
  if needs.tree and not is_plain_sum(weights):
    raise ValueError(
      'the nodes of a weighted tree have weights of their own, and only '
      '`sequence_sum` and `constant_length` leave them as they are'
    )
  return needs


def start_running(needs: Needs) -> dict[str, Array]:
  """Returns the `Rollouts.running` of the first batch."""
  return {part.name: jnp.float32(part.initial) for part in needs.running}


def update_running(needs: Needs, rollouts: Rollouts) -> dict[str, Array]:
  """Returns the `Rollouts.running` of the batch after `rollouts`.

  Only whole responses count, not branches; of trees, all leaves.
  """
  running = rollouts.running or {}
  rollouts = blank_rollouts(rollouts)
  if rollouts.parents is not None and rollouts.node_weights is None:
    valid = rollouts.valid & whole_responses(rollouts)
    rollouts = blank_rollouts(rollouts.replace(valid=valid))
  return {
    part.name: part.update(running[part.name], rollouts)
    for part in needs.running
  }


def _own_tokens(rollouts: Rollouts) -> tuple[Array, ...]:
  """Returns the mask without inherited tokens, the whole rows, and shares."""
  if rollouts.parents is None:
    return rollouts.mask, None, None
  time = jnp.arange(rollouts.mask.shape[2])[None, None]
  added = rollouts.mask & (time >= rollouts.forked_at)
  shares = rollouts.node_weights
  if shares is None:
    shares = fork_shares(rollouts)
  return added, whole_responses(rollouts), shares


def _blank_outside(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
  """Zeros entries of a batch and its outputs outside the mask."""
  inside = functools.partial(blank, batch.mask & batch.valid)
  return (
    outputs.replace(
      log_probs=inside(outputs.log_probs),
      entropy=inside(outputs.entropy),
      values=inside(outputs.values),
    ),
    batch.replace(
      log_probs=inside(batch.log_probs),
      sampler_log_probs=inside(batch.sampler_log_probs),
      ref_log_probs=inside(batch.ref_log_probs),
      values=inside(batch.values),
      value_targets=inside(batch.value_targets),
      entropy=inside(batch.entropy),
    ),
  )


def _check(rollouts: Rollouts, needs: Needs) -> None:
  prompts, samples, length = rollouts.tokens.shape
  shapes = dict.fromkeys(PER_TOKEN, (prompts, samples, length))
  masks = ('mask', 'branch_mask')
  shapes |= dict.fromkeys(masks, (prompts, samples, length))
  per_row = ('rewards', 'valid', 'parents', 'forked_at')
  shapes |= dict.fromkeys(per_row, (prompts, samples, 1))
  shapes['greedy_rewards'] = (prompts, 1, 1)
  for name, shape in shapes.items():
    array = getattr(rollouts, name)
    if array is not None and array.shape != shape:
      # Broadcasting would assign another response's reward or log-probability.
      raise ValueError(
        f'`{name}` in the rollouts is {list(array.shape)}; with tokens of '
        f'{list(rollouts.tokens.shape)} it has to be {list(shape)}'
      )
  if samples < needs.samples:
    raise ValueError(
      f'this estimator needs at least {needs.samples} responses per prompt '
      f'and got {samples}'
    )
  branched = needs.branches is not None
  rows = needs.tree or branched and needs.branches.trained
  if rollouts.parents is not None and not rows:
    raise ValueError(
      'the rollouts have rows that are branches (`parents`), which this '
      'estimator would take for responses'
    )
  branched = branched and not rows
  required = {
    'ref_log_probs': needs.reference,
    'greedy_rewards': needs.greedy,
    'values': needs.critic,
    'entropy': needs.entropy,
    'score_norms': needs.score_norms,
    'token_rewards': needs.token_rewards,
    'branch_values': branched,
    'branch_mask': branched,
    'branch_baselines': branched and needs.branches.score_weighted,
    'parents': rows,
    'forked_at': rows,
    'node_weights': needs.tree is not None,
    'running': bool(needs.running),
  }
  for name, needed in required.items():
    if needed and getattr(rollouts, name) is None:
      raise ValueError(f'this estimator needs `{name}` in the rollouts')
