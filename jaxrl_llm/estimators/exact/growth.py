"""All weighted prefix trees that a rule may grow, with their probabilities."""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.estimators.exact.languages import Toy
from jaxrl_llm.estimators.thresholds import (
  Standing,
  Threshold,
  Trees,
  expected,
  thresholds,
)


class Leaves(NamedTuple):
  """The rows of trees, [..., M] or, for node weights, [..., M, T].

  Attributes:
    response: the response that a row is; 0 for no row.
    present: whether there is a row.
    parents, forked_at, node_weights: as in `Rollouts`; parents are numbers of
      rows of the same tree.
    weight: probability, in a list of trees.
  """

  response: np.ndarray
  present: np.ndarray
  parents: np.ndarray
  forked_at: np.ndarray
  node_weights: np.ndarray
  weight: np.ndarray | None = None

  @property
  def nodes(self) -> np.ndarray:
    """Number of nodes of each tree, [...]: the tokens that it costs."""
    time = np.arange(self.node_weights.shape[-1])
    own = time >= self.forked_at[..., None]
    return (own & (self.node_weights > 0)).sum(axis=(-2, -1))


class _Row(NamedTuple):
  tokens: tuple[int, ...]
  weights: tuple[float, ...]
  parent: int
  forked_at: int


def list_trees(
  toy: Toy, logits: np.ndarray, wanted: Trees, limit: int
) -> list[Leaves]:
  """Lists the trees of every prompt.

  Args:
    toy: the language.
    logits: [P, S, V] of the policy that samples.
    wanted: the rule.
    limit: largest number of trees of a prompt.

  Raises:
    ValueError: there are more.
  """
  p = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))
  lists = []
  for prompt in range(len(p)):
    grown = _grow(toy, p[prompt], wanted.rule)
    grown = list(itertools.islice(grown, limit + 1))
    if len(grown) > limit:
      raise ValueError(
        f'the rule grows more than {limit} trees: use a smaller toy, or a '
        'larger limit'
      )
    lists.append(_as_leaves(toy, grown, wanted.rule.at_most))
  return lists


def _grow(toy, p, rule) -> Iterator[tuple[float, list[_Row]]]:
  """Yields (probability, rows) of all trees of one prompt."""
  states = {prefix: i for i, prefix in enumerate(toy.prefixes)}
  words = p.shape[1] - 1
  length = toy.mask.shape[1]

  def is_live(row):
    return len(row.tokens) < length and row.tokens[-1:] != (words,)

  def onward(chance, rows, depth):
    live = [r for r, row in enumerate(rows) if is_live(row)]
    if not live:
      yield chance, rows
      return
    weights = [(rows[r].weights or (1.0,))[-1] for r in live]
    chances = p[[states[rows[r].tokens] for r in live]]
    room = rule.at_most - (len(rows) - len(live))
    for share, children in _draws(
      rule, depth, np.array(weights), chances, room
    ):
      grown, kept = list(rows), set()
      for place, token, weight in children:
        r = live[place]
        row, known = rows[r], r in kept
        kept.add(r)
        child = _Row(
          (*row.tokens, token),
          (*row.weights, weight),
          r if known else row.parent,
          depth if known else row.forked_at,
        )
        if known:
          grown.append(child)
        else:
          grown[r] = child
      yield from onward(chance * share, grown, depth + 1)

  return onward(1.0, [_Row((), (), 0, 0)], 0)


@functools.lru_cache(maxsize=64)
def _rule(rule: Threshold):
  """Jits thresholds and expected numbers of one tree's states."""

  @jax.jit
  def run(depth, weights, p, room):
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-300)), 0.0).sum(1)
    standing = Standing(depth, weights, entropy)
    tree = jnp.zeros(len(weights), jnp.int32)
    threshold = thresholds(rule, standing, p, tree, room[None])
    return threshold, *expected(weights, p, threshold)

  return run


def _draws(rule, depth, weights, p, room):
  """Yields (probability, [(place, token, weight)]) of one depth's draws."""
  threshold, _, small = map(
    np.asarray, _rule(rule)(depth, weights, p, np.int32(room))
  )
  children = weights[:, None] * p
  sure = children >= threshold[:, None]
  kept = [(i, a, children[i, a]) for i, a in np.argwhere(sure)]
  masses = np.where(sure, 0.0, children)
  totals = np.maximum(masses.sum(axis=1), 1e-300)
  masses = masses * (small / totals)[:, None]
  places = [(i, a) for i, a in np.argwhere(masses)]
  edges = np.cumsum([masses[place] for place in places])
  # Which children the points u, u + 1, … fall on changes at these u.
  cuts = np.unique(np.concatenate([[0.0, 1.0], np.round(edges % 1.0, 14)]))
  for low, high in itertools.pairwise(cuts):
    points = np.arange((low + high) / 2, edges[-1] if len(edges) else 0.0)
    chosen = [places[i] for i in np.searchsorted(edges, points, side='right')]
    drawn = [(i, a, threshold[i]) for i, a in chosen]
    yield high - low, kept + drawn


def _as_leaves(toy: Toy, grown, most: int) -> Leaves:
  numbers = {response: n for n, response in enumerate(toy.responses)}
  shape = len(grown), most
  leaves = Leaves(
    response=np.zeros(shape, int),
    present=np.zeros(shape, bool),
    parents=np.zeros(shape, int),
    forked_at=np.zeros(shape, int),
    node_weights=np.zeros((*shape, toy.mask.shape[1])),
    weight=np.array([chance for chance, _ in grown]),
  )
  for i, (_, rows) in enumerate(grown):
    for r, row in enumerate(rows):
      leaves.response[i, r] = numbers[row.tokens]
      leaves.present[i, r] = True
      leaves.parents[i, r], leaves.forked_at[i, r] = row.parent, row.forked_at
      leaves.node_weights[i, r, : len(row.weights)] = row.weights
  return leaves


def as_rows(leaves: Leaves) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Joins the trees of each prompt, [P, trees, M, …], into fields of rollouts.

  Returns:
    Numbers of responses, [P, R], and the other fields by name.
  """
  prompts, trees, most = leaves.response.shape
  join = lambda x: x.reshape(prompts, trees * most, *x.shape[3:])
  first = jnp.arange(trees)[None, :, None] * most
  parents = jnp.where(leaves.present, leaves.parents + first, first)
  fields = {
    'parents': join(parents)[..., None],
    'forked_at': join(leaves.forked_at)[..., None],
    'valid': join(leaves.present)[..., None],
    'node_weights': join(leaves.node_weights),
  }
  return join(leaves.response), fields
