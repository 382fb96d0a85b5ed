"""What estimators get from branches: values of states, or rows to train on."""

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
from jaxrl_llm.rollouts.branches import Forks, mark_rows

Array = jax.Array


def row_needs(needs: Needs) -> Needs:
  """What the branches' own rollouts have to hold."""
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
  rollouts: Rollouts, rows: Rollouts, forks: Forks, wanted: Branches
) -> Rollouts:
  """The responses' rollouts with the values of the states that have branches.

  The value of a state is the mean return of its branches from there on.  A
  branch without a score (None) is left out; a state none of whose branches has
  one is not known.

  Args:
    rollouts: of the responses, [P, G, T].
    rows: of the branches, [P, R, T], with `row_needs`.
    forks: of `branch`.
    wanted: as given to `branch`.
  """
  num_prompts, groups, length = rollouts.mask.shape
  shape = (num_prompts, groups, -1, wanted.samples)
  of_place = functools.partial(_of_place, forks.owners)
  returns = branch_returns(wanted.shaping, rows.rewards, rows, forks.forked_at)
  returns = of_place(returns.reshape(shape))
  valid = of_place(valid_responses(rows).reshape(shape))
  known = valid.any(axis=-1) & (forks.places > 0)
  time = jnp.arange(length)[None, None, None]
  here = (forks.places[..., None] == time) & known[..., None]

  def at_places(weights):
    weights = jnp.where(valid, weights, 0.0)
    mean = (weights * returns).sum(axis=-1) / jnp.where(
      known, weights.sum(axis=-1), 1.0
    )
    return jnp.where(here, mean[..., None], 0.0).sum(axis=2)

  found = {
    'branch_values': at_places(jnp.ones(returns.shape)),
    'branch_mask': here.any(axis=2),
  }
  if wanted.score_weighted:
    weights = _segment_norms(rows, forks, wanted, shape, of_place)
    total = jnp.where(valid, weights, 0.0).sum(axis=-1, keepdims=True)
    # Nothing was random: all branches count alike.
    weights = jnp.where(total > 0, weights, 1.0)
    found['branch_baselines'] = at_places(weights)
  return rollouts.replace(**found)


def _of_place(owners: Array, x: Array) -> Array:
  """[P, G, M, K, ...] of the owners' places → of all places."""
  flat = x.reshape(x.shape[0], -1, *x.shape[3:])
  index = owners.reshape(*flat.shape[:2], *(1,) * (flat.ndim - 2))
  return jnp.take_along_axis(flat, index, axis=1).reshape(x.shape)


def _segment_norms(rows, forks, wanted, shape, of_place) -> Array:
  """[P, G, M, K]: branches' squared scores up to the response's next fork.

  The next fork is where the rule, in the state that it has for the response,
  forks from the branch.
  """
  length = rows.mask.shape[2]
  take = lambda x: of_place(x.reshape(*shape, length))
  tokens, mask, norms = map(take, (rows.tokens, rows.mask, rows.score_norms))
  entropy = None if rows.entropy is None else take(rows.entropy)
  time = jnp.arange(length)[None, None, None, None]
  start = forks.places[..., None, None]
  next_forks = mark_rows(wanted, tokens, mask, entropy, forks.key)
  begun = time >= start
  ended = jnp.cumsum(next_forks & (time > start), axis=-1) > 0
  return jnp.where(begun & ~ended & mask, norms, 0.0).sum(axis=-1)


@jax.jit
def add_rows(rollouts: Rollouts, rows: Rollouts, forks: Forks) -> Rollouts:
  """The responses' rollouts, [P, G, T], with the branches as further rows.

  Args:
    rollouts: of the responses.
    rows: of the branches, [P, R, T], with `row_needs`.
    forks: of `branch`.
  """
  num_prompts, groups, _ = rollouts.mask.shape
  per_row = {
    name: jnp.concatenate([value, rows[name]], axis=1)
    for name, value in rollouts.items()
    if value is not None and name not in ('greedy_rewards', 'running')
  }
  own = jnp.arange(groups, dtype=jnp.int32)[None, :, None]
  own = jnp.broadcast_to(own, (num_prompts, groups, 1))
  return rollouts.replace(
    **per_row,
    parents=jnp.concatenate([own, forks.parents], axis=1),
    forked_at=jnp.concatenate([jnp.zeros_like(own), forks.forked_at], axis=1),
  )
