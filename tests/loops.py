"""Rollouts as plain Python lists, for formulas written as nested loops."""

import functools
import math
import types

import jax
import numpy as np
import pytest
from toys import CLIP, RECIPES, random_rollouts, rows_for, with_tree_rows


def groups_of(rollouts, outputs):
  """The valid responses of each prompt: numbers, and lists over tokens."""
  torch = pytest.importorskip('torch')
  leaf = lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True)
  if rollouts.parents is None:
    rollouts = with_tree_rows(rollouts, samples=rollouts.mask.shape[1])
  groups = []
  for p, g in np.ndindex(rollouts.mask.shape[:2]):
    if g == 0:
      groups.append([])
    if not rollouts.valid[p, g, 0]:
      continue
    length = int(rollouts.mask[p, g].sum())
    weights = rollouts.node_weights
    numbers = lambda x, p=p, g=g, n=length: [float(v) for v in x[p, g, :n]]
    forks = [t for t in range(1, length) if rollouts.branch_mask[p, g, t]]
    at_forks = lambda x, p=p, g=g, at=forks: {t: float(x[p, g, t]) for t in at}
    groups[-1].append(
      types.SimpleNamespace(
        place=g,
        reward=float(rollouts.rewards[p, g, 0]),
        greedy=float(rollouts.greedy_rewards[p, 0, 0]),
        length=length,
        new=[leaf(x) for x in numbers(outputs.log_probs)],
        old=numbers(rollouts.log_probs),
        ref=numbers(rollouts.ref_log_probs),
        entropy=numbers(rollouts.entropy),
        norms=numbers(rollouts.score_norms),
        values=numbers(rollouts.values),
        new_values=[leaf(x) for x in numbers(outputs.values)],
        forks=at_forks(rollouts.branch_values),
        weighted_forks=at_forks(rollouts.branch_baselines),
        parent=int(rollouts.parents[p, g, 0]),
        forked_at=int(rollouts.forked_at[p, g, 0]),
        weights=None if weights is None else numbers(weights),
      )
    )
  return groups


def assert_is_formula(got, formula, rollouts, outputs, trained='log_probs'):
  """Loss and gradients of `evaluate` against those of a formula."""
  loss, gradient = got
  groups = groups_of(rollouts, outputs)
  running = {name: float(v) for name, v in rollouts.running.items()}
  expected = formula(groups, running)
  expected.backward()
  slopes = {'log_probs': 'new', 'values': 'new_values'}
  assert loss.dtype == np.float64
  assert abs(float(expected.detach())) > 1e-3
  np.testing.assert_allclose(loss, expected.detach(), rtol=1e-10, atol=1e-12)
  for name, leaves in slopes.items():
    slope = np.zeros(rollouts.mask.shape)
    for p, group in enumerate(groups):
      for i in group:
        for t, x in enumerate(getattr(i, leaves)):
          slope[p, i.place, t] = 0.0 if x.grad is None else float(x.grad)
    np.testing.assert_allclose(
      getattr(gradient, name), slope, rtol=1e-10, atol=1e-12
    )
    if name == trained:
      assert np.abs(slope).max() > 1e-3
  np.testing.assert_array_equal(gradient.entropy, 0.0)


# For programs that run once: op by op takes four times as long.
quick_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def differentiate(estimator, rollouts, outputs):
  """(loss, its gradient in the outputs)."""
  batch = estimator.prepare(rows_for(estimator, rollouts))
  return jax.value_and_grad(estimator.loss)(outputs, batch)


def evaluate(estimator, rollouts, outputs):
  """(loss, its gradient in the outputs), jitted."""
  run = quick_jit(functools.partial(differentiate, estimator))
  return run(rollouts, outputs)


def prepare(estimator, rollouts):
  return quick_jit(estimator.prepare)(rows_for(estimator, rollouts))


def apply(transform, rollouts):
  """What a transform makes of the rewards."""
  return np.asarray(quick_jit(transform.apply)(rollouts.rewards, rollouts))


def make_program(estimators):
  """All of `estimators` in one jit: it is compilation that takes time."""
  return quick_jit(
    lambda rollouts, outputs: {
      name: differentiate(estimator, rollouts, outputs)
      for name, estimator in estimators.items()
    }
  )


@functools.cache
def make_data(seed, length=5):
  """0: ragged. 1: ragged, two invalid. 2: full, two groups of equal rewards."""
  rollouts, outputs = random_rollouts(
    seed, 4, length=length, invalid=seed == 1, full=seed == 2
  )
  if seed != 1:
    rollouts = rollouts.replace(valid=np.ones(rollouts.rewards.shape, bool))
  if seed == 2:
    rewards = rollouts.rewards.copy()
    # Binary fractions: their mean is exact, so loops find a deviation of 0.
    rewards[1], rewards[2] = 0.25, 0.75
    rollouts = rollouts.replace(rewards=rewards)
  return with_tree_rows(rollouts), outputs


def check_formulas(formulas, length=5):
  """Makes a test that each recipe is its formula, {name: formula}."""
  program = make_program({name: RECIPES[name] for name in formulas})

  @functools.cache
  def evaluate_all(seed):
    return jax.device_get(program(*make_data(seed, length)))

  @pytest.mark.parametrize('seed', [0, 1, 2])
  @pytest.mark.parametrize('name', formulas)
  def test(name, seed):
    trained = 'values' if name == 'reward_model' else 'log_probs'
    got, data = evaluate_all(seed)[name], make_data(seed, length)
    assert_is_formula(got, formulas[name], *data, trained)

  return test


def tokens(groups):
  """(group, response, t) of every token."""
  for group in groups:
    for i in group:
      for t in range(i.length):
        yield group, i, t


def num_responses(groups):
  return sum(len(group) for group in groups)


def num_tokens(groups):
  return sum(i.length for group in groups for i in group)


def mean(numbers):
  return sum(numbers) / len(numbers)


def siblings(i, group):
  return [j for j in group if j is not i]


def token_ratio(i, t):
  return (i.new[t] - i.old[t]).exp()


def clip(x, low, high):
  return min(max(x, low), high)


def surrogate(ratio, advantage, low, high):
  """min(ρ A, clip(ρ, 1 − low, 1 + high) A)."""
  return min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def earned(i, beta):
  """The response's reward less β times its log-ratio to the reference."""
  logs = zip(i.old, i.ref, strict=True)
  return i.reward - beta * sum(old - ref for old, ref in logs)


def k3(i, t):
  return (i.ref[t] - i.new[t]).exp() - 1 - (i.ref[t] - i.new[t])


def whitened(numbers, epsilon=1e-8):
  """Over the batch: mean 0 and, but for ε, variance 1."""
  centre = mean(numbers)
  variance = mean([(x - centre) ** 2 for x in numbers])
  return [(x - centre) / math.sqrt(variance + epsilon) for x in numbers]


def forks_of(i, group):
  """{where: the branches that fork there}."""
  own = [b for b in group if b.forked_at and b.parent == i.place]
  return {
    t: [b for b in own if b.forked_at == t] for t in {b.forked_at for b in own}
  }


def tree_value(i, group, after, reward):
  """Of what continues response `i` from its fork `after` on."""
  forks = forks_of(i, group)
  later = [t for t in forks if t > after]
  if not later:
    return reward(i)
  branches = [reward(b) for b in forks[min(later)]]
  return mean([tree_value(i, group, min(later), reward), *branches])


def tree_credit(i, t, group, reward):
  """(advantage, share) of a token that is the row's own."""
  whole = [j for j in group if not j.forked_at]
  parent = next(j for j in whole if j.place == i.parent)
  forks = forks_of(parent, group)
  behind = [p for p in forks if p <= (i.forked_at if i.forked_at else t)]
  share = math.prod(1 / (1 + len(forks[p])) for p in behind)
  if not behind:
    value = lambda j: tree_value(j, group, 0, reward)
    others = [value(j) for j in siblings(i, whole)]
    return value(i) - (mean(others) if others else 0.0), share
  last = max(behind)
  own = tree_value(parent, group, last, reward)
  if not i.forked_at:
    return own - mean([reward(b) for b in forks[last]]), share
  others = [reward(b) for b in siblings(i, forks[last])]
  return reward(i) - mean([own, *others]), share


def added(groups):
  """(group, row, t) of the tokens that rows with a valid parent have added."""
  for group in groups:
    places = {i.place for i in group}
    group = [i for i in group if i.parent in places]
    for i in group:
      for t in range(i.forked_at, i.length):
        yield group, i, t


def num_whole(groups):
  return sum(i.parent == i.place for group in groups for i in group)


def tree_surrogate(beta):
  """The clipped loss of the tree estimator, the KL part of the reward."""

  def formula(groups, running):
    total = 0.0
    for group, i, t in added(groups):
      a, share = tree_credit(i, t, group, lambda j: earned(j, beta))
      total += share * surrogate(token_ratio(i, t), a, CLIP, CLIP)
    return -total / num_whole(groups)

  return formula


def shared_tokens(i, j, group):
  """How many of the nodes of a tree two rows have in common."""

  def lineage(row):
    known, limit = {row.place: row.length}, row.length
    while row.parent != row.place:
      limit = min(limit, row.forked_at)
      row = next(other for other in group if other.place == row.parent)
      known[row.place] = limit
    return known

  first, second = lineage(i), lineage(j)
  return max(
    (min(first[x], second[x]) for x in first.keys() & second.keys()), default=0
  )


def weighted_nodes(beta, loss):
  """Each node's weight times the loss of its leaves' mean reward."""

  def formula(groups, running):
    total = 0.0
    for group, i, t in added(groups):
      below = [
        j.weights[-1] * earned(j, beta)
        for j in group
        if j.length and shared_tokens(i, j, group) > t
      ]
      total += i.weights[t] * loss(i, t, sum(below) / i.weights[t])
    return -total / num_whole(groups)

  return formula
