"""Random outcomes of one estimate: groups, branches, random positions.

Lists all combinations, weighted by probability, or draws a sample of them.
Shapes are as in `languages`; G responses per prompt, K branches per fork, C
states of a rule for positions.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.estimators.exact.languages import Toy, through
from jaxrl_llm.estimators.positions import Branches, mark
from jaxrl_llm.estimators.types import Rollouts
from jaxrl_llm.estimators.values import branch_returns


class Slots(NamedTuple):
  """Outcomes of single responses or, with a leading [P, G], combinations."""

  response: np.ndarray
  forks: np.ndarray | None = None  # [..., T], as are the next two
  values: np.ndarray | None = None
  baselines: np.ndarray | None = None
  # For trained branches: the responses that they ended as and, in tokens, where
  # they fork; 0 for no branch.
  ends: np.ndarray | None = None  # [..., M, K]
  fork_positions: np.ndarray | None = None  # [..., M]
  weight: np.ndarray | None = None  # probability, in a list of outcomes


class Forest:
  """The branches that an estimator may encounter.

  Attributes:
    samples: K.
    trained: whether they are rows to train on, not values.
    most: M, maximum number of forks of a response.
    forks: [P, N, C, T] bool under each of the C states of the rule.
    weights: [P, N, C, T], squared score norms summed from here to the next
      fork of the same response, or to its end.
    returns: [P, N, T], return of a branch that forks before token t, if
      branches are values.
    states: [N, T], as in the toy.
    onward: [P, S, N], probability of each response given its prefix.
  """

  def __init__(self, toy, rows: Rollouts, p, branches: Branches):
    """Initialises from `rows`, all N responses to each prompt as rollouts."""
    self.samples, self.trained = branches.samples, branches.trained
    self.states, self.lengths = toy.states, toy.mask.sum(axis=1)
    if not self.trained:
      self.returns = _returns(branches, rows)
    passing = through(toy)
    self.onward = passing.T * p[:, None] / (p @ passing)[..., None]
    self.forks = _forks(toy, branches, np.asarray(rows.entropy))
    self.most = int(self.forks.sum(axis=3).max(initial=1))
    norms = np.asarray(rows.score_norms) * toy.mask
    self.weights = np.zeros(self.forks.shape)
    rest = 0.0
    for t in reversed(range(toy.mask.shape[1])):
      rest = norms[:, :, None, t] + rest
      self.weights[..., t] = rest
      rest = np.where(self.forks[..., t], 0.0, rest)

  def tokens(self, p) -> float:
    """Expected tokens of one response's branches, summed over prompts."""
    time = np.arange(self.states.shape[1])
    rest = (self.onward @ self.lengths)[:, self.states] - time
    each = (self.forks.mean(axis=2) * rest).sum(axis=2)
    return self.samples * (p * each).sum()

  def values(self, prompt, chosen, choice, t):
    """Returns mean and score-weighted mean of branches, [..., K] → [...] twice.

    Args:
      prompt, choice, t: indices of prompts, the rule's states and forks.
      chosen: [..., K], the responses that the branches ended as.
    """
    rewards = self.returns[prompt, chosen, t]
    weights = self.weights[prompt, chosen, choice, t]
    total = weights.sum(axis=-1)
    # Nothing was random: all branches count equally.
    weights = np.where((total > 0)[..., None], weights, 1.0)
    weighted = (weights * rewards).sum(axis=-1) / weights.sum(axis=-1)
    return rewards.mean(axis=-1), weighted

  def outcomes(self, prompt, choice, n, t, limit):
    """Returns {outcome: probability} of a fork's branches; None above `limit`.

    An outcome is the responses that they ended as, or (value, baseline).
    """
    p = self.onward[prompt, self.states[n, t]]
    ends, samples = np.flatnonzero(p), self.samples
    if math.comb(len(ends) + samples - 1, samples) > limit:
      return None
    probabilities = {}
    for chosen in itertools.combinations_with_replacement(ends, samples):
      orders = math.factorial(samples)
      for end in set(chosen):
        orders //= math.factorial(chosen.count(end))
      outcome = chosen
      if not self.trained:
        pair = self.values(prompt, np.array(chosen), choice, t)
        outcome = tuple(float(x) for x in pair)
      share = orders * p[list(chosen)].prod()
      probabilities[outcome] = probabilities.get(outcome, 0.0) + share
    return probabilities


def _returns(branches: Branches, rows: Rollouts) -> np.ndarray:
  """Computes `Forest.returns`, [P, N, T]."""
  after = lambda t: jnp.full(rows.rewards.shape, t)
  returns = [
    branch_returns(branches.shaping, rows.rewards, rows, after(t))
    for t in range(rows.mask.shape[2])
  ]
  return np.concatenate(returns, axis=2)


def _forks(toy: Toy, branches: Branches, entropy: np.ndarray) -> np.ndarray:
  """Runs the rule over every response, [P, N, C, T]."""
  rule, length = branches.positions, toy.mask.shape[1]
  states = rule.states(branches.count, length)
  drawn = jax.eval_shape(
    lambda: rule.init(jax.random.key(0), branches.count, length)
  )
  if jax.tree.structure(drawn) != jax.tree.structure(states[0]):
    raise ValueError(
      'these positions are random: give their `Positions` a function `states` '
      'that lists what `init` may draw'
    )
  run = _marker(branches)
  forks = [run(state, toy.tokens, toy.mask, entropy) for state in states]
  return np.stack([np.asarray(x) for x in forks], axis=2)


@functools.lru_cache(maxsize=256)
def _marker(branches: Branches):
  """Applies `mark` to all responses, [N, T], with each prompt's entropy."""
  run = functools.partial(mark, branches)
  of_prompt = jax.vmap(run, (None, 0, 0, 0))
  return jax.jit(jax.vmap(of_prompt, (None, None, None, 0)))


def list_slots(p, forest, samples, limit) -> list[Slots] | None:
  """Lists each prompt's outcomes of one response; None above `limit`."""
  if not forest:
    if p.shape[1] ** (len(p) * samples) > limit:
      return None
    every = np.arange(p.shape[1])
    return [Slots(response=every, weight=row) for row in p]
  lists = []
  most = int(limit ** (1 / samples) + 1e-9)
  for prompt in range(len(p)):
    outcomes = _list_forked(p, forest, prompt, most)
    if outcomes is None:
      return None
    lists.append(outcomes)
  total = math.prod(len(slots.weight) for slots in lists) ** samples
  return lists if total <= limit else None


def _list_forked(p, forest: Forest, prompt, limit) -> Slots | None:
  """Does the same as `list_slots` for one prompt, up to `limit` outcomes."""
  outcomes, rows = {}, []
  _, count, choices, _ = forest.forks.shape
  for n, choice in itertools.product(range(count), range(choices)):
    forks = forest.forks[prompt, n, choice]
    times = np.flatnonzero(forks)
    for t in times:
      key = forest.states[n, t], choice
      if key not in outcomes:
        outcomes[key] = forest.outcomes(prompt, choice, n, t, limit)
      if outcomes[key] is None:
        return None
    options = [outcomes[forest.states[n, t], choice].items() for t in times]
    if len(rows) + math.prod(len(x) for x in options) > limit:
      return None
    for picked in itertools.product(*options):
      results = [outcome for outcome, _ in picked]
      weight = math.prod((share for _, share in picked), start=p[prompt, n])
      rows.append(_slot(forest, n, forks, times, results, weight / choices))
  return jax.tree.map(lambda *x: np.stack(x), *rows)


def _slot(forest: Forest, n, forks, times, outcomes, weight) -> Slots:
  """Builds the slot of response `n` with these outcomes at its forks."""
  slot = Slots(np.int64(n), weight=np.float64(weight))
  if forest.trained:
    ends = np.zeros((forest.most, forest.samples), int)
    fork_positions = np.zeros(forest.most, int)
    for m, (t, chosen) in enumerate(zip(times, outcomes, strict=True)):
      ends[m], fork_positions[m] = chosen, t
    return slot._replace(ends=ends, fork_positions=fork_positions)
  values = np.zeros((2, len(forks)))
  for t, pair in zip(times, outcomes, strict=True):
    values[:, t] = pair
  return slot._replace(forks=forks, values=values[0], baselines=values[1])


def combine(lists, shape, size) -> Iterator[tuple[np.ndarray, Slots]]:
  """Yields all combinations of the slots' outcomes, `size` at a time."""
  prompts, samples = shape
  sizes = [len(slots.weight) for slots in lists for _ in range(samples)]
  total = math.prod(sizes)
  for start in range(0, total, size):
    index = np.arange(start, start + size)
    picked = np.array(np.unravel_index(index % total, sizes))
    picked = picked.reshape(prompts, samples, size)
    slots = [
      jax.tree.map(lambda x, i=i: x[i], slots)
      for slots, i in zip(lists, picked, strict=True)
    ]
    # [P, G, b, …] → [b, P, G, …]
    slots = jax.tree.map(lambda *x: np.moveaxis(np.stack(x), 2, 0), *slots)
    weights = slots.weight.prod(axis=(1, 2)) * (index < total)
    yield weights, slots._replace(weight=None)


def draw(
  p, forest, shape, draws, size, random
) -> Iterator[tuple[np.ndarray, Slots]]:
  """Yields `draws` random combinations, `size` at a time."""
  prompt = np.arange(len(p))[:, None]
  for start in range(0, draws, size):
    weights = (np.arange(start, start + size) < draws) / draws
    response = _choose(random, p, np.broadcast_to(prompt, (size, *shape)))
    if not forest:
      yield weights, Slots(response)
      continue
    choice = random.integers(forest.forks.shape[2], size=response.shape)
    forks = forest.forks[prompt, response, choice]
    ended = functools.partial(_draw_branches, p, forest, response, random)
    if forest.trained:
      time = np.arange(forks.shape[-1])
      fork_positions = np.sort(np.where(forks, time, len(time)))[
        ..., : forest.most
      ]
      fork_positions = np.where(fork_positions < len(time), fork_positions, 0)
      ends = [ended(fork_positions[..., m]) for m in range(forest.most)]
      ends = np.stack(ends, axis=-2)
      yield weights, Slots(response, ends=ends, fork_positions=fork_positions)
      continue
    values = np.zeros((2, *forks.shape))
    for t in range(forks.shape[-1]):
      values[..., t] = forest.values(
        prompt[..., None], ended(t), choice[..., None], t
      )
    yield weights, Slots(response, forks, *np.where(forks, values, 0.0))


def draw_listed(
  lists, shape, draws, size, random
) -> Iterator[tuple[np.ndarray, NamedTuple]]:
  """Yields `draws` random combinations of listed outcomes."""
  _, samples = shape
  for start in range(0, draws, size):
    weights = (np.arange(start, start + size) < draws) / draws
    slots = []
    for listed in lists:
      chances = listed.weight / listed.weight.sum()
      index = random.choice(len(chances), (size, samples), p=chances)
      slots.append(jax.tree.map(lambda x, i=index: x[i], listed))
    slots = jax.tree.map(lambda *x: np.stack(x, axis=1), *slots)
    yield weights, slots._replace(weight=None)


def _draw_branches(p, forest: Forest, response, random, time) -> np.ndarray:
  """Draws the responses that branches forking at `time` end as, [..., K]."""
  prompts, states, count = forest.onward.shape
  prompt = np.arange(prompts)[:, None]
  row = prompt * states + forest.states[response, time]
  row = np.repeat(row[..., None], forest.samples, axis=-1)
  return _choose(random, forest.onward.reshape(-1, count), row)


def _choose(random, p: np.ndarray, row: np.ndarray) -> np.ndarray:
  """Draws a column of p, [rows, N], for each row number, by probability."""
  edges = np.cumsum(p, axis=1)
  edges = (edges / edges[:, -1:] + np.arange(len(p))[:, None]).ravel()
  column = np.searchsorted(edges, row + random.random(row.shape), side='right')
  return np.clip(column - row * p.shape[1], 0, p.shape[1] - 1)
