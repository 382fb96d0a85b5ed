"""Thresholds by which children of a weighted prefix tree are kept.

A tree grows by one token at a time.  A state of weight w has children of
weight v = w · π(a|s).  A child with v ≥ τ is kept with its weight; of the
others systematic sampling, with one uniform number per tree and depth, keeps an
expected v/τ each, with weight τ.  So the expected weight of a kept child is v,
every prefix is generated once, and likely ones are generated surely.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.types import Array

# Halvings of the interval, on a scale of logarithms, that holds a raised τ.
_HALVINGS = 16
# Share of the room that rounding must not fill.
_SLACK = 1e-5


class Standing(NamedTuple):
  """Everything that stands before the tokens of a depth: a threshold reads it.

  Attributes:
    depth: int32 scalar, number of tokens before these.
    weights: [B] of the live states, above 0 and at most 1.
    entropy: [B] of their next tokens, nats; None unless the rule reads it.
  """

  depth: Array
  weights: Array
  entropy: Array | None


class Threshold(NamedTuple):
  """A rule for the children that are kept.

  Attributes:
    tau: τ, above 0 and at most 1: a number, or a function of `Standing` with
      an array [B], or one that broadcasts to it.  It sees neither the tokens
      that are about to be drawn nor rewards.
    at_most: M, the largest number of responses of a tree.  τ is raised, before
      the draw, where more children would be kept.
    reads_entropy: whether `tau` reads the entropy, which costs a pass.
  """

  tau: float | Callable[[Standing], Array]
  at_most: int
  reads_entropy: bool = False


class Trees(NamedTuple):
  """Weighted prefix trees in place of groups of responses.

  Attributes:
    rule: a `Threshold`.
    count: trees of a prompt, grown independently of each other.
  """

  rule: Threshold
  count: int = 1

  @property
  def rows(self) -> int:
    """Largest number of responses to a prompt."""
    return self.count * self.rule.at_most


def check_threshold(rule: Threshold) -> None:
  """Raises ValueError for a rule by which no tree can grow."""
  if rule.at_most < 1:
    raise ValueError(f'at_most={rule.at_most} has to be at least 1')
  if not callable(rule.tau) and not 0 < rule.tau <= 1:
    raise ValueError(f'tau={rule.tau} has to be above 0 and at most 1')


def falling(start: float, end: float, tokens: int) -> Callable:
  """Returns a τ that falls from `start` to `end` within `tokens`, by a factor.

  Responses then share their beginnings and fork late.
  """
  if not 0 < end <= start <= 1 or tokens < 1:
    raise ValueError(f'{start=}, {end=} and {tokens=}: 0 < end ≤ start ≤ 1')
  rate = (end / start) ** (1 / tokens)
  return lambda standing: jnp.maximum(end, start * rate**standing.depth)


def thresholds(
  rule: Threshold,
  standing: Standing,
  probabilities: Array,
  tree: Array,
  room: Array,
) -> Array:
  """Returns the threshold of each live state's children, [B].

    min(w(s), max(τ(s), τₜ)),   Σ of a tree's expected children ≤ its room

  τₜ is the least, up to a factor of 1.0002, with which a tree's children fit.
  No threshold exceeds the state's own weight: so at least one child is kept,
  no state ends without a response, and the children always fit.

  Args:
    rule: the rule.
    standing: of the live states.
    probabilities: [B, V] of their next tokens.
    tree: [B] int32, the tree of each state, of Q; Q for none.
    room: [Q] int32, the most children of each tree, at least its live states.
  """
  weights = standing.weights
  tau = rule.tau(standing) if callable(rule.tau) else rule.tau
  tau = jnp.broadcast_to(tau, weights.shape).astype(weights.dtype)

  def raised(least: Array) -> Array:
    of_states = least.at[tree].get(mode='fill', fill_value=0.0)
    return jnp.minimum(weights, jnp.maximum(tau, of_states))

  def too_many(least: Array) -> Array:
    exact, small = expected(weights, probabilities, raised(least))
    count = jnp.zeros(room.shape, weights.dtype)
    count = count.at[tree].add(exact + small, mode='drop')
    return count > room * (1 - _SLACK)

  free = jnp.zeros(room.shape, weights.dtype)
  # Where it was not too low, 0 stays; where it was, 1 is high enough.
  over = too_many(free)
  low = jnp.log(jnp.full(room.shape, tau.min(), weights.dtype))

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    over = too_many(jnp.exp(middle))
    return jnp.where(over, middle, low), jnp.where(over, high, middle)

  search = lambda: jax.lax.fori_loop(
    0, _HALVINGS, halve, (low, jnp.zeros_like(low))
  )[1]
  high = jax.lax.cond(over.any(), search, lambda: jnp.zeros_like(low))
  return raised(jnp.where(over, jnp.exp(high), free))


def expected(
  weights: Array, probabilities: Array, threshold: Array
) -> tuple[Array, Array]:
  """Counts the children that are kept exactly and, on average, by chance.

  Args:
    weights, threshold: [B] of states.
    probabilities: [B, V] of their next tokens.

  Returns:
    Two arrays [B], of the dtype of the weights; their sum is at least 1.
  """
  children = weights[:, None] * probabilities
  sure = children >= threshold[:, None]
  small = jnp.where(sure, 0.0, children).sum(axis=1) / threshold
  exact = sure.sum(axis=1)
  # Rounding must neither lose a state nor exceed the room.
  alone = (exact == 0) & (threshold >= weights)
  small = jnp.where(alone, 1.0, small)
  small = jnp.where(exact == 0, jnp.maximum(small, 1.0), small)
  return exact.astype(weights.dtype), small
