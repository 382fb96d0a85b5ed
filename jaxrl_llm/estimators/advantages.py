"""Transforms of response rewards: chaining, shaping, KL.

Each maps an array, [P, G, 1] or [P, G, T], to the next; `chain` applies them
in reading order, beginning with the rewards.  `baselines` holds those that
centre a reward, `credit` those that spread it over tokens.  A line `Bias:`
states what a transform does to the expected on-policy policy gradient.
"""

from collections.abc import Callable

import jax.numpy as jnp

from jaxrl_llm.estimators.baselines import varies
from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Needs,
  Rollouts,
  Running,
  merge_needs,
  valid_responses,
)


def chain(*transforms: AdvantageTransform) -> AdvantageTransform:
  """Applies `transforms` one after the other, the first one first.

  Raises:
    ValueError: the reward is shaped in front of Monte Carlo branches, which
      would be scored without it.  (A length penalty on the responses alone
      is a bias of 70 % in a toy.)
  """
  shaped = False
  for transform in transforms:
    if shaped and transform.needs.branches is not None:
      raise ValueError(
        'a transform that shapes the reward stands before branch values, but '
        'the branches are scored without it: make it a part of the reward'
      )
    shaped |= transform.shapes_reward

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    for transform in transforms:
      advantages = transform.apply(advantages, rollouts)
    return advantages

  needs = merge_needs(*(transform.needs for transform in transforms))
  return AdvantageTransform(apply, needs, shaped)


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


def penalize_overlong(max_length: int, buffer: int) -> AdvantageTransform:
  """Takes up to 1 from the reward of responses near the length limit.

    R ← R − clip((T − (max_length − buffer)) / buffer, 0, 1)

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none for the reward with its penalty.

  Args:
    max_length: from here on the penalty is 1, tokens.
    buffer: the width of the ramp, tokens.

  References:
    Yu et al., `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025, eq. 13
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    over = rollouts.mask.sum(axis=2, keepdims=True) - (max_length - buffer)
    return advantages - jnp.clip(over / buffer, 0.0, 1.0)

  return AdvantageTransform(apply, shapes_reward=True)


def entropy_where_equal(
  coefficient: float, right: Callable[[Array], Array] = lambda r: r > 0.5
) -> AdvantageTransform:
  """Gives groups whose rewards are all equal an advantage from the entropy.

    Aᵢₜ = α Hᵢₜ                  where all responses are right
    Aᵢₜ = − α (maxₛ Hᵢₛ − Hᵢₜ)   where all are equal and wrong

  Every other group keeps its advantage.  H is the entropy at sampling time;
  the maximum is over the response.  Equality is that of `rollouts.rewards`.

  Level: [P, G, 1] → token, [P, G, T].
  Bias: on purpose, where a group's rewards are equal.

  Args:
    coefficient: α, in units of the advantage per nat.
    right: rewards → bool.

  References:
    Le et al., `No Prompt Left Behind <https://arxiv.org/abs/2509.21880>`_, 2025
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    mask, entropy = rollouts.mask, rollouts.entropy
    valid = valid_responses(rollouts)
    highest = jnp.where(mask, entropy, 0.0).max(axis=2, keepdims=True)
    shaped = jnp.where(right(rollouts.rewards), entropy, entropy - highest)
    equal = ~varies(rollouts.rewards, valid)
    return jnp.where(equal & mask, coefficient * shaped, advantages)

  return AdvantageTransform(apply, Needs(samples=2, entropy=True))


def adaptive_kl(
  initial: float, target: float, horizon: int, name: str = 'kl_coefficient'
) -> Running:
  """A KL coefficient that steers the KL of the responses to a target.

    β ← β (1 + n/horizon · clip(KL/target − 1, −0.2, 0.2))

  Args:
    initial: β of the first batch.
    target: KL of a whole response, nats.
    horizon: in responses; n is the number of responses of a batch.
    name: of the running number.

  References:
    Ziegler et al., `Fine-Tuning Language Models from Human Preferences
    <https://arxiv.org/abs/1909.08593>`_, 2019, section 2.2
  """

  def update(value: Array, rollouts: Rollouts) -> Array:
    count = valid_responses(rollouts).sum()
    kl = _response_kl(rollouts).sum() / jnp.maximum(count, 1)
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return value * (1.0 + count / horizon * error)

  return Running(name, initial, update)


def subtract_response_kl(coefficient: float | Running) -> AdvantageTransform:
  """Charges each response its own log-ratio to the reference policy.

    Rᵢ ← Rᵢ − β Σₜ (log πᵢₜ − log π_refᵢₜ)

  k1 inside the reward.  The sum over the response is part of the
  response-level reward, so it goes before any baseline.

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none for the objective E[R] − β KL(π‖π_ref) of whole responses.

  Args:
    coefficient: β, in units of the reward per nat, or `adaptive_kl`.
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    beta = current(coefficient, rollouts)
    return advantages - beta * _response_kl(rollouts)

  needs = Needs(reference=True, running=running_part(coefficient))
  return AdvantageTransform(apply, needs, shapes_reward=True)


def current(coefficient: float | Running, rollouts: Rollouts) -> float | Array:
  """The value of a constant or running coefficient."""
  if isinstance(coefficient, Running):
    return rollouts.running[coefficient.name]
  return coefficient


def running_part(coefficient: float | Running) -> tuple[Running, ...]:
  """What a coefficient adds to `Needs.running`."""
  return (coefficient,) if isinstance(coefficient, Running) else ()


def token_kl(rollouts: Rollouts) -> Array:
  """log π − log π_ref of the sampled tokens, [P, G, T] nats, 0 outside."""
  kept = rollouts.mask & valid_responses(rollouts)
  return jnp.where(kept, rollouts.log_probs - rollouts.ref_log_probs, 0.0)


def _response_kl(rollouts: Rollouts) -> Array:
  return token_kl(rollouts).sum(axis=2, keepdims=True)
