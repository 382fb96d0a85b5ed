"""The weighted prefix tree: every prefix generated once, credited exactly.

Rows are the responses of a tree: its leaves.  A row's own tokens are those from
`forked_at` on; the tokens before are its parent's.  The R rows of a prompt are
those of its trees in turn, each with R / trees.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.thresholds import Threshold, Trees, check_threshold
from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Needs,
  Rollouts,
  Running,
  merge_needs,
)


class TreeBaseline(NamedTuple):
  """A baseline of the states of trees.

  Attributes:
    apply: (rewards [P, R, 1], rollouts) → [P, R, T], of the state before each
      token.  It may read the state's prefix and what is independent of its
      tree; nothing that the tree drew at this token or later, in any of its
      branches: one uniform number draws all tokens of a depth.
    needs: inputs it requires.
    trees: number of trees per prompt.
  """

  apply: Callable[[Array, Rollouts], Array]
  needs: Needs = Needs()
  trees: int = 1


def weighted_tree(
  rule: Threshold, baseline: TreeBaseline | None = None
) -> AdvantageTransform:
  """Credits a token with the mean reward of the leaves below it.

    Aₜ = Q̂(s,a) − b(s),   Q̂(s,a) = Σ_{leaves below (s,a)} w R / w(s,a)

  A node's weight w(s,a) is a factor of its token's weight, not of its
  advantage, so that clipping and KL see the advantage at its own scale.

  Level: [P, R, 1] or [P, R, T] → token, [P, R, T], 0 where a row is its
  parent's.  What flows is summed over each row, prefix and all.
  Bias: none: given the tree so far, the expected weight of a kept (s,a) is
  w(s) π(a|s).

  Args:
    rule: which children are kept.
    baseline: b; `no_baseline()` if None.
  """
  check_threshold(rule)
  baseline = baseline or no_baseline()

  def apply(rewards: Array, rollouts: Rollouts) -> Array:
    if rewards.shape == rollouts.mask.shape:
      rewards = jnp.where(rollouts.mask, rewards, 0.0)
      rewards = rewards.sum(axis=2, keepdims=True)
    values = _values(rewards, rollouts, baseline.trees)
    advantages = values - baseline.apply(rewards, rollouts)
    own = jnp.arange(values.shape[2])[None, None] >= rollouts.forked_at
    return jnp.where(rollouts.mask & own, advantages, 0.0)

  needs = Needs(tree=Trees(rule, baseline.trees), entropy=rule.reads_entropy)
  return AdvantageTransform(
    apply,
    merge_needs(needs, baseline.needs),
    gives='token advantage',
    centres=True,
    takes_reward=True,
  )


def no_baseline() -> TreeBaseline:
  """No baseline: b = 0.

  With rewards in {0, 1} no advantage is then below 0, so that clipping is
  one-sided: for one update per batch.
  """
  return TreeBaseline(
    lambda rewards, rollouts: jnp.zeros_like(rollouts.log_probs)
  )


def tree_critic() -> TreeBaseline:
  """A critic's value of the state."""
  return TreeBaseline(
    lambda rewards, rollouts: rollouts.values, Needs(critic=True)
  )


def other_tree(scale: float | Running = 1.0) -> TreeBaseline:
  """The value of the state in a second tree of the same prompt.

    b(s) = c · Σ_{leaves below s′} w R / w(s′)

  s′ is the longest prefix of s that the other tree kept.

  Args:
    scale: c, a constant or `tree_scale`.
  """
  running = (scale,) if isinstance(scale, Running) else ()

  def apply(rewards: Array, rollouts: Rollouts) -> Array:
    c = rollouts.running[scale.name] if running else scale
    return c * _other_values(rewards, rollouts)

  return TreeBaseline(apply, Needs(running=running), trees=2)


def tree_scale(initial: float = 0.5, decay: float = 0.9) -> Running:
  """The scale of `other_tree` that explained earlier batches best.

    c ← decay · c + (1 − decay) · Σ w Q̂ V / Σ w V²,   between 0 and 1

  V is the other tree's value of the state before each token.

  Args:
    initial: c of the first batch.
    decay: at least 0 and below 1.
  """
  if not 0 <= decay < 1:
    raise ValueError(f'{decay=} has to be at least 0 and below 1')

  def update(value: Array, rollouts: Rollouts) -> Array:
    others = _other_values(rollouts.rewards, rollouts)
    own = jnp.arange(others.shape[2])[None, None] >= rollouts.forked_at
    weights = jnp.where(own & rollouts.mask, rollouts.node_weights, 0.0)
    values = _values(rollouts.rewards, rollouts, 2)
    squares = (weights * jnp.square(others)).sum()
    found = (weights * values * others).sum() / jnp.maximum(squares, 1e-30)
    found = jnp.clip(found, 0.0, 1.0)
    return jnp.where(squares > 0, decay * value + (1 - decay) * found, value)

  return Running('tree_scale', initial, update)


def leaf_weights(rollouts: Rollouts) -> Array:
  """Returns the weight of each row's last token, [P, R, 1]; 0 for no row."""
  time = jnp.arange(1, rollouts.mask.shape[2] + 1)[None, None]
  last = jnp.where(rollouts.mask, time, 0).max(axis=2, keepdims=True) - 1
  found = jnp.take_along_axis(
    rollouts.node_weights, jnp.maximum(last, 0), axis=2
  )
  return jnp.where(last >= 0, found, 0.0)


def score_all_leaves(rollouts: Rollouts, trees: int) -> Rollouts:
  """Gives leaves without a reward the mean of their tree's others.

  Nodes above them belong to other leaves, too, so they cannot be left out.  All
  rows of a tree are valid if any of its leaves has a reward.

  Args:
    rollouts: of P prompts' trees.
    trees: number of trees of a prompt.
  """
  prompts, rows, _ = rollouts.mask.shape
  shape = prompts, trees, rows // trees
  split = lambda x: x.reshape(shape)
  present = split(rollouts.mask.any(axis=2))
  scored = split(rollouts.valid) & present
  weights = jnp.where(scored, split(leaf_weights(rollouts)), 0.0)
  rewards = jnp.where(scored, split(rollouts.rewards), 0.0)
  total = weights.sum(axis=2, keepdims=True)
  mean = (weights * rewards).sum(axis=2, keepdims=True)
  mean = mean / jnp.where(total > 0, total, 1.0)
  rewards = jnp.where(scored, rewards, mean)
  valid = present & scored.any(axis=2, keepdims=True)
  shape = rollouts.rewards.shape
  return rollouts.replace(
    rewards=rewards.reshape(shape), valid=valid.reshape(shape)
  )


def _values(rewards: Array, rollouts: Rollouts, trees: int) -> Array:
  """Returns Q̂ of the state after each token, [P, R, T]."""
  common = _common_tokens(rollouts, trees)
  sums = _below(leaf_weights(rollouts) * rewards, common, rollouts)
  weights = jnp.where(rollouts.mask, rollouts.node_weights, 1.0)
  return sums[..., 1:] / weights


def _common_tokens(rollouts: Rollouts, trees: int) -> Array:
  """Returns the number of nodes that two rows share, [P, R, R] int32."""
  prompts, rows, length = rollouts.mask.shape
  columns = rollouts.parents, rollouts.forked_at
  parents, forked_at = (jnp.asarray(x[..., 0], jnp.int32) for x in columns)
  number = jnp.arange(rows)[None]
  whole = parents == number
  # Parents before their children.
  order = jnp.argsort(jnp.where(whole, -1, forked_at), axis=1, stable=True)
  tree = jnp.broadcast_to(number // (rows // trees), parents.shape)
  pick = lambda x, r: jnp.take_along_axis(x, r, axis=1)

  def add_row(i, known):
    """Earlier rows share with it what they share with its parent."""
    common, done = known
    r = jax.lax.dynamic_slice_in_dim(order, i, 1, axis=1)
    of_parent = pick(common, pick(parents, r)[..., None])[:, 0]
    shared = jnp.minimum(of_parent, pick(forked_at, r))
    shared = jnp.where(done & (tree == pick(tree, r)), shared, 0)
    here = number == r
    shared = jnp.where(here, length, shared)
    common = jnp.where(here[:, :, None], shared[:, None], common)
    common = jnp.where(here[:, None], shared[:, :, None], common)
    return common, done | here

  nothing = jnp.zeros((prompts, rows, rows), jnp.int32)
  start = nothing, jnp.zeros((prompts, rows), bool)
  return jax.lax.fori_loop(0, rows, add_row, start)[0]


def _below(x: Array, common: Array, rollouts: Rollouts) -> Array:
  """Sums x, [P, R, 1], over the rows that share t tokens, [P, R, T + 1]."""
  length = rollouts.mask.shape[2]

  def of_row(common, x):
    sums = jnp.zeros(length + 1, x.dtype).at[common].add(x)
    return jnp.cumsum(sums[::-1])[::-1]

  of_prompt = jax.vmap(of_row, (0, None))
  return jax.vmap(of_prompt)(common, x[..., 0])


def _other_values(rewards: Array, rollouts: Rollouts) -> Array:
  """Returns the other tree's values of the states before tokens, [P, R, T]."""
  prompts, rows, length = rollouts.mask.shape
  halves = lambda x: x.reshape(prompts, 2, rows // 2, *x.shape[2:])
  tokens = jnp.where(rollouts.mask, rollouts.tokens, -1)
  tokens, weighted = halves(tokens), halves(leaf_weights(rollouts) * rewards)
  weights = halves(rollouts.node_weights)
  present = halves(rollouts.mask.any(axis=2))

  def of_tree(tokens, others, present, weighted, weights):
    """Returns those of one tree's rows, [R/2, T], from another's."""
    equal = (tokens[:, None] == others[None]) & (tokens[:, None] >= 0)
    common = jnp.cumprod(equal, axis=2).sum(axis=2)
    common = jnp.where(present[None], common, -1)
    sums = jax.vmap(
      lambda common: (
        jnp.zeros(length + 1, weighted.dtype)
        .at[common]
        .add(jnp.where(common >= 0, weighted[:, 0], 0.0), mode='drop')
      )
    )(jnp.where(common >= 0, common, length + 1))
    sums = jnp.cumsum(sums[:, ::-1], axis=1)[:, ::-1]
    nearest = jnp.argmax(common, axis=1)
    longest = jnp.max(common, axis=1)
    at = jnp.minimum(jnp.arange(length)[None], longest[:, None])
    at = jnp.maximum(at, 0)
    # Weights of the states after 0, 1, … tokens; the root's is 1.
    of_states = jnp.pad(weights, ((0, 0), (1, 0)), constant_values=1.0)
    value = jnp.take_along_axis(sums, at, axis=1)
    weight = jnp.take_along_axis(of_states[nearest], at, axis=1)
    return value / weight

  flip = lambda x: x[:, ::-1]
  values = jax.vmap(jax.vmap(of_tree))(
    tokens, flip(tokens), flip(present), flip(weighted), flip(weights)
  )
  return values.reshape(prompts, rows, length)
