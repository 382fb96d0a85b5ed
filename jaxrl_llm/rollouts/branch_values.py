"""Turns branches into state values or training rows."""

import functools

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators import (
  Branches,
  Needs,
  Rollouts,
  branch_returns,
  valid_responses,
)
from jaxrl_llm.rollouts.branches import ForkPoints, mark_rows

Array = jax.Array


def row_needs(needs: Needs) -> Needs:
  """Returns the inputs that the branches' own rollouts must hold."""
  if needs.branches.trained:
    return needs._replace(greedy=False, branches=None)
  shaping, weighted = needs.branches.shaping, needs.branches.score_weighted
  wanted = Needs() if shaping is None else shaping.needs
  # The next fork of each branch bounds its weight.
  reads = weighted and needs.branches.positions.reads_entropy
  return wanted._replace(
    score_norms=wanted.score_norms or weighted,
    entropy=wanted.entropy or reads,
  )


@functools.partial(jax.jit, static_argnames='wanted')
def add_values(
  rollouts: Rollouts, rows: Rollouts, forks: ForkPoints, wanted: Branches
) -> Rollouts:
  """Adds to the responses' rollouts the values of the states with branches.

  The value of a state is the mean return of its branches from that state
  onward.  A branch without a score (None) is excluded; the value of a state is
  unknown if none of its branches has a score.

  Args:
    rollouts: rollouts of the responses, [P, G, T].
    rows: rollouts of the branches, [P, R, T], with `row_needs`.
    forks: fork points returned by `branch`.
    wanted: the same as for `branch`.
  """
  num_prompts, groups, length = rollouts.mask.shape
  shape = (num_prompts, groups, -1, wanted.samples)
  of_fork = functools.partial(_of_fork, forks.shared_with)
  returns = branch_returns(wanted.shaping, rows.rewards, rows, forks.forked_at)
  returns = of_fork(returns.reshape(shape))
  valid = of_fork(valid_responses(rows).reshape(shape))
  known = valid.any(axis=-1) & (forks.fork_positions > 0)
  time = jnp.arange(length)[None, None, None]
  here = (forks.fork_positions[..., None] == time) & known[..., None]

  def at_forks(weights):
    weights = jnp.where(valid, weights, 0.0)
    mean = (weights * returns).sum(axis=-1) / jnp.where(
      known, weights.sum(axis=-1), 1.0
    )
    return jnp.where(here, mean[..., None], 0.0).sum(axis=2)

  additions = {
    'branch_values': at_forks(jnp.ones(returns.shape)),
    'branch_mask': here.any(axis=2),
  }
  if wanted.score_weighted:
    weights = _segment_norms(rows, forks, wanted, shape, of_fork)
    total = jnp.where(valid, weights, 0.0).sum(axis=-1, keepdims=True)
    # If nothing was random, all branches count equally.
    weights = jnp.where(total > 0, weights, 1.0)
    additions['branch_baselines'] = at_forks(weights)
  return rollouts.replace(**additions)


def _of_fork(shared_with: Array, x: Array) -> Array:
  """Copies [P, G, M, K, ...] values to all forks that share them."""
  flat = x.reshape(x.shape[0], -1, *x.shape[3:])
  index = shared_with.reshape(*flat.shape[:2], *(1,) * (flat.ndim - 2))
  return jnp.take_along_axis(flat, index, axis=1).reshape(x.shape)


def _segment_norms(rows, forks, wanted, shape, of_fork) -> Array:
  """Sums the branches' squared scores up to the next fork, [P, G, M, K].

  The next fork is the first one that the rule places in the branch, using its
  state for the response.
  """
  length = rows.mask.shape[2]
  take = lambda x: of_fork(x.reshape(*shape, length))
  tokens, mask, norms = map(take, (rows.tokens, rows.mask, rows.score_norms))
  entropy = None if rows.entropy is None else take(rows.entropy)
  time = jnp.arange(length)[None, None, None, None]
  start = forks.fork_positions[..., None, None]
  next_forks = mark_rows(wanted, tokens, mask, entropy, forks.key)
  begun = time >= start
  ended = jnp.cumsum(next_forks & (time > start), axis=-1) > 0
  return jnp.where(begun & ~ended & mask, norms, 0.0).sum(axis=-1)


@jax.jit
def add_rows(rollouts: Rollouts, rows: Rollouts, forks: ForkPoints) -> Rollouts:
  """Appends the branches as rows to the responses' rollouts, [P, G, T].

  Args:
    rollouts: rollouts of the responses.
    rows: rollouts of the branches, [P, R, T], with `row_needs`.
    forks: fork points returned by `branch`.
  """
  num_prompts, groups, _ = rollouts.mask.shape
  per_row = {
    name: jnp.concatenate([value, rows[name]], axis=1)
    for name, value in rollouts.items()
    if value is not None and name not in ('greedy_rewards', 'running')
  }
  parents = jnp.arange(groups, dtype=jnp.int32)[None, :, None]
  parents = jnp.broadcast_to(parents, (num_prompts, groups, 1))
  zeros = jnp.zeros_like(parents)
  return rollouts.replace(
    **per_row,
    parents=jnp.concatenate([parents, forks.parents], axis=1),
    forked_at=jnp.concatenate([zeros, forks.forked_at], axis=1),
  )
