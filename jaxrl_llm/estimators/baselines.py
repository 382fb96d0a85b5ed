"""Baselines that are subtracted from a response's reward.

Group statistics are taken along axis 1 over the valid responses of a prompt.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Needs,
  Rollouts,
  Running,
  merge_needs,
  valid_responses,
)


def subtract_greedy_reward() -> AdvantageTransform:
  """Subtracts the reward of the prompt's greedy response.

    Aᵢ = Rᵢ − R(greedy response)

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none.

  References:
    Li et al., `ReMax <https://arxiv.org/abs/2310.10505>`_, 2023
  """
  return _baseline(
    lambda advantages, rollouts: advantages - rollouts.greedy_rewards,
    Needs(greedy=True),
  )


def subtract_running_mean(decay: float = 0.9) -> AdvantageTransform:
  """Subtracts a running mean reward of earlier batches.

    Aᵢ = Rᵢ − b,   b ← decay · b + (1 − decay) · mean R  after the batch

  b starts at 0.

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none.

  Args:
    decay: at least 0 and below 1.
  """
  if not 0 <= decay < 1:
    raise ValueError(f'{decay=} has to be at least 0 and below 1')

  def update(value: Array, rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    rewards = jnp.where(valid, rollouts.rewards, 0.0).sum()
    mean = rewards / jnp.maximum(valid.sum(), 1)
    return jnp.where(valid.any(), decay * value + (1 - decay) * mean, value)

  mean = Running('reward_mean', 0.0, update)
  return _baseline(
    lambda advantages, rollouts: advantages - rollouts.running[mean.name],
    Needs(running=(mean,)),
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
    centred = advantages - group_mean(advantages, valid)
    return jnp.where(varies(advantages, valid), centred, 0.0)

  return _baseline(apply, Needs(samples=2))


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
    centred = scale * (advantages - group_mean(advantages, valid))
    return jnp.where(varies(advantages, valid), centred, 0.0)

  return _baseline(apply, Needs(samples=2))


def standardize(epsilon: float = 1e-6) -> AdvantageTransform:
  """Centres each group and divides by its standard deviation.

    Aᵢ = (Rᵢ − mean R) / (std R + ε)

  The deviation has G−1 in its denominator (ddof = 1), as in TRL, verl and
  Tunix.  Their ε differ: 1e-4 in TRL, 1e-6 in verl and Tunix, 1e-9 in
  OpenRLHF.  A group of equal rewards yields exactly 0, detected by comparing
  the rewards, because their deviation is not 0 in float32.

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: reweights prompts, by about 1/std (that alone for binary rewards, and
  one scale for all of them up to G = 3; a tilt otherwise).

  Args:
    epsilon: ε ≥ 0, in units of the reward.

  References:
    Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, 2024
  """

  if epsilon < 0:
    raise ValueError(f'{epsilon=} has to be at least 0')

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    centred = advantages - group_mean(advantages, valid)
    squares = jnp.where(valid, jnp.square(centred), 0.0)
    count = valid.sum(axis=1, keepdims=True)
    variance = squares.sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    standardized = centred / (jnp.sqrt(variance) + epsilon)
    return jnp.where(varies(advantages, valid), standardized, 0.0)

  return _baseline(apply, Needs(samples=2))


_TINY = 1e-30  # avoids 0/0 where no response counts


def _baseline(apply, needs: Needs) -> AdvantageTransform:
  return AdvantageTransform(apply, needs, takes='response', centres=True)


class ResponseWeight(NamedTuple):
  """A response's weight in a weighted baseline, [P, G, 1]."""

  apply: Callable[[Rollouts], Array]
  needs: Needs = Needs()


def length() -> ResponseWeight:
  """The response's length in tokens."""
  return ResponseWeight(
    lambda rollouts: rollouts.mask.sum(axis=2, keepdims=True)
  )


def score_norm() -> ResponseWeight:
  """The response's summed squared score at the logits.

  Wᵢ = Σₜ ‖∇_logits log πᵢₜ‖² = Σₜ 1 − 2 πᵢₜ(wₜ) + Σᵥ πᵢₜ(v)²
  """

  def apply(rollouts: Rollouts) -> Array:
    norms = jnp.where(rollouts.mask, rollouts.score_norms, 0.0)
    return norms.sum(axis=2, keepdims=True)

  return ResponseWeight(apply, Needs(score_norms=True))


def subtract_weighted_mean(weight: ResponseWeight) -> AdvantageTransform:
  """Subtracts from each response a weighted mean of its group.

    Aᵢ = Rᵢ − Σⱼ Wⱼ Rⱼ / Σⱼ Wⱼ

  Level: response, [P, G, 1] → [P, G, 1].  Exactly 0 where all rewards of a
  group are equal.
  Bias: the response is in its own baseline, which tilts the gradient.

  References:
    Hao et al., `On-Policy RL with Optimal Reward Baseline
    <https://arxiv.org/abs/2505.23585>`_, 2025
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    weights = jnp.where(valid, weight.apply(rollouts), 0.0)
    total = weights.sum(axis=1, keepdims=True)
    # All weights are 0: weight the responses equally.
    weights = jnp.where(total > 0, weights, valid)
    total = jnp.where(total > 0, total, valid.sum(axis=1, keepdims=True))
    sums = (weights * advantages).sum(axis=1, keepdims=True)
    centred = advantages - sums / jnp.maximum(total, _TINY)
    return jnp.where(varies(advantages, valid), centred, 0.0)

  return _baseline(apply, merge_needs(Needs(samples=2), weight.needs))


def subtract_weighted_leave_one_out_mean(
  weight: ResponseWeight,
) -> AdvantageTransform:
  """Subtracts from each response a weighted mean of its siblings.

    Aᵢ = Rᵢ − Σ_{j≠i} Wⱼ Rⱼ / Σ_{j≠i} Wⱼ

  With `score_norm`, estimates the baseline that minimises the variance token by
  token.  Siblings whose weights are all 0 count equally.

  Level: response, [P, G, 1] → [P, G, 1].  Exactly 0 where all rewards of a
  group are equal, and for a response without a valid sibling.
  Bias: none.
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    weights = jnp.where(valid, weight.apply(rollouts), 0.0)
    ones = jnp.broadcast_to(valid, weights.shape).astype(advantages.dtype)
    weighed = _siblings(weights, weights.shape[1]).sum(axis=2) > 0
    mean = lambda w: (
      _siblings(w * advantages, w.shape[1]).sum(axis=2)
      / jnp.maximum(_siblings(w, w.shape[1]).sum(axis=2), _TINY)
    )
    baseline = jnp.where(weighed, mean(weights), mean(ones))
    count = valid.sum(axis=1, keepdims=True)
    keep = varies(advantages, valid) & (count > 1)
    return jnp.where(keep, advantages - baseline, 0.0)

  return _baseline(apply, merge_needs(Needs(samples=2), weight.needs))


def subtract_partner() -> AdvantageTransform:
  """Subtracts from each response the reward of its partner.

    A₂ₖ = R₂ₖ − R₂ₖ₊₁,   A₂ₖ₊₁ = R₂ₖ₊₁ − R₂ₖ

  Responses pair up along G in order.  Without a valid partner, A is 0.

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none.

  References:
    Wu et al., `Pairwise Proximal Policy Optimization
    <https://arxiv.org/abs/2310.00212>`_, 2023
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    difference = advantages - partner(advantages)
    return jnp.where(partner(valid_responses(rollouts)), difference, 0.0)

  return _baseline(apply, Needs(samples=2))


def partner(x: Array) -> Array:
  """Swaps the two members of each pair along axis 1.

  Raises:
    ValueError: axis 1 has an odd length.
  """
  prompts, samples, width = x.shape
  if samples % 2:
    raise ValueError(f'responses pair up: {samples} per prompt is odd')
  pairs = x.reshape(prompts, samples // 2, 2, width)
  return pairs[:, :, ::-1].reshape(x.shape)


def group_mean(x: Array, valid: Array) -> Array:
  count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
  return jnp.where(valid, x, 0.0).sum(axis=1, keepdims=True) / count


def varies(x: Array, valid: Array, axis: int | None = 1) -> Array:
  """Marks groups, [P, 1, ·] bool, whose valid entries are not all equal."""
  highest = jnp.where(valid, x, -jnp.inf).max(axis=axis, keepdims=True)
  lowest = jnp.where(valid, x, jnp.inf).min(axis=axis, keepdims=True)
  # Not `highest > lowest`, which would hide a NaN.
  return ~(highest <= lowest)


def _siblings(x: Array, samples: int) -> Array:
  """[P, G, 1] → [P, G, G, 1]: entry i is x with 0 in place of xᵢ.

  Sums over axis 2 are sums over siblings, without the cancellation of
  subtracting xᵢ from the total.
  """
  return jnp.where(
    jnp.eye(samples, dtype=bool)[None, :, :, None], 0, x[:, None]
  )
