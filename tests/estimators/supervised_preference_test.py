"""Likelihood and preference recipes against their papers' formulas."""

import pytest
from loops import check_formulas, num_tokens, tokens
from toys import BETA, FLOOR, THRESHOLD

pytestmark = pytest.mark.usefixtures('float64')


def sft(groups, running):
  return -sum(i.new[t] for _, i, t in tokens(groups)) / num_tokens(groups)


def rest_em(groups, running):
  good = [i for group in groups for i in group if i.reward > THRESHOLD]
  return -sum(i.new[t] for i in good for t in range(i.length)) / len(good)


def preferences(groups):
  """(preferred, other) of the pairs that teach something."""
  for group in groups:
    by_place = {i.place: i for i in group if i.length}
    for first in by_place:
      pair = first, first + 1
      if first % 2 == 0 and first + 1 in by_place:
        one, two = (by_place[place] for place in pair)
        if one.reward != two.reward:
          yield (one, two) if one.reward > two.reward else (two, one)


def implicit_reward(i):
  return sum(i.new[t] - i.ref[t] for t in range(i.length))


def logistic(floor):
  def formula(groups, running):
    losses = []
    for better, worse in preferences(groups):
      margin = implicit_reward(better) - implicit_reward(worse)
      lost = sum(better.ref) - sum(better.new)
      margin = margin - floor * max(0.0 * lost, lost)
      losses.append((1 + (-BETA * margin).exp()).log())
    return sum(losses) / len(losses)

  return formula


def ipo(groups, running):
  losses = []
  for better, worse in preferences(groups):
    margin = implicit_reward(better) - implicit_reward(worse)
    losses.append((margin - 1 / (2 * BETA)) ** 2)
  return sum(losses) / len(losses)


def reward_model(groups, running):
  losses = []
  for better, worse in preferences(groups):
    margin = better.new_values[-1] - worse.new_values[-1]
    losses.append((1 + (-margin).exp()).log())
  return sum(losses) / len(losses)


FORMULAS = {
  'sft': sft,
  'rest_em': rest_em,
  'dpo': logistic(0.0),
  'dpop': logistic(FLOOR),
  'ipo': ipo,
  'reward_model': reward_model,
}
test_recipe_is_its_formula = check_formulas(FORMULAS)
