"""Token weights, and filters of the responses to train on.

Weights map `mask`, [P, G, T], and `valid`, [P, G, 1], of one optimiser
minibatch to [P, G, T].  N is the number of valid responses in that minibatch.
No weight depends on padding, micro-batches or devices.  Filters map rollouts
to [P, G, 1] bool: the `keep` of `estimator`.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.estimators.baselines import varies
from jaxrl_llm.estimators.types import (
  Array,
  Filter,
  Rollouts,
  TokenWeights,
  valid_responses,
)


class _PlainSum(NamedTuple):
  """Weighs all tokens alike: wᵢₜ = 1/(N · divisor)."""

  divisor: float

  def __call__(self, mask: Array, valid: Array) -> Array:
    return mask / (_count(valid) * self.divisor)


def is_plain_sum(weights: TokenWeights) -> bool:
  """Returns True if all tokens weigh alike, whatever the lengths."""
  return isinstance(weights, _PlainSum)


def sequence_sum() -> TokenWeights:
  """Sums a response's tokens and averages over responses: wᵢₜ = 1/N.

  Bias: none.
  """
  return _PlainSum(1.0)


def constant_length(max_length: int) -> TokenWeights:
  """As `sequence_sum`, divided by a constant: wᵢₜ = 1/(N · max_length).

  Bias: scale 1/max_length.

  Args:
    max_length: the divisor, in tokens.  A constant of the run: not the padded
      width.
  """
  if max_length < 1:
    raise ValueError(f'{max_length=} has to be at least 1')
  return _PlainSum(float(max_length))


def sequence_mean() -> TokenWeights:
  """Averages over a response's tokens, then over responses: wᵢₜ = 1/(N Tᵢ).

  Bias: the response's own length divides its gradient, which tilts it.
  """

  def weights(mask: Array, valid: Array) -> Array:
    lengths = jnp.maximum(mask.sum(axis=2, keepdims=True), 1)
    return mask / (_count(valid) * lengths)

  return weights


def token_mean() -> TokenWeights:
  """Averages over all tokens of the minibatch: wᵢₜ = 1/ΣT.

  Bias: the denominator contains the response's own length, which tilts it.
  """
  return lambda mask, valid: mask / jnp.maximum(mask.sum(keepdims=True), 1)


def mixed_outcomes() -> Filter:
  """Keeps groups whose rewards are not all equal.

  A group baseline learns nothing from equal rewards.  Dropped groups do not
  count in N.

  Bias: a scale per prompt, the larger the fewer others are kept.
  """

  def keep(rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    return valid & varies(rollouts.rewards, valid)

  return keep


def reward_above(threshold: float) -> Filter:
  """Keeps responses with a reward above `threshold`."""
  return lambda rollouts: (
    valid_responses(rollouts) & (rollouts.rewards > threshold)
  )


def _count(valid: Array) -> Array:
  return jnp.maximum(valid.sum(keepdims=True), 1).astype(float)
