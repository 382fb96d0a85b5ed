"""Each recipe with an advantage per response against its paper's formula.

The formulas are nested loops over prompts, responses and tokens, on plain
numbers; torch differentiates them.
"""

import math

import numpy as np
import pytest
from loops import (
  check_formulas,
  clip,
  k3,
  make_data,
  mean,
  num_responses,
  num_tokens,
  prepare,
  siblings,
  surrogate,
  token_ratio,
  tokens,
  whitened,
)
from toys import BUFFER, CLIP, ENTROPY, HIGH, KL, MAX_LENGTH, random_rollouts

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')


def likelihood(groups, advantage):
  """− 1/N Σᵢ Σₜ Aᵢ log πᵢₜ."""
  total = sum(advantage(i, group) * i.new[t] for group, i, t in tokens(groups))
  return -total / num_responses(groups)


def reinforce(groups, running):
  return likelihood(groups, lambda i, group: i.reward)


def reinforce_baseline(groups, running):
  return likelihood(groups, lambda i, group: i.reward - running['reward_mean'])


def remax(groups, running):
  return likelihood(groups, lambda i, group: i.reward - i.greedy)


def leave_one_out(reward):
  def advantage(i, group):
    others = siblings(i, group)
    return reward(i) - mean([reward(j) for j in others]) if others else 0.0

  return advantage


def rloo(groups, running):
  return likelihood(groups, leave_one_out(lambda i: i.reward))


def log_ratio(i, start=0):
  """Σ log π/π_ref from token `start` on."""
  return sum(i.old[t] - i.ref[t] for t in range(start, i.length))


def rloo_kl(beta):
  def formula(groups, running):
    charge = beta or running['kl_coefficient']
    reward = lambda i: i.reward - charge * log_ratio(i)
    return likelihood(groups, leave_one_out(reward))

  return formula


def reinforce_plus_plus(beta):
  def formula(groups, running):
    charge = beta or running['kl_coefficient']
    every = list(tokens(groups))
    to_go = [i.reward - charge * log_ratio(i, t) for _, i, t in every]
    total = 0.0
    for (_, i, t), advantage in zip(every, whitened(to_go), strict=True):
      total += surrogate(token_ratio(i, t), advantage, CLIP, CLIP)
    return -total / len(every)

  return formula


def centred(i, group):
  return i.reward - mean([j.reward for j in group])


def reinforce_plus_plus_baseline(groups, running):
  every = list(tokens(groups))
  advantages = whitened([centred(i, group) for group, i, _ in every])
  total = 0.0
  for (_, i, t), advantage in zip(every, advantages, strict=True):
    k2 = (i.new[t] - i.ref[t]) ** 2 / 2
    total += surrogate(token_ratio(i, t), advantage, CLIP, CLIP) - KL * k2
  return -total / len(every)


def standardized(i, group, reward=lambda i: i.reward):
  if len(group) < 2:
    return 0.0
  centre = mean([reward(j) for j in group])
  squares = sum((reward(j) - centre) ** 2 for j in group)
  deviation = math.sqrt(squares / (len(group) - 1))
  return (reward(i) - centre) / (deviation + 1e-6)


def grpo(beta):
  def formula(groups, running):
    total = 0.0
    for group, i, t in tokens(groups):
      advantage = standardized(i, group)
      gain = surrogate(token_ratio(i, t), advantage, CLIP, CLIP)
      total += (gain - beta * k3(i, t)) / i.length
    return -total / num_responses(groups)

  return formula


def dr_grpo(groups, running):
  total = 0.0
  for group, i, t in tokens(groups):
    total += surrogate(token_ratio(i, t), centred(i, group), CLIP, CLIP)
  return -total / (num_responses(groups) * MAX_LENGTH)


def dapo(groups, running):
  mixed = [g for g in groups if len({i.reward for i in g}) > 1]

  def reward(i):
    """Equation 13 of the paper: a ramp that ends at − 1."""
    if i.length <= MAX_LENGTH - BUFFER:
      return i.reward
    if i.length <= MAX_LENGTH:
      return i.reward + ((MAX_LENGTH - BUFFER) - i.length) / BUFFER
    return i.reward - 1

  total = 0.0
  for group, i, t in tokens(mixed):
    advantage = standardized(i, group, reward)
    total += surrogate(token_ratio(i, t), advantage, CLIP, HIGH)
  return -total / num_tokens(mixed)


def sequence_ratio(i):
  log_ratios = [i.new[t] - i.old[t] for t in range(i.length)]
  return (sum(log_ratios) / i.length).exp()


def gspo(groups, running):
  total = 0.0
  for group in groups:
    for i in group:
      # An empty response would add a constant, for which it has no token.
      if i.length:
        advantage = standardized(i, group)
        total += surrogate(sequence_ratio(i), advantage, CLIP, HIGH)
  return -total / num_responses(groups)


def gspo_token(groups, running):
  total = 0.0
  for group, i, t in tokens(groups):
    ratio = sequence_ratio(i).detach() * i.new[t].exp()
    ratio = ratio / i.new[t].detach().exp()
    gain = surrogate(ratio, standardized(i, group), CLIP, HIGH)
    total += gain / i.length
  return -total / num_responses(groups)


def cispo(groups, running):
  total = 0.0
  for group, i, t in tokens(groups):
    weight = clip(token_ratio(i, t).detach(), 1 - CLIP, 1 + HIGH)
    total += weight * standardized(i, group) * i.new[t]
  return -total / num_tokens(groups)


def weighted(members, weight):
  weights = [weight(j) for j in members]
  if not sum(weights):
    return mean([j.reward for j in members])
  products = [w * j.reward for w, j in zip(weights, members, strict=True)]
  return sum(products) / sum(weights)


def opo(groups, running):
  length = lambda i: i.length
  return likelihood(groups, lambda i, group: i.reward - weighted(group, length))


def weighted_leave_one_out(weight):
  def advantage(i, group):
    others = siblings(i, group)
    return i.reward - weighted(others, weight) if others else 0.0

  return lambda groups, running: likelihood(groups, advantage)


def rl_zvp(groups, running):
  total = 0.0
  for group, i, t in tokens(groups):
    advantage = standardized(i, group)
    if all(j.reward == i.reward for j in group):
      right = i.reward > 0.5
      missing = max(i.entropy) - i.entropy[t]
      advantage = ENTROPY * (i.entropy[t] if right else -missing)
    total += surrogate(token_ratio(i, t), advantage, CLIP, CLIP) / i.length
  return -total / num_responses(groups)


def trajectory_ratio(i):
  return sum(i.new[t] - i.old[t] for t in range(i.length)).exp()


def p3o(jointly):
  def formula(groups, running):
    total = 0.0
    for group in groups:
      by_place = {i.place: i for i in group}
      for first in range(0, 100, 2):
        if not {first, first + 1} <= by_place.keys():
          continue
        for this, that in ((first, first + 1), (first + 1, first)):
          i, j = by_place[this], by_place[that]
          if not i.length:
            continue
          ratio = trajectory_ratio(i)
          if jointly and j.length:
            ratio = ratio * trajectory_ratio(j).detach()
          total += surrogate(ratio, i.reward - j.reward, CLIP, CLIP)
    return -total / num_responses(groups)

  return formula


FORMULAS = {
  'reinforce': reinforce,
  'reinforce_baseline': reinforce_baseline,
  'remax': remax,
  'rloo': rloo,
  'rloo with KL': rloo_kl(KL),
  'rloo with adaptive KL': rloo_kl(None),
  'reinforce_plus_plus': reinforce_plus_plus(KL),
  'reinforce_plus_plus with adaptive KL': reinforce_plus_plus(None),
  'reinforce_plus_plus_baseline': reinforce_plus_plus_baseline,
  'grpo': grpo(KL),
  'grpo without KL': grpo(0.0),
  'dr_grpo': dr_grpo,
  'dapo': dapo,
  'gspo': gspo,
  'gspo by token': gspo_token,
  'cispo': cispo,
  'opo': opo,
  'opo_leave_one_out': weighted_leave_one_out(lambda i: i.length),
  'obl_reinforce': weighted_leave_one_out(lambda i: sum(i.norms)),
  'rl_zvp': rl_zvp,
  'p3o': p3o(jointly=False),
  'p3o by pair': p3o(jointly=True),
}
test_recipe_is_its_formula = check_formulas(FORMULAS)


def test_the_clips_bite_on_both_sides():
  for seed in range(3):
    rollouts, outputs = make_data(seed)
    kept = rollouts.mask & rollouts.valid
    ratio = np.exp((outputs.log_probs - rollouts.log_probs)[kept])
    for outside in (ratio < 1 - CLIP, ratio > 1 + HIGH):
      assert 3 < outside.sum() < ratio.size / 2


def advantages(estimator, rollouts):
  return np.asarray(prepare(estimator, rollouts).advantages)


@pytest.mark.parametrize('samples', [2, 5])
def test_dr_grpo_advantage_is_rloo_scaled(samples):
  rollouts, _ = random_rollouts(0, samples=samples, invalid=False)
  mean = advantages(est.dr_grpo(7), rollouts)
  others = advantages(est.rloo(), rollouts)
  np.testing.assert_allclose(mean, (samples - 1) / samples * others, rtol=1e-12)
