"""Recipes that value states against their papers' formulas, and identities."""

import functools

import jax
import numpy as np
import pytest
from loops import (
  check_formulas,
  clip,
  earned,
  k3,
  mean,
  num_responses,
  num_tokens,
  prepare,
  siblings,
  surrogate,
  token_ratio,
  tokens,
  tree_surrogate,
  weighted_nodes,
  whitened,
)
from toys import (
  ALPHA,
  CLIP,
  DUAL,
  HIGH,
  KL,
  LAM,
  VALUE,
  VALUE_CLIP,
  random_rollouts,
)

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')


def token_rewards(i, beta):
  """The response's reward on its last token, less the KL of every token."""
  rewards = [-beta * (i.old[t] - i.ref[t]) for t in range(i.length)]
  if rewards:
    rewards[-1] += i.reward
  return rewards


def generalised_advantage(i, t, lam, beta):
  """Σₗ λˡ δₜ₊ₗ,   δₜ = rₜ + Vₜ₊₁ − Vₜ: equation 16 of the paper at γ = 1."""
  rewards, values = token_rewards(i, beta), [*i.values, 0.0]
  deltas = [rewards[s] + values[s + 1] - values[s] for s in range(i.length)]
  return sum(lam ** (s - t) * deltas[s] for s in range(t, i.length))


def value_loss(i, t, target):
  near = clip(
    i.new_values[t], i.values[t] - VALUE_CLIP, i.values[t] + VALUE_CLIP
  )
  errors = (i.new_values[t] - target) ** 2, (near - target) ** 2
  return VALUE / 2 * max(errors)


def ppo(steered, dual):
  def formula(groups, running):
    beta = running['kl_coefficient'] if steered else 0.0
    every = [(i, t) for _, i, t in tokens(groups)]
    raw = [generalised_advantage(i, t, LAM, beta) for i, t in every]
    total = 0.0
    for (i, t), own, a in zip(every, raw, whitened(raw), strict=True):
      gain = surrogate(token_ratio(i, t), a, CLIP, CLIP)
      if dual and a < 0:
        gain = max(gain, dual * a)
      total += value_loss(i, t, own + i.values[t]) - gain
    return total / len(every)

  return formula


def vapo(groups, running):
  every = [(i, t) for _, i, t in tokens(groups)]
  raw = []
  for i, t in every:
    lam = max(0.0, 1 - 1 / (ALPHA * i.length))
    raw.append(generalised_advantage(i, t, lam, 0.0))
  total = 0.0
  for (i, t), a in zip(every, whitened(raw), strict=True):
    gain = surrogate(token_ratio(i, t), a, CLIP, HIGH)
    total += value_loss(i, t, i.reward) - gain
  return total / len(every)


def score_weighted_mean(others):
  weights = [sum(j.norms) for j in others]
  products = [w * j.reward for w, j in zip(weights, others, strict=True)]
  return sum(products) / sum(weights)


def segments(i, group, weighted=False):
  """(a, b, V_b − V_a) of the stretches between neighbouring forks."""
  others = siblings(i, group)
  baseline = {0: mean([j.reward for j in others])} | i.forks
  if weighted:
    baseline = {0: score_weighted_mean(others)} | i.weighted_forks
  value = i.forks | {i.length: i.reward}
  ends = sorted(baseline | value)
  ends = [t for t in ends if t <= i.length]
  return [
    (a, b, value[b] - baseline[a])
    for a, b in zip(ends[:-1], ends[1:], strict=True)
  ]


def held(i, t, group, weighted=False):
  for a, b, gain in segments(i, group, weighted):
    if a <= t < b:
      return gain


def values_interpolated(i, t, group):
  """The rise in one token of a line from V_a to V_b."""
  for a, b, gain in segments(i, group):
    if a <= t < b:
      return gain / (b - a)


def advantages_interpolated(i, t, group):
  """A line between the tokens whose advantage is exactly known."""
  exact = {a: gain for a, b, gain in segments(i, group) if b == a + 1}
  if not exact:
    return held(i, t, group)
  before = max((s for s in exact if s <= t), default=min(exact))
  after = min((s for s in exact if s >= t), default=max(exact))
  if after <= before:
    return exact[before if t >= before else after]
  share = (t - before) / (after - before)
  return exact[before] + share * (exact[after] - exact[before])


def trepo(advantage):
  def formula(groups, running):
    total = 0.0
    for group, i, t in tokens(groups):
      a = advantage(i, t, group)
      total += surrogate(token_ratio(i, t), a, CLIP, CLIP)
    return -total / num_responses(groups)

  return formula


def return_to(i, t, end, beta):
  """What tokens t … end − 1 earn, and the value of the fork at `end`."""
  rewards = token_rewards(i, beta)[t:end]
  return sum(rewards) + (0.0 if end == i.length else i.forks[end])


def next_fork(i, t):
  return min((p for p in i.forks if p > t), default=i.length)


def held_with(beta):
  """From the last baseline before a token to the next value."""

  def advantage(i, t, group):
    baselines = {0: mean([earned(j, beta) for j in siblings(i, group)])}
    baselines |= i.forks
    a = max(p for p in baselines if p <= t)
    return return_to(i, a, next_fork(i, a), beta) - baselines[a]

  return advantage


def trepo_critic(groups, running):
  total = 0.0
  for _, i, t in tokens(groups):
    to_go = return_to(i, t, next_fork(i, t), KL)
    ratio = token_ratio(i, t)
    total -= surrogate(ratio, to_go - i.values[t], CLIP, CLIP)
    total += value_loss(i, t, i.forks.get(t, to_go))
  return total / num_responses(groups)


def vine_ppo(groups, running):
  every = list(tokens(groups))
  advantages = whitened([held(i, t, group) for group, i, t in every])
  total = 0.0
  for (_, i, t), a in zip(every, advantages, strict=True):
    gain = surrogate(token_ratio(i, t), a, CLIP, CLIP)
    total += gain - KL * k3(i, t)
  return -total / num_tokens(groups)


FORMULAS = {
  'ppo': ppo(steered=False, dual=None),
  'ppo with KL and dual clip': ppo(steered=True, dual=DUAL),
  'vapo': vapo,
  'vine_ppo': vine_ppo,
  'trepo': trepo(held),
  'trepo, values interpolated': trepo(values_interpolated),
  'trepo, advantages interpolated': trepo(advantages_interpolated),
  'trepo, score-weighted': trepo(functools.partial(held, weighted=True)),
  'trepo with KL': trepo(held_with(KL)),
  'trepo_critic': trepo_critic,
  'trepo_tree': tree_surrogate(0.0),
  'trepo_tree with KL': tree_surrogate(KL),
  'trepo_weighted': weighted_nodes(0.0, lambda i, t, a: a * i.new[t]),
  'trepo_weighted, clipped, with KL': weighted_nodes(
    KL, lambda i, t, a: surrogate(token_ratio(i, t), a, CLIP, CLIP)
  ),
}
test_recipe_is_its_formula = check_formulas(FORMULAS, length=9)


def advantages(transform, rollouts):
  transform = est.chain(est.at_last_token(), transform)
  estimator = est.estimator(transform, est.score_function(), est.sequence_sum())
  return np.asarray(prepare(estimator, rollouts).advantages)


def in_group(rollouts, function):
  """[P, G, T]: a number per response, of the rewards and its place."""
  out = np.zeros(rollouts.mask.shape)
  for p, g in np.ndindex(out.shape[:2]):
    out[p, g] = function(rollouts.rewards[p, :, 0], g)
  return out


others_mean = lambda rewards, g: np.delete(rewards, g).mean()


@pytest.mark.parametrize('fill', [est.hold, est.interpolate_values])
def test_a_branch_at_every_token_is_a_critic_with_lambda_zero(fill):
  """TRePO = GAE(λ = 0) on the Monte Carlo values."""
  rollouts, _ = random_rollouts(0, length=7, invalid=False)
  values = np.random.default_rng(0).normal(size=rollouts.mask.shape)
  root = in_group(rollouts, others_mean)
  rollouts = rollouts.replace(
    branch_values=values,
    branch_mask=np.ones(values.shape, bool),
    values=np.where(np.arange(7) == 0, root, values),
  )
  branches = est.branches(7, 4, est.positions.uniform())
  got = advantages(est.gae(1.0, 0.0, branches, fill), rollouts)
  expected = advantages(est.gae(1.0, 0.0, est.critic()), rollouts)
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
  assert np.abs(np.diff(got, axis=2)).max() > 0.1


def test_a_response_without_valid_siblings_has_no_part_in_its_baseline():
  """Its first value is 0, not its own reward."""
  four = np.zeros((1, 2, 4))
  rollouts = est.Rollouts(
    tokens=four.astype(np.int32),
    mask=np.ones((1, 2, 4), bool),
    log_probs=four,
    rewards=np.array([[[5.0], [9.0]]]),
    valid=np.array([[[True], [False]]]),
    branch_values=four + 2.0,
    branch_mask=np.broadcast_to(np.arange(4) == 2, (1, 2, 4)),
  )
  batch = est.trepo(1, 4).prepare(rollouts)
  np.testing.assert_array_equal(
    batch.advantages[0], [[2.0, 2.0, 3.0, 3.0], [0.0] * 4]
  )


def test_interpolated_advantages_bracket_their_tokens():
  """Without the bracket no token is known exactly, and all would be held."""
  rule = est.trepo(2, 4, fill=est.interpolate_advantages).needs.branches
  state = rule.positions.init(jax.random.key(0), rule.count, 9)
  mask = np.ones(9, bool)
  forks = est.positions.mark(
    rule, state, np.zeros(9, np.int32), mask, np.zeros(9)
  )
  first, second = np.flatnonzero(forks)
  assert second == first + 1
