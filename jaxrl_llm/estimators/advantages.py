"""Transforms of response rewards into advantages.

Each maps an array, [P, G, 1] or [P, G, T], to the next; `chain` applies them
in reading order, beginning with the rewards.  Group statistics are taken along
axis 1 over the valid responses of a prompt.  A line `Bias:` states what a
transform does to the expected on-policy policy gradient.
"""

import chex
import jax.numpy as jnp

from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Needs,
  Rollouts,
  merge_needs,
  valid_responses,
)


def chain(*transforms: AdvantageTransform) -> AdvantageTransform:
  """Applies `transforms` one after the other, the first one first."""

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    for transform in transforms:
      advantages = transform.apply(advantages, rollouts)
    return advantages

  return AdvantageTransform(apply, merge_needs(*(t.needs for t in transforms)))


def identity() -> AdvantageTransform:
  """The reward itself.

    Aᵢ = Rᵢ

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none.
  """
  return AdvantageTransform(lambda advantages, rollouts: advantages)


def ones() -> AdvantageTransform:
  """Weighs every response alike, whatever it earned: maximum likelihood.

    Aᵢ = 1

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: another objective; for responses that were given, not sampled.
  """
  return AdvantageTransform(
    lambda advantages, rollouts: jnp.ones_like(advantages)
  )


def subtract_group_mean() -> AdvantageTransform:
  """Subtracts from each response the mean over its group, itself included.

    Aᵢ = Rᵢ − mean R

  Level: response, [P, G, 1] → [P, G, 1].  Exactly 0 where all rewards of a
  group are equal.
  Bias: scale (G−1)/G.

  References:
    Liu et al., `Understanding R1-Zero-Like Training
    <https://arxiv.org/abs/2503.20783>`_, 2025
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    centred = advantages - _mean(advantages, valid)
    return jnp.where(_varies(advantages, valid), centred, 0.0)

  return AdvantageTransform(apply, Needs(samples=2))


def subtract_leave_one_out_mean() -> AdvantageTransform:
  """Subtracts from each response the mean of its siblings.

    Aᵢ = Rᵢ − 1/(G−1) Σ_{j≠i} Rⱼ = G/(G−1) (Rᵢ − mean R)

  Level: response, [P, G, 1] → [P, G, 1].  Exactly 0 where all rewards of a
  group are equal, and for a response without a valid sibling.
  Bias: none.  (The group *mean* scales the gradient by (G−1)/G.)

  References:
    Ahmadian et al., `Back to Basics <https://arxiv.org/abs/2402.14740>`_, 2024
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    count = valid.sum(axis=1, keepdims=True)
    scale = count / jnp.maximum(count - 1, 1)
    centred = scale * (advantages - _mean(advantages, valid))
    return jnp.where(_varies(advantages, valid), centred, 0.0)

  return AdvantageTransform(apply, Needs(samples=2))


def standardize(epsilon: float = 1e-6) -> AdvantageTransform:
  """Centres each group and divides by its standard deviation.

    Aᵢ = (Rᵢ − mean R) / (std R + ε)

  The deviation has G−1 in its denominator (ddof = 1), as in TRL, verl and
  Tunix.  Their ε differ: 1e-4 in TRL, 1e-6 in verl and Tunix, 1e-9 in
  OpenRLHF.  A group of equal rewards gives exactly 0, decided by comparing the
  rewards: their deviation is not 0 in float32.

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: reweights prompts by 1/std (exactly that for binary rewards, a tilt
  otherwise).

  Args:
    epsilon: ε, in units of the reward.

  References:
    Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, 2024
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    centred = advantages - _mean(advantages, valid)
    squares = jnp.where(valid, jnp.square(centred), 0.0)
    count = valid.sum(axis=1, keepdims=True)
    variance = squares.sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    standardized = centred / (jnp.sqrt(variance) + epsilon)
    return jnp.where(_varies(advantages, valid), standardized, 0.0)

  return AdvantageTransform(apply, Needs(samples=2))


def subtract_response_kl(coefficient: float) -> AdvantageTransform:
  """Charges each response its own log-ratio to the reference policy.

    Rᵢ ← Rᵢ − β Σₜ (log πᵢₜ − log π_refᵢₜ)

  The sum over the response is part of the response-level reward, so it goes
  before any baseline.

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none for the objective E[R] − β KL(π‖π_ref).

  Args:
    coefficient: β, in units of the reward per nat.
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    chex.assert_equal_shape([rollouts.log_probs, rollouts.ref_log_probs])
    ratios = rollouts.log_probs - rollouts.ref_log_probs
    kl = jnp.where(rollouts.mask, ratios, 0.0).sum(axis=2, keepdims=True)
    return advantages - coefficient * kl

  return AdvantageTransform(apply, Needs(reference=True))


def _mean(x: Array, valid: Array) -> Array:
  count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
  return jnp.where(valid, x, 0.0).sum(axis=1, keepdims=True) / count


def _varies(x: Array, valid: Array) -> Array:
  """True for groups, [P, 1, ·], whose valid entries are not all equal."""
  highest = jnp.where(valid, x, -jnp.inf).max(axis=1, keepdims=True)
  lowest = jnp.where(valid, x, jnp.inf).min(axis=1, keepdims=True)
  return highest > lowest
