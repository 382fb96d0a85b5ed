"""An estimator is a value: advantages, token loss and token weights."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Batch,
  Needs,
  Outputs,
  Rollouts,
  TokenLoss,
  TokenWeights,
  merge_needs,
  valid_responses,
)


class Estimator(NamedTuple):
  """A policy-gradient estimator.

  Attributes:
    needs: what must be sampled or computed first.
    prepare: whole rollouts → batch.  Sees whole groups, stops gradients.
    weigh: batch → batch with the token weights of these rows alone.  `prepare`
      has done it for all rows; call it again on each optimiser minibatch.
    loss: (outputs, batch) → scalar, a plain sum over tokens, so that the
      losses and gradients of micro-batches add up exactly.
  """

  needs: Needs
  prepare: Callable[[Rollouts], Batch]
  weigh: Callable[[Batch], Batch]
  loss: Callable[[Outputs, Batch], Array]


def estimator(
  advantages: AdvantageTransform, token_loss: TokenLoss, weights: TokenWeights
) -> Estimator:
  """Composes an estimator.

    L = Σᵢₜ wᵢₜ ℓᵢₜ,   ℓ = token_loss,   A = advantages(R)

  Args:
    advantages: response rewards → advantages.
    token_loss: the loss of each token.
    weights: how tokens are summed.

  Returns:
    An `Estimator`.  Its `prepare` raises ValueError for too few responses per
    prompt and for a missing array that the parts need.
  """
  needs = merge_needs(advantages.needs, token_loss.needs)

  def weigh(batch: Batch) -> Batch:
    mask = batch.mask & batch.valid
    return batch.replace(weights=weights(mask, batch.valid))

  def prepare(rollouts: Rollouts) -> Batch:
    _check(rollouts, needs)
    valid = valid_responses(rollouts)
    rewards = jnp.where(valid, rollouts.rewards, 0.0)
    advantage = advantages.apply(rewards, rollouts.replace(rewards=rewards))
    batch = Batch(
      tokens=rollouts.tokens,
      mask=rollouts.mask,
      log_probs=rollouts.log_probs,
      valid=valid,
      advantages=jnp.where(valid, advantage, 0.0),
      weights=jnp.zeros_like(rollouts.log_probs),
      sampler_log_probs=rollouts.sampler_log_probs,
      ref_log_probs=rollouts.ref_log_probs,
      values=rollouts.values,
      entropy=rollouts.entropy,
      branches=rollouts.branches,
    )
    return jax.lax.stop_gradient(weigh(batch))

  def loss(outputs: Outputs, batch: Batch) -> Array:
    chex.assert_equal_shape([outputs.log_probs, batch.log_probs, batch.weights])
    outputs, batch = _blank_outside(outputs, batch)
    return jnp.sum(batch.weights * token_loss.apply(outputs, batch))

  return Estimator(needs, prepare, weigh, loss)


def _blank_outside(outputs: Outputs, batch: Batch) -> tuple[Outputs, Batch]:
  """Zeros per-token arrays outside the mask, where anything may stand.

  0 · NaN is NaN: a weight of 0 alone would not keep garbage out.
  """
  mask = batch.mask & batch.valid

  def blank(x: Array | None) -> Array | None:
    return None if x is None else jnp.where(mask, x, 0.0)

  return (
    outputs.replace(
      log_probs=blank(outputs.log_probs),
      entropy=blank(outputs.entropy),
      values=blank(outputs.values),
    ),
    batch.replace(
      log_probs=blank(batch.log_probs),
      sampler_log_probs=blank(batch.sampler_log_probs),
      ref_log_probs=blank(batch.ref_log_probs),
      values=blank(batch.values),
      value_targets=blank(batch.value_targets),
      entropy=blank(batch.entropy),
    ),
  )


def _check(rollouts: Rollouts, needs: Needs) -> None:
  prompts, samples, length = rollouts.tokens.shape
  chex.assert_shape(
    [rollouts.mask, rollouts.log_probs], (prompts, samples, length)
  )
  chex.assert_shape(
    [rollouts.rewards, valid_responses(rollouts)], (prompts, samples, 1)
  )
  if samples < needs.samples:
    raise ValueError(
      f'this estimator needs at least {needs.samples} responses per prompt '
      f'and got {samples}'
    )
  required = {
    'ref_log_probs': needs.reference,
    'greedy_rewards': needs.greedy,
    'values': needs.critic,
    'entropy': needs.entropy,
    'score_norms': needs.score_norms,
    'branch_values': needs.branches is not None,
  }
  for name, needed in required.items():
    if needed and getattr(rollouts, name) is None:
      raise ValueError(f'this estimator needs `{name}` in the rollouts')
