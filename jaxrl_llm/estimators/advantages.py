"""Transforms of response rewards: chaining, shaping, KL.

Each maps an array, [P, G, 1] or [P, G, T], to the next; `chain` applies them
in reading order, beginning with the rewards.  `baselines` contains transforms
that centre a reward, `credit` those that spread it over tokens.  `Bias:` lines
state a transform's effect on the expected on-policy policy gradient.
"""

import dataclasses
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
  """Applies `transforms` in order.

  Transforms before Monte Carlo values shape the reward, so they also apply to
  the rewards of branches (`Branches.shaping`).  Chains of the same parts are
  equal.

  Raises:
    ValueError: the order would be silently wrong: a transform expects numbers
      per response and gets them per token, or vice versa; or state values are
      compared with something that is not a reward, such as a baseline's output.
  """
  centred = takes_reward = False
  takes = level = None
  for place, transform in enumerate(transforms, 1):
    if centred and transform.takes_reward:
      raise ValueError(
        f'transform {place} of the chain values states, but its input is no '
        'longer a reward: put baselines after it, or omit them'
      )
    if transform.takes and level and transform.takes != level:
      raise ValueError(
        f'transform {place} of the chain takes a number per '
        f'{transform.takes} and gets one per {level}'
      )
    takes = takes or (transform.takes if level is None else None)
    level = transform.gives or level or transform.takes
    takes_reward |= transform.takes_reward and not centred
    centred |= transform.centres
  needs = merge_needs(
    *(
      _shape_branches(transform.needs, transforms[:place])
      for place, transform in enumerate(transforms)
    )
  )
  return AdvantageTransform(
    _Chain(transforms), needs, takes, level, centred, takes_reward
  )


@dataclasses.dataclass(frozen=True)
class _Chain:
  """A chain that equals one of equal parts, as `Needs` requires."""

  transforms: tuple[AdvantageTransform, ...]

  def __call__(self, advantages: Array, rollouts: Rollouts) -> Array:
    for transform in self.transforms:
      advantages = transform.apply(advantages, rollouts)
    return advantages


def _shape_branches(
  needs: Needs, before: tuple[AdvantageTransform, ...]
) -> Needs:
  """Prepends `before` to the shaping of branch rewards in `needs`."""
  if needs.branches is None or not before:
    return needs
  inner = needs.branches.shaping
  parts = before if inner is None else (*before, inner)
  shaping = parts[0] if len(parts) == 1 else chain(*parts)
  return needs._replace(branches=needs.branches._replace(shaping=shaping))


def identity() -> AdvantageTransform:
  """The reward itself.

    Aᵢ = Rᵢ

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none.
  """
  return AdvantageTransform(lambda advantages, rollouts: advantages)


def ones() -> AdvantageTransform:
  """Weights all responses equally, whatever their reward: maximum likelihood.

    Aᵢ = 1

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: another objective; for responses that were given, not sampled.
  """
  return AdvantageTransform(
    lambda advantages, rollouts: jnp.ones_like(advantages), centres=True
  )


def penalize_overlong(max_length: int, buffer: int) -> AdvantageTransform:
  """Subtracts up to 1 from the reward of responses near the length limit.

    R ← R − clip((T − (max_length − buffer)) / buffer, 0, 1)

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none for the reward with its penalty.

  Args:
    max_length: tokens at which the penalty reaches 1.
    buffer: width of the ramp, tokens.

  References:
    Yu et al., `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025, eq. 13
  """

  if not 0 < buffer <= max_length:
    raise ValueError(f'{buffer=} has to be between 1 and {max_length=}')

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    over = rollouts.mask.sum(axis=2, keepdims=True) - (max_length - buffer)
    return advantages - jnp.clip(over / buffer, 0.0, 1.0)

  return AdvantageTransform(apply, takes='response')


def entropy_where_equal(
  coefficient: float, right: Callable[[Array], Array] = lambda r: r > 0.5
) -> AdvantageTransform:
  """Replaces the advantages of groups with equal rewards by entropy terms.

    Aᵢₜ = α Hᵢₜ                  where all responses are right
    Aᵢₜ = − α (maxₛ Hᵢₛ − Hᵢₜ)   where all are equal and wrong

  Other groups keep their advantages.  H is the entropy at sampling time; the
  maximum is over the response.  Equality refers to `rollouts.rewards`.

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

  needs = Needs(samples=2, entropy=True)
  return AdvantageTransform(
    apply, needs, takes='response', gives='token advantage', centres=True
  )


def adaptive_kl(
  initial: float, target: float, horizon: int, name: str = 'kl_coefficient'
) -> Running:
  """A KL coefficient that steers the responses' KL towards a target.

    β ← β (1 + min(1, n/horizon) · clip(KL/target − 1, −0.2, 0.2))

  The step is proportional to the responses, as in the authors' code; the paper
  has a constant, 0.1.  All three numbers must be positive.

  Args:
    initial: β of the first batch.
    target: KL of a whole response, nats.
    horizon: in responses; n is the number of responses in a batch.
    name: of the running number.

  References:
    Ziegler et al., `Fine-Tuning Language Models from Human Preferences
    <https://arxiv.org/abs/1909.08593>`_, 2019, section 2.2
  """

  if min(initial, target, horizon) <= 0:
    raise ValueError(f'{initial=}, {target=}, {horizon=} have to be above 0')

  def update(value: Array, rollouts: Rollouts) -> Array:
    count = valid_responses(rollouts).sum()
    kl = _response_kl(rollouts).sum() / jnp.maximum(count, 1)
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return value * (1.0 + jnp.minimum(count / horizon, 1.0) * error)

  return Running(name, initial, update)


def subtract_response_kl(coefficient: float | Running) -> AdvantageTransform:
  """Subtracts from each response its log-ratio to the reference policy.

    Rᵢ ← Rᵢ − β Σₜ (log πᵢₜ − log π_refᵢₜ)

  k1 inside the reward.  The sum is part of the response's reward, so it comes
  before any baseline.

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: none for the objective E[R] − β KL(π‖π_ref) of whole responses.

  Args:
    coefficient: β, in units of the reward per nat, or `adaptive_kl`.
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    beta = current(coefficient, rollouts)
    return advantages - beta * _response_kl(rollouts)

  needs = Needs(reference=True, running=running_part(coefficient))
  return AdvantageTransform(apply, needs, takes='response')


def current(coefficient: float | Running, rollouts: Rollouts) -> float | Array:
  """Returns the value of a constant or running coefficient."""
  if isinstance(coefficient, Running):
    return rollouts.running[coefficient.name]
  return coefficient


def running_part(coefficient: float | Running) -> tuple[Running, ...]:
  """Returns a coefficient's contribution to `Needs.running`."""
  return (coefficient,) if isinstance(coefficient, Running) else ()


def token_kl(rollouts: Rollouts) -> Array:
  """Returns log π − log π_ref of the sampled tokens, [P, G, T] nats."""
  kept = rollouts.mask & valid_responses(rollouts)
  return jnp.where(kept, rollouts.log_probs - rollouts.ref_log_probs, 0.0)


def _response_kl(rollouts: Rollouts) -> Array:
  return token_kl(rollouts).sum(axis=2, keepdims=True)
