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
  Running,
  valid_responses,
)


def tree(
  count: int, samples: int, positions: Positions, mix: float | Running = 1.0
) -> AdvantageTransform:
  """Compares every continuation with the others that fork from its state.

    V(leaf) = R,   V(fork) = mean of its continuations' V
    Aₜ = V(c) − λ · mean of the other continuations' V
         − (1 − λ) · mean of the other whole responses' V

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
    mix: λ after the first fork, a constant or `tree_mix`.
  """
  check_branches('tree', count, samples, positions)
  running = (mix,) if isinstance(mix, Running) else ()

  def apply(rewards: Array, rollouts: Rollouts) -> Array:
    if rewards.shape == rollouts.mask.shape:
      rewards = jnp.where(rollouts.mask, rewards, 0.0)
      rewards = rewards.sum(axis=2, keepdims=True)
    share = rollouts.running[mix.name] if running else mix
    return _advantages(rewards, rollouts, share)

  needs = Needs(
    samples=2,
    running=running,
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


def tree_mix(samples: int, initial: float = 0.8, decay: float = 0.9) -> Running:
  """The mix of `tree` that fits earlier batches.

    λ ← decay · λ + (1 − decay) · a / (a + c / (K − 1)),   between 0 and 1

  c is the variance of the continuations of a fork, a that of forks' values
  around the mean of the other whole responses.

  Args:
    samples: K.
    initial: λ of the first batch.
    decay: at least 0 and below 1.
  """
  if not 0 <= decay < 1:
    raise ValueError(f'{decay=} has to be at least 0 and below 1')

  def update(value: Array, rollouts: Rollouts) -> Array:
    rows = _rows(rollouts)
    rewards = jnp.where(rows.whole | rows.branches, rollouts.rewards, 0.0)
    ones = rows.branches.astype(rewards.dtype)
    count, total, squares = (
      _at_forks(rollouts, x * ones) for x in (ones, rewards, rewards**2)
    )
    mean = total / jnp.maximum(count, 1)
    some = rows.whole & (count > 1)
    noise = (squares - count * mean**2) / jnp.maximum(count - 1, 1)
    others = _others(_continue(rewards, count, total)[0], rows)
    spread = (mean - others) ** 2 - noise / jnp.maximum(count, 1)
    noise, spread = (jnp.where(some, x, 0.0).sum() for x in (noise, spread))
    spread = jnp.maximum(spread, 0.0)
    whole = spread + noise / max(samples - 1, 1)
    found = spread / jnp.where(whole > 0, whole, 1.0)
    return jnp.where(whole > 0, decay * value + (1 - decay) * found, value)

  return Running('tree_mix', initial, update)


def _others(root: Array, rows: _Rows) -> Array:
  """Returns the mean of the other whole responses' values, [P, R, 1]."""
  responses = rows.whole.sum(axis=1, keepdims=True)
  others = jnp.where(rows.whole, root, 0.0).sum(axis=1, keepdims=True) - root
  return others / jnp.maximum(responses - 1, 1)


def _advantages(rewards: Array, rollouts: Rollouts, mix: Array) -> Array:
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
  others = jnp.where(responses > 1, _others(root, rows), -zero)
  time = jnp.broadcast_to(jnp.arange(onward.shape[2]), onward.shape)
  last = jax.lax.cummax(jnp.where(count > 0, time, 0), axis=2)
  mean = total / jnp.maximum(count, 1)
  mean = jnp.take_along_axis(mean, last, axis=2)
  # A lone response has no others to mix with.
  mix = jnp.where(responses > 1, mix, 1.0)
  mean = mix * mean + (1 - mix) * others
  baseline = jnp.where(jnp.cumsum(count, axis=2) > 0, mean, others)
  # Baselines of branches.
  rest = _of_fork(rollouts, total + onward) - rewards
  rest = rest / jnp.maximum(_of_fork(rollouts, count), 1)
  of_parent = jnp.take_along_axis(others, rollouts.parents, axis=1)
  rest = mix * rest + (1 - mix) * of_parent
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
