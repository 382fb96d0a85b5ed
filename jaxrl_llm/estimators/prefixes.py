"""Baselines from the siblings that share a token's prefix.

Ordinary groups, whose responses begin alike where the policy is sure: what
stands before a token is the start of several responses, and the mean of their
rewards values it.
"""

import jax.numpy as jnp

from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Needs,
  Rollouts,
  Running,
  valid_responses,
)

_TINY = 1e-30  # avoids 0/0 where no response counts


def subtract_prefix_leave_one_out_mean(
  prior: float | Running = 1.0, score_weighted: bool = False
) -> AdvantageTransform:
  """Subtracts the mean of the siblings that share the prefix of a token.

    Aᵢₜ = Rᵢ − (Σ_{j∈S} Rⱼ + k · mean_{j≠i} Rⱼ) / (|S| + k)
    S = {j ≠ i: response j begins with the tokens of i before t}

  Level: response, [P, G, 1] → token advantage, [P, G, T].
  Bias: none: S, and its rewards given S, do not depend on token t of i.
  (Siblings that share token t, too, would tilt the gradient.)

  Args:
    prior: k ≥ 0, the siblings that the mean of the whole group is worth, or
      `prefix_prior`.
    score_weighted: weight each sibling in S by the squared score of its own
      token t, which estimates the baseline of least variance.
  """
  running = (prior,) if isinstance(prior, Running) else ()
  if not running and prior < 0:
    raise ValueError(f'{prior=} has to be at least 0')

  def apply(rewards: Array, rollouts: Rollouts) -> Array:
    k = rollouts.running[prior.name] if running else prior
    scored, whole = _scored(rewards, rollouts)
    before = siblings(rollouts)[0]
    count, mean = mean_over(before, scored)
    if score_weighted:
      norms = jnp.where(rollouts.mask, rollouts.score_norms, 0.0)
      total, weighted = mean_over(before * norms[:, None], scored)
      mean = jnp.where(total > 0, weighted, mean)
    share = count / jnp.where(count + k > 0, count + k, 1.0)
    advantages = rewards - whole - share * (mean - whole)
    return jnp.where(rollouts.mask, advantages, 0.0)

  needs = Needs(samples=2, score_norms=score_weighted, running=running)
  return AdvantageTransform(
    apply, needs, takes='response', gives='token advantage', centres=True
  )


def prefix_prior(initial: float = 1.0, decay: float = 0.9) -> Running:
  """The prior that fits earlier batches: noise of one reward over spread.

    k ← decay · k + (1 − decay) · c / a,   between 0 and 100

  c is the variance of rewards behind one prefix, a that of prefixes' values
  around the group's mean, over tokens with at least two siblings.

  Args:
    initial: k of the first batch.
    decay: at least 0 and below 1.
  """
  if not 0 <= decay < 1:
    raise ValueError(f'{decay=} has to be at least 0 and below 1')

  def update(value: Array, rollouts: Rollouts) -> Array:
    rewards, whole = _scored(rollouts.rewards, rollouts)
    before = siblings(rollouts)[0]
    count, mean = mean_over(before, rewards)
    squares = mean_over(before, jnp.square(rewards))[1] - jnp.square(mean)
    noise = squares * count / jnp.maximum(count - 1, 1)
    spread = jnp.square(mean - whole) - noise / jnp.maximum(count, 1)
    some = rollouts.mask & valid_responses(rollouts) & (count > 1)
    noise, spread = (jnp.where(some, x, 0.0).sum() for x in (noise, spread))
    found = jnp.clip(noise / jnp.maximum(spread, _TINY), 0.0, 100.0)
    return jnp.where(some.any(), decay * value + (1 - decay) * found, value)

  return Running('prefix_prior', initial, update)


def siblings(rollouts: Rollouts) -> tuple[Array, Array]:
  """Marks valid responses j ≠ i that share i's tokens, [P, i, j, T] of 0 and 1.

  Returns:
    Those that share the tokens before t, and those that share t, too.
  """
  pairs = lambda x: (x[:, :, None], x[:, None])
  equal = jnp.equal(*pairs(rollouts.tokens)) & jnp.equal(*pairs(rollouts.mask))
  shared = jnp.cumprod(equal, axis=3)
  before = jnp.concatenate(
    [jnp.ones_like(shared[..., :1]), shared[..., :-1]], axis=3
  )
  other = ~jnp.eye(equal.shape[1], dtype=bool)[None, :, :, None]
  valid = valid_responses(rollouts)[:, None]
  kept = (other & valid).astype(rollouts.log_probs.dtype)
  return before * kept, shared * kept


def mean_over(weights: Array, rewards: Array) -> tuple[Array, Array]:
  """Returns sums of weights, [P, i, j, T], over j, and means of rewards."""
  total = weights.sum(axis=2)
  sums = (weights * rewards[:, None]).sum(axis=2)
  return total, sums / jnp.where(total > 0, total, 1.0)


def _scored(rewards: Array, rollouts: Rollouts) -> tuple[Array, Array]:
  """Returns rewards, 0 where not valid, and leave-one-out means, [P, G, 1]."""
  valid = valid_responses(rollouts)
  rewards = jnp.where(valid, rewards, 0.0)
  total = rewards.sum(axis=1, keepdims=True) - rewards
  count = valid.sum(axis=1, keepdims=True) - valid
  return rewards, total / jnp.maximum(count, 1)
