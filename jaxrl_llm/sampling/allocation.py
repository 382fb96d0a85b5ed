"""Choice of the children of a prefix tree's nodes.

`Independent` draws ordinary responses, `Systematic` the weighted trees of
`estimators.thresholds`.  Neither calls a model: both see the distributions of
live nodes and choose the rows of the next depth.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.thresholds import (
  Standing,
  Trees,
  expected,
  thresholds,
)
from jaxrl_llm.sampling.policy import Blocks, first_above

Array = jax.Array

# Systematic sampling counts in whole numbers of 1/_UNIT children, so that
# rounding neither loses a node nor adds one.
_UNIT = 1 << 20


class Nodes(NamedTuple):
  """The distributions after the tokens of B slots.

  Attributes:
    log_probs: [B, V] float32, nats; −inf for what is never drawn.
    weights: [B, V], in proportion to the probabilities; they add up to `total`.
    total: [B].
  """

  log_probs: Array
  weights: Array
  total: Array

  @classmethod
  def of(cls, logits: Array) -> 'Nodes':
    """Normalises adjusted logits, as `draw_token` does."""
    highest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    total = Blocks.of(weights).sums.sum(axis=-1)
    normalizer = highest + jnp.log(total)[:, None]
    return cls(logits - normalizer, weights, total)

  @property
  def probabilities(self) -> Array:
    return self.weights / self.total[:, None]


class Rows(NamedTuple):
  """The rows of Q trees, M each: responses that are begun or will be.

  Attributes:
    node: [Q, M] int32, the row whose slot holds a row's node; M if the row has
      ended or not begun.
    weight: [Q, M] float32, of that node.
    parents, forked_at: [Q, M] int32, numbers of rows of the same tree.
    finished: [Q, M] bool, ended with EOS.
    used: [Q] int32, number of rows that have begun.
  """

  node: Array
  weight: Array
  parents: Array
  forked_at: Array
  finished: Array
  used: Array


class Children(NamedTuple):
  """The rows of the next depth, [Q, M].

  Attributes:
    exists: bool, whether a row has a token there.
    source: int32, the row whose node it is a child of; 0 if there is none.
    token: int32.
    weight: float32, of the child.
    owns: bool, whether it needs a slot: the first row of each node.
    leader: int32, the first row of its node.
  """

  exists: Array
  source: Array
  token: Array
  weight: Array
  owns: Array
  leader: Array


def _plant(trees: int, rows: int, used: int) -> Rows:
  number = jnp.arange(rows, dtype=jnp.int32)
  spread = lambda x: jnp.broadcast_to(x, (trees, rows))
  nothing = jnp.zeros((trees, rows), jnp.int32)
  return Rows(
    node=spread(jnp.where(number < used, 0, rows)).astype(jnp.int32),
    weight=jnp.ones((trees, rows), jnp.float32),
    parents=nothing,
    forked_at=nothing,
    finished=jnp.zeros((trees, rows), bool),
    used=jnp.full(trees, used, jnp.int32),
  )


def _follow(rows: Rows, children: Children, ended: Array, used) -> Rows:
  goes_on = children.exists & ~ended
  most = rows.node.shape[1]
  return rows._replace(
    node=jnp.where(goes_on, children.leader, most),
    weight=jnp.where(children.exists, children.weight, rows.weight),
    used=used,
  )


class Independent(NamedTuple):
  """Ordinary responses: those of `sample`, common prefixes decoded once.

  Attributes:
    rows: G, responses per prompt.
  """

  rows: int

  @property
  def trees(self) -> int:
    """Trees of a prompt."""
    return 1

  def start(self, trees: int) -> Rows:
    """Returns the rows of Q trees before the first token."""
    return _plant(trees, self.rows, self.rows)

  def uniform(self, key: Array, numbers: Array, trees: int) -> Array:
    """Returns the random numbers of one depth, those of `sample`, [Q, G]."""
    uniform = jax.random.uniform(key, (trees * self.rows,))
    return uniform.reshape(trees, self.rows)[numbers]

  def choose(
    self, rows: Rows, nodes: Nodes, slot: Array, uniform: Array, depth: Array
  ) -> Children:
    """Draws the next token of every row from its node's distribution."""
    exists = rows.node < self.rows
    source = jnp.where(exists, rows.node, 0)
    at = jnp.take_along_axis(slot, source, axis=1).reshape(-1)
    target = uniform.reshape(-1) * nodes.total.at[at].get(mode='clip')
    token = Blocks.of(nodes.weights).invert(at, target)
    token = token.reshape(source.shape)
    mine = lambda x: x[:, :, None] == x[:, None]
    same = mine(source) & mine(token) & (exists[:, None] & exists[:, :, None])
    leader = jnp.argmax(same, axis=2).astype(jnp.int32)
    return Children(
      exists=exists,
      source=source,
      token=token,
      weight=jnp.full(source.shape, 1.0 / self.rows),
      owns=leader == jnp.arange(self.rows)[None],
      leader=leader,
    )

  def advance(
    self, rows: Rows, children: Children, ended: Array, depth: Array
  ) -> Rows:
    """Returns the rows after a depth."""
    leaves = children.exists & (children.leader != children.source)
    rows = rows._replace(
      parents=jnp.where(leaves, children.source, rows.parents),
      forked_at=jnp.where(leaves, depth, rows.forked_at),
    )
    return _follow(rows, children, ended, rows.used)


class Systematic(NamedTuple):
  """Weighted prefix trees.

  Attributes:
    wanted: the rule, and the number of trees of a prompt.
  """

  wanted: Trees

  @property
  def rows(self) -> int:
    """Largest number of responses of a tree."""
    return self.wanted.rule.at_most

  @property
  def trees(self) -> int:
    """Trees of a prompt."""
    return self.wanted.count

  def start(self, trees: int) -> Rows:
    """Returns the rows of Q trees before the first token."""
    return _plant(trees, self.rows, 1)

  def uniform(self, key: Array, numbers: Array, trees: int) -> Array:
    """Returns one random number per tree for one depth, [Q]."""
    return jax.random.uniform(key, (trees,))[numbers]

  def choose(
    self, rows: Rows, nodes: Nodes, slot: Array, uniform: Array, depth: Array
  ) -> Children:
    """Keeps the children of all nodes by the rule."""
    size, trees = nodes.total.size, len(slot)
    live = slot < size
    number = jnp.arange(trees, dtype=jnp.int32)[:, None]
    tree = jnp.full(size, trees, jnp.int32)
    tree = tree.at[slot].set(jnp.broadcast_to(number, slot.shape), mode='drop')
    weight = jnp.ones(size).at[slot].set(rows.weight, mode='drop')
    rule = self.wanted.rule
    entropy = None
    if rule.reads_entropy:
      possible = jnp.where(nodes.weights > 0, nodes.log_probs, 0.0)
      entropy = -(nodes.probabilities * possible).sum(axis=1)
    threshold = thresholds(
      rule,
      Standing(depth, weight, entropy),
      nodes.probabilities,
      tree,
      self.rows - rows.used + live.sum(axis=1, dtype=jnp.int32),
    )
    kept = _Kept.of(weight, nodes.probabilities, threshold)
    parent, token, weight, exists = _draw(kept, slot, uniform)
    return _place(rows, parent, token, weight, exists)

  def advance(
    self, rows: Rows, children: Children, ended: Array, depth: Array
  ) -> Rows:
    """Returns the rows after a depth."""
    begins = children.exists & (
      jnp.arange(self.rows)[None] >= rows.used[:, None]
    )
    rows = rows._replace(
      parents=jnp.where(begins, children.source, rows.parents),
      forked_at=jnp.where(begins, depth, rows.forked_at),
    )
    used = rows.used + begins.sum(axis=1, dtype=jnp.int32)
    return _follow(rows, children, ended, used)


Allocation = Independent | Systematic


class _Kept(NamedTuple):
  """The children of B slots: sure ones, and small ones to be sampled.

  Attributes:
    children: weights of all, in blocks.
    sure: [B, blocks] float32, number of sure children.
    small: [B, blocks] float32, weight of the others.
    threshold: [B].
    counts: [B] int32, sure children of a slot.
    masses: [B] int32, expected small children, in units of 1/_UNIT.
  """

  children: Blocks
  sure: Array
  small: Array
  threshold: Array
  counts: Array
  masses: Array

  @classmethod
  def of(cls, weight, probabilities, threshold) -> '_Kept':
    exact, small = expected(weight, probabilities, threshold)
    children = Blocks.of(weight[:, None] * probabilities)
    sure = children.weights >= threshold[:, None, None]
    return cls(
      children=children,
      sure=sure.sum(axis=2).astype(jnp.float32),
      small=jnp.where(sure, 0.0, children.weights).sum(axis=2),
      threshold=threshold,
      counts=exact.astype(jnp.int32),
      masses=jnp.floor(small * _UNIT).astype(jnp.int32),
    )


def _draw(kept: _Kept, slot: Array, uniform: Array):
  """Lists the children of each tree: sure ones, then those that are drawn.

  Returns:
    parent, token, weight and `exists`, [Q, M] each, in the order of the list.
  """
  most = slot.shape[1]
  rank = jnp.arange(most, dtype=jnp.int32)[None]
  of_rows = lambda x: x.at[slot].get(mode='fill', fill_value=0)
  counts, masses = of_rows(kept.counts), of_rows(kept.masses)
  counted, massed = jnp.cumsum(counts, axis=1), jnp.cumsum(masses, axis=1)
  is_sure = rank < counted[:, -1:]
  point = (uniform[:, None] * _UNIT).astype(jnp.int32)
  point = point + (rank - counted[:, -1:]) * _UNIT
  exists = is_sure | ((point >= 0) & (point < massed[:, -1:]))
  behind = lambda edges, x: (edges[:, None] <= x[..., None]).sum(axis=2)
  parent = jnp.where(is_sure, behind(counted, rank), behind(massed, point))
  parent = jnp.minimum(parent, most - 1).astype(jnp.int32)
  pick = lambda x: jnp.take_along_axis(x, parent, axis=1)
  at = pick(slot).reshape(-1)
  share = (point - pick(massed - masses)) / jnp.maximum(pick(masses), 1)
  small = kept.small.sum(axis=1).at[at].get(mode='clip').reshape(parent.shape)
  target = jnp.where(is_sure, rank - pick(counted - counts), share * small)
  target, sure = target.reshape(-1, 1), is_sure.reshape(-1, 1)
  take = lambda x: x.at[at].get(mode='clip')
  sums = jnp.where(sure, take(kept.sure), take(kept.small))
  block, below = first_above(sums, target)
  threshold = take(kept.threshold)[:, None]
  children = kept.children.block(at, block[:, 0])
  above = children >= threshold
  within = jnp.where(above, 0.0, children)
  within = jnp.where(sure, above.astype(jnp.float32), within)
  index, _ = first_above(within, target - below)
  weight = jnp.take_along_axis(children, index, axis=1)
  weight = jnp.where(sure, weight, threshold)
  token = kept.children.token(block, index)
  shaped = lambda x: x.reshape(parent.shape)
  return parent, shaped(token), shaped(weight), exists


def _place(rows: Rows, parent, token, weight, exists) -> Children:
  """Assigns listed children to rows.

  The first child of a node continues its row, the others begin new ones.
  """
  trees, most = parent.shape
  number = jnp.arange(most)
  same = (parent[:, :, None] == parent[:, None]) & exists[:, None]
  first = exists & (jnp.argmax(same, axis=2) == number[None])
  later = exists & ~first
  place = rows.used[:, None] + jnp.cumsum(later, axis=1) - 1
  place = jnp.where(first, parent, jnp.where(later, place, most))
  tree = jnp.arange(trees)[:, None]
  put = lambda x, kind: (
    jnp.zeros((trees, most), kind).at[tree, place].set(x, mode='drop')
  )
  return Children(
    exists=put(exists, bool),
    source=put(parent, jnp.int32),
    token=put(token, jnp.int32),
    weight=put(weight, jnp.float32),
    owns=put(exists, bool),
    leader=jnp.broadcast_to(number.astype(jnp.int32), (trees, most)),
  )
