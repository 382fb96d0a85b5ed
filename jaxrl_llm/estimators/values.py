"""Sources of values: what a state is worth.

A critic knows it at every token, Monte Carlo branches at a few.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.estimators.baselines import (
  score_norm,
  subtract_leave_one_out_mean,
  subtract_weighted_leave_one_out_mean,
)
from jaxrl_llm.estimators.positions import Branches, Positions
from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Needs,
  Rollouts,
  blank_rollouts,
  valid_responses,
)


class Known(NamedTuple):
  """Values of the states before tokens, [P, G, T] each.

  Attributes:
    values: in units of the reward.
    baselines: what an advantage is taken against at the same states.
    where: bool, at which states they are known; the first is always.
  """

  values: Array
  baselines: Array
  where: Array


class Values(NamedTuple):
  """A source of values."""

  apply: Callable[[Rollouts], Known]
  needs: Needs


def critic() -> Values:
  """A learned value of every state."""

  def apply(rollouts: Rollouts) -> Known:
    everywhere = jnp.ones_like(rollouts.mask)
    return Known(rollouts.values, rollouts.values, everywhere)

  return Values(apply, Needs(critic=True))


def branches(
  count: int,
  samples: int,
  positions: Positions,
  score_weighted: bool = False,
) -> Values:
  """Monte Carlo values at a few states; the first from the other responses.

    V₀ = mean of the siblings' rewards,   V_p = mean of K fresh continuations

  Without a valid sibling V₀ is 0.

  Args:
    count: the most positions per response, at least 1.
    samples: K, continuations per position, at least 1.
    positions: a rule of `positions`.
    score_weighted: takes advantages against the score-weighted mean of the
      same continuations, which has lower variance than their mean.
  """
  if count < 1 or samples < 1:
    raise ValueError(f'branches: {count=} and {samples=} have to be ≥ 1')
  if not isinstance(positions, Positions):
    raise ValueError(f'branches: {positions=} is no rule, such as uniform()')
  others = subtract_leave_one_out_mean()
  weighted = subtract_weighted_leave_one_out_mean(score_norm())

  def apply(rollouts: Rollouts) -> Known:
    first = jnp.arange(rollouts.mask.shape[2]) == 0
    first = jnp.broadcast_to(first, rollouts.mask.shape)
    where = first | rollouts.branch_mask
    rewards = rollouts.rewards
    siblings = valid_responses(rollouts).sum(axis=1, keepdims=True) > 1
    root = rewards - others.apply(rewards, rollouts)
    root = jnp.where(siblings, root, 0.0)
    values = jnp.where(first, root, rollouts.branch_values)
    if not score_weighted:
      return Known(values, values, where)
    root = rewards - weighted.apply(rewards, rollouts)
    root = jnp.where(siblings, root, 0.0)
    return Known(
      values, jnp.where(first, root, rollouts.branch_baselines), where
    )

  rule = Branches(count, samples, positions, score_weighted)
  needs = Needs(
    samples=2,
    branches=rule,
    score_norms=score_weighted,
    entropy=positions.reads_entropy,
  )
  return Values(apply, needs)


def branch_returns(
  shaping: AdvantageTransform | None,
  rewards: Array,
  rollouts: Rollouts,
  forked_at: Array,
) -> Array:
  """What branches earn from their forks on: of one fork, V is their mean.

    Σ_{t ≥ fork} rₜ   of the rewards as shaped, γ = 1

  A reward that `shaping` leaves per response counts as a whole, wherever the
  fork is; so does one on the last token.

  Args:
    shaping: `Branches.shaping`, what the responses' own rewards go through.
    rewards: [P, R, 1] of the branches as whole responses, prefix and all.
    rollouts: of the branches, [P, R, T], with what `shaping` needs.
    forked_at: [P, R, 1], tokens of the prefix.

  Returns:
    [P, R, 1] in units of the reward, 0 where a branch is not valid.
  """
  rollouts = blank_rollouts(rollouts.replace(rewards=rewards))
  flow = rollouts.rewards
  if shaping is not None:
    flow = shaping.apply(flow, rollouts)
  if flow.shape == rollouts.mask.shape:
    time = jnp.arange(rollouts.mask.shape[2])[None, None]
    later = rollouts.mask & (time >= forked_at)
    flow = jnp.where(later, flow, 0.0).sum(axis=2, keepdims=True)
  return jnp.where(rollouts.valid, flow, 0.0)
