"""The tree estimator, which also trains on the branches that value a state.

Given its prefix, a response and the K branches that fork there are K + 1
exchangeable continuations.  Each is trained on, against the mean of the others
and with 1/(K + 1) of the prefix's weight; a response with several forks is a
tree, and a token's weight is a product over the forks before it.

Rows are whole responses and their branches, related by `Rollouts.parents` and
`forked_at`.  All R rows of a prompt lie along axis 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
  valid_responses,
)


def tree(count: int, samples: int, positions: Positions) -> AdvantageTransform:
  """Compares every continuation with the others that fork from its state.

    V(leaf) = R,   V(fork) = mean of its continuations' V
    Aₜ = V(c) − mean of the other continuations' V

  c is the continuation that contains token t, from the last fork before it to
  its next fork or its end, and V(c) the value there.  The prompt is a fork
  whose continuations are the whole responses.  Token weights get a factor
  Π 1/(continuations) over the forks after the prompt: `Batch.shares`.

  A state without another valid continuation is not a fork: its tokens keep the
  baseline of the fork before it, or 0 at the prompt.  Branches of an invalid
  response are invalid.  If responses share a state, one of them has its
  branches; the choice may depend on the others' tokens but not on any reward.

  Level: [P, R, 1] or [P, R, T] → token, [P, R, T], 0 where a row is its
  parent's.  What flows is summed over each row, prefix and all.
  Bias: none where positions are stopping times.

  Args:
    count: maximum number of positions per response, at least 1.
    samples: K, branches per position, at least 1.
    positions: a rule of `positions`.
  """
  check_branches('tree', count, samples, positions)

  def apply(rewards: Array, rollouts: Rollouts) -> Array:
    if rewards.shape == rollouts.mask.shape:
      rewards = jnp.where(rollouts.mask, rewards, 0.0)
      rewards = rewards.sum(axis=2, keepdims=True)
    return _advantages(rewards, rollouts)

  needs = Needs(
    samples=2,
    branches=Branches(count, samples, positions, trained=True),
    entropy=positions.reads_entropy,
  )
  return AdvantageTransform(
    apply, needs, gives='token advantage', centres=True, takes_reward=True
  )


class _Rows(NamedTuple):
  """Valid whole responses and valid branches, bool, [P, R, 1]."""

  whole: Array
  branches: Array


def whole_responses(rollouts: Rollouts) -> Array:
  """Marks the rows that are not branches, valid or not, [P, R, 1] bool."""
  rows = jnp.arange(rollouts.mask.shape[1])[None, :, None]
  return rollouts.parents == rows


def fork_shares(rollouts: Rollouts) -> Array:
  """Returns Π 1/(valid continuations) over forks up to a token, [P, R, T]."""
  rows = _rows(rollouts)
  count = _at_forks(rollouts, rows.branches.astype(rollouts.log_probs.dtype))
  shares = jnp.cumprod(1.0 / (1.0 + count), axis=2)
  return jnp.where(rows.whole, shares, _of_fork(rollouts, shares))


def _advantages(rewards: Array, rollouts: Rollouts) -> Array:
  rows = _rows(rollouts)
  valid = rows.whole | rows.branches
  # Equal rewards become exact zeros, whose means are exact.
  highest = jnp.where(valid, rewards, -jnp.inf).max(axis=1, keepdims=True)
  zero = jnp.where(valid.any(axis=1, keepdims=True), highest, 0.0)
  rewards = jnp.where(valid, rewards - zero, 0.0)
  count = _at_forks(rollouts, rows.branches.astype(rewards.dtype))
  total = _at_forks(rollouts, jnp.where(rows.branches, rewards, 0.0))
  root, onward = _continue(rewards, count, total)
  # Baselines of whole responses: other continuations from the last fork.
  responses = rows.whole.sum(axis=1, keepdims=True)
  others = jnp.where(rows.whole, root, 0.0).sum(axis=1, keepdims=True) - root
  others = jnp.where(
    responses > 1, others / jnp.maximum(responses - 1, 1), -zero
  )
  time = jnp.broadcast_to(jnp.arange(onward.shape[2]), onward.shape)
  last = jax.lax.cummax(jnp.where(count > 0, time, 0), axis=2)
  mean = total / jnp.maximum(count, 1)
  mean = jnp.take_along_axis(mean, last, axis=2)
  baseline = jnp.where(jnp.cumsum(count, axis=2) > 0, mean, others)
  # Baselines of branches.
  rest = _of_fork(rollouts, total + onward) - rewards
  rest = rest / jnp.maximum(_of_fork(rollouts, count), 1)
  advantages = jnp.where(rows.whole, onward - baseline, rewards - rest)
  added = jnp.arange(onward.shape[2])[None, None] >= rollouts.forked_at
  return jnp.where(valid & added & rollouts.mask, advantages, 0.0)


def _rows(rollouts: Rollouts) -> _Rows:
  valid = valid_responses(rollouts)
  whole = whole_responses(rollouts)
  return _Rows(valid & whole, valid & ~whole & (rollouts.forked_at > 0))


def _at_forks(rollouts: Rollouts, x: Array) -> Array:
  """Sums x, [P, R, 1], at the forks of parents, [P, R, T]."""

  def of_prompt(parents, forked_at, x):
    sums = jnp.zeros(rollouts.mask.shape[1:], x.dtype)
    return sums.at[parents, forked_at].add(x)

  columns = (rollouts.parents, rollouts.forked_at, x)
  return jax.vmap(of_prompt)(*(column[..., 0] for column in columns))


def _of_fork(rollouts: Rollouts, x: Array) -> Array:
  """Selects x, [P, R, T], where each row forked from its parent."""
  of_parent = jnp.take_along_axis(x, rollouts.parents, axis=1)
  return jnp.take_along_axis(of_parent, rollouts.forked_at, axis=2)


def _continue(rewards, count, total) -> tuple[Array, Array]:
  """Computes values of whole responses from the end to the beginning.

  Returns:
    [P, R, 1] at the prompt, and [P, R, T] of the response from token t on,
    without the branches of a fork there.
  """

  def step(value, x):
    count, total = x
    return (total + value) / (count + 1), value

  by_time = lambda x: jnp.moveaxis(x, 2, 0)
  root, onward = jax.lax.scan(
    step, rewards[..., 0], (by_time(count), by_time(total)), reverse=True
  )
  return root[..., None], jnp.moveaxis(onward, 0, 2)
