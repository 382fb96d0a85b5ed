"""Sources of state values.

A critic provides them at every token, Monte Carlo branches at a few.  Both
return a `Known`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_llm.estimators.baselines import (
  score_norm,
  subtract_leave_one_out_mean,
  subtract_weighted_leave_one_out_mean,
)
from jaxrl_llm.estimators.positions import (
  Branches,
  Positions,
  check_branches,
)
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

  `values` must be unbiased; a baseline may be any function of the prefix.

  Attributes:
    values: replacements for the rewards to go, in units of the reward.
    baselines: baselines of the advantages.
    where: bool, states with an advantage; always includes that before the
      policy's first token.
    fresh: bool, states whose value replaces the response's own reward to go;
      `where` if None.
  """

  values: Array
  baselines: Array
  where: Array
  fresh: Array | None = None


class Values(NamedTuple):
  """A source of values.

  Attributes:
    apply: (rewards, rollouts) → `Known`; rewards are the flowing token rewards,
      [P, G, T].
    needs: inputs it requires.
  """

  apply: Callable[[Array, Rollouts], Known]
  needs: Needs


def critic() -> Values:
  """A learned value of every state."""

  def apply(rewards: Array, rollouts: Rollouts) -> Known:
    everywhere = jnp.ones_like(rollouts.mask)
    return Known(rollouts.values, rollouts.values, everywhere)

  return Values(apply, Needs(critic=True))


def branches(
  count: int,
  samples: int,
  positions: Positions,
  score_weighted: bool = False,
) -> Values:
  """Monte Carlo values at a few states; the first uses the other responses.

    V₀ = mean of what the siblings earned,   V_p = mean of K fresh continuations

  Without a valid sibling V₀ is 0.

  Args:
    count: maximum number of positions per response, at least 1.
    samples: K, continuations per position, at least 1.
    positions: a rule of `positions`.
    score_weighted: takes advantages against the score-weighted mean of the
      same continuations, which has lower variance than their mean.
  """
  check_branches('branches', count, samples, positions)
  others = subtract_leave_one_out_mean()
  weighted = subtract_weighted_leave_one_out_mean(score_norm())

  def apply(rewards: Array, rollouts: Rollouts) -> Known:
    # The policy's own first token: a tool's, or padding, may precede it.
    first = rollouts.mask & (jnp.cumsum(rollouts.mask, axis=2) == 1)
    where = first | rollouts.branch_mask
    earned = _earned(rewards, rollouts)
    siblings = valid_responses(rollouts).sum(axis=1, keepdims=True) > 1
    root = lambda without: jnp.where(
      siblings, earned - without.apply(earned, rollouts), 0.0
    )
    values = jnp.where(first, root(others), rollouts.branch_values)
    baselines = values
    if score_weighted:
      baselines = jnp.where(first, root(weighted), rollouts.branch_baselines)
    return Known(values, baselines, where)

  rule = Branches(count, samples, positions, score_weighted)
  needs = Needs(
    samples=2,
    branches=rule,
    score_norms=score_weighted,
    entropy=positions.reads_entropy,
  )
  return Values(apply, needs)


def branches_with_critic(
  count: int, samples: int, positions: Positions
) -> Values:
  """Monte Carlo values at a few states, against a critic's at every token.

    Aₜ = V_b − Vφ(sₜ)   for a < t ≤ b,   V_T = R

  sₜ is the state before token t.  The critic is a function of the prefix: its
  errors cause no bias, and no sibling is needed.

  Args:
    count, samples, positions: as in `branches`.
  """
  check_branches('branches_with_critic', count, samples, positions)

  def apply(rewards: Array, rollouts: Rollouts) -> Known:
    everywhere = jnp.ones_like(rollouts.mask)
    inside = jnp.arange(rollouts.mask.shape[2])[None, None] > 0
    fresh = rollouts.branch_mask & inside
    return Known(rollouts.branch_values, rollouts.values, everywhere, fresh)

  rule = Branches(count, samples, positions)
  needs = Needs(critic=True, branches=rule, entropy=positions.reads_entropy)
  return Values(apply, needs)


def _earned(rewards: Array, rollouts: Rollouts) -> Array:
  """Sums each response's token rewards, [P, G, 1].

  A response without tokens keeps its reward.
  """
  inside = jnp.where(rollouts.mask, rewards, 0.0)
  some = rollouts.mask.any(axis=2, keepdims=True)
  return jnp.where(some, inside.sum(axis=2, keepdims=True), rollouts.rewards)


def branch_returns(
  shaping: AdvantageTransform | None,
  rewards: Array,
  rollouts: Rollouts,
  forked_at: Array,
) -> Array:
  """Sums the rewards of branches from their forks on; V is a fork's mean.

    Σ_{t ≥ fork} rₜ   of the rewards as shaped, γ = 1

  A reward that `shaping` leaves per response counts in full, wherever the fork
  is; so does one on the last token.

  Args:
    shaping: `Branches.shaping`, which also transforms the responses' rewards.
    rewards: [P, R, 1] of the branches as whole responses, prefix included.
    rollouts: of the branches, [P, R, T], with the inputs of `shaping`.
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
