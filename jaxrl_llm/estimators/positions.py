"""Rules for the positions at which Monte Carlo branches fork from a response.

A rule reads a response one token at a time, from left to right, and decides
after each token whether a branch forks there.  It cannot look ahead, so its
positions are stopping times, and with `hold` the gradient stays exact.  Random
positions depend on a key alone.

Positions that depend on the end of the response (a random one in 1 … T−1, T/2,
the highest entropies of the finished response) bias the gradient by 29–40 %
in a toy, and cannot be written as a rule.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.types import AdvantageTransform, Array


class Positions(NamedTuple):
  """A rule for positions.

  Attributes:
    init: (key, count, max_length) → state before the first token.  `count` is
      the maximum number of positions, `max_length` the token budget.
    step: (state, t, token, entropy) → (state, fork).  `token` is the t-th of
      the response, counted from 1; `entropy`, in nats, is that of the
      distribution of the token after it.  `fork` is True to branch here.
    reads_entropy: whether `step` uses the entropy, which costs a pass.
    states: (count, max_length) → all states that `init` may draw, equally
      likely, for exact enumeration on short responses.
  """

  init: Callable[[Array, int, int], Any]
  step: Callable[[Any, Array, Array, Array], tuple[Any, Array]]
  states: Callable[[int, int], list[Any]] = lambda count, max_length: [()]
  reads_entropy: bool = False


class Branches(NamedTuple):
  """Monte Carlo branches: fresh continuations from inside a response.

  Attributes:
    count: maximum number of positions per response; later ones are ignored, so
      that the tail is one last segment.
    samples: K, continuations per position.
    positions: the rule.
    score_weighted: whether `branch_baselines` are needed.
    shaping: transform of the branches' rewards, as of the responses': all that
      comes before the values in `chain`; None for nothing.
    trained: whether the branches become further rows of the rollouts to train
      on, instead of values.
  """

  count: int
  samples: int
  positions: Positions
  score_weighted: bool = False
  shaping: AdvantageTransform | None = None
  trained: bool = False


def check_branches(
  name: str, count: int, samples: int, positions: Positions
) -> None:
  """Raises ValueError for branches that cannot be drawn."""
  if count < 1 or samples < 1:
    raise ValueError(f'{name}: {count=} and {samples=} have to be ≥ 1')
  if not isinstance(positions, Positions):
    raise ValueError(f'{name}: {positions=} is not a rule such as uniform()')
  # Refuses a count that does not suit the rule here, not in training.
  jax.eval_shape(lambda: positions.init(jax.random.key(0), count, 2))


def fixed(*positions: int) -> Positions:
  """Forks after the given numbers of tokens, each at least 1."""
  if not positions or min(positions) < 1:
    raise ValueError(f'positions are numbers of tokens ≥ 1, not {positions}')

  def step(state, t, token, entropy):
    return state, jnp.isin(t, jnp.array(positions))

  return Positions(lambda key, count, max_length: (), step)


def uniform() -> Positions:
  """Forks at `count` distinct random positions in 1 … max_length − 1.

  They are drawn before the response, so some may lie past its end.
  """

  def init(key, count, max_length):
    drawn = jax.random.permutation(key, max_length - 1)[:count] + 1
    return jnp.isin(jnp.arange(max_length + 1), drawn)

  def step(state, t, token, entropy):
    return state, state[t]

  def states(count, max_length):
    places = range(1, max_length)
    chosen = itertools.combinations(places, min(count, len(places)))
    index = jnp.arange(max_length + 1)
    return [jnp.isin(index, jnp.array(c, int)) for c in chosen]

  return Positions(init, step, states)


def delimiter(*token_ids: int) -> Positions:
  """Forks right after each of these tokens: VinePPO's reasoning steps."""
  if not token_ids or not all(isinstance(i, int) for i in token_ids):
    raise ValueError(f'delimiter() takes token ids, not {token_ids}')

  def step(state, t, token, entropy):
    return state, jnp.isin(token, jnp.array(token_ids))

  return Positions(lambda key, count, max_length: (), step)


def entropy_above(threshold: float) -> Positions:
  """Forks where the next token's entropy exceeds `threshold`, nats."""

  def step(state, t, token, entropy):
    return state, entropy > threshold

  return Positions(lambda key, count, max_length: (), step, reads_entropy=True)


def entropy_sum(nats: float) -> Positions:
  """Forks each time the next tokens' entropies have added up to `nats`.

  There are few forks where the policy is certain and many where it is not.  The
  sum is of expected surprise, not that of the sampled tokens.
  """
  if not nats > 0:
    raise ValueError(f'entropy_sum: {nats=} has to be above 0')

  def step(state, t, token, entropy):
    total = (state + entropy).astype(state.dtype)
    fork = total >= nats
    return jnp.where(fork, 0.0, total), fork

  return Positions(
    lambda key, count, max_length: jnp.float32(0.0),
    step,
    lambda count, max_length: [jnp.float32(0.0)],
    reads_entropy=True,
  )


def pairs(positions: Positions) -> Positions:
  """Forks at each position and the next, bracketing the token between them.

  `interpolate_advantages` needs this.  The count is of positions: twice that of
  the tokens, and so even.
  """

  def half(count):
    if count % 2:
      raise ValueError(f'pairs() needs an even count of positions, not {count}')
    return count // 2

  def init(key, count, max_length):
    return positions.init(key, half(count), max_length), jnp.bool_(False)

  def step(state, t, token, entropy):
    inner, before = state
    inner, fork = positions.step(inner, t, token, entropy)
    return (inner, fork), fork | before

  def states(count, max_length):
    inner = positions.states(half(count), max_length)
    return [(state, jnp.bool_(False)) for state in inner]

  return Positions(init, step, states, positions.reads_entropy)


def mark(
  branches: Branches, state: Any, tokens: Array, mask: Array, entropy: Array
) -> Array:
  """Runs a rule over one response, left to right.

  Args:
    branches: the rule and its cap.
    state: from `positions.init` or one of `positions.states`.
    tokens, mask, entropy: [T] of one response.

  Returns:
    [T] bool: True at t where branches fork before token t, inside the
    response.  Never at 0, the prompt, whose branches are the other responses.
  """

  def step(carry, x):
    state, left = carry
    *seen, inside = x
    state, fork = branches.positions.step(state, *seen)
    # Whether the policy writes the next token is known by now.
    fork &= (left > 0) & inside
    return (state, left - fork), fork

  xs = (jnp.arange(1, tokens.size), tokens[:-1], entropy[1:], mask[1:])
  carry = (state, jnp.int32(branches.count))
  _, forks = jax.lax.scan(step, carry, xs)
  return jnp.concatenate([jnp.zeros(1, bool), forks])
