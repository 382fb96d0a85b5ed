"""Every `Bias:` line of the recipes and their parts, by exact enumeration.

A language of two words and EOS, at most three tokens long, has 15 responses;
every expectation is a finite sum.  What says "none" holds to 1e-10, what says
"scale" with that scale, and what says "tilts" is off direction by a margin.
"""

import numpy as np
import pytest
from listed import (
  BINARY,
  TOY,
  TWO,
  TWO_BINARY,
  assert_unbiased,
  close,
  compose,
  counts,
  examine,
  penalized,
  success,
)

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')

enumeration = est.enumeration
KL = 0.3
RANDOM = np.random.default_rng(5)
OLD = TOY.params + RANDOM.normal(0.0, 0.5, TOY.params.shape)
SAMPLER = TOY.params + RANDOM.normal(0.0, 0.5, TOY.params.shape)
OFF_POLICY = TOY._replace(old_params=OLD)
OTHER_SAMPLER = TOY._replace(sampler=SAMPLER)
RUNNING = {'reward_mean': 0.7}
HUGE = 1e9  # a clip that never clips


TOKEN_REWARDS = RANDOM.normal(size=TOY.params.shape)
WITH_TOKENS = TOY._replace(token_rewards=TOKEN_REWARDS)
BOTH = TOY.rewards + enumeration.discounted(TOY, TOKEN_REWARDS)
EXACT_CRITIC = TOY._replace(values=enumeration.exact_values(TOY))
MEAN, LOO = est.sequence_mean(), est.subtract_leave_one_out_mean()
WHOLE = est.sampler_trajectory_ratio
by_token = lambda *after: compose(est.at_every_token(), *after)
at_end = lambda *after: compose(est.at_last_token(), *after)
token_kl = lambda kl: at_end(est.subtract_token_kl(kl), est.reward_to_go())
actor = lambda lam: at_end(est.gae(1.0, lam, est.critic()))
centred = lambda **options: compose(LOO, **options)
unclipped = lambda ratio: est.clipped(HUGE, ratio=ratio)
corrected = lambda *args: centred(
  loss=est.correct_sampler(est.score_function(), *args)
)

# name: (estimator, toy, responses per prompt)
UNBIASED = {
  'reinforce': (est.reinforce(), TOY, 1),
  'reinforce, two prompts': (est.reinforce(), TWO, 1),
  'running baseline': (est.reinforce_baseline(), TOY, 2),
  'remax': (est.remax(), TOY, 1),
  'remax, two prompts': (est.remax(), TWO, 1),
  'rloo': (est.rloo(), TOY, 3),
  'rloo, two prompts': (est.rloo(), TWO, 2),
  'opo, leave one out': (est.opo_leave_one_out(), TOY, 3),
  'obl_reinforce': (est.obl_reinforce(), TOY, 3),
  'p3o': (est.p3o(), TOY, 2),
  'p3o, pairs': (est.p3o(ratio=est.pair_ratio), TOY, 2),
  'at every token': (by_token(), TOY, 1),
  'to go': (at_end(est.reward_to_go()), TOY, 1),
  'critic at γ = λ = 1': (actor(1.0), TOY, 1),
  'exact critic at λ = 0': (actor(0.0), EXACT_CRITIC, 1),
  'exact critic at λ = 0.6': (actor(0.6), EXACT_CRITIC, 1),
  'trajectory ratio': (
    centred(loss=unclipped(est.trajectory_ratio), weights=MEAN),
    *(OFF_POLICY, 2),
  ),
  'p3o off policy': (est.p3o(HUGE), OFF_POLICY, 2),
  'p3o off policy, pairs': (est.p3o(HUGE, est.pair_ratio), OFF_POLICY, 2),
  'sampler corrected': (corrected(lambda x: x, WHOLE), OTHER_SAMPLER, 2),
}


@pytest.mark.parametrize('name', UNBIASED)
def test_no_bias(name):
  options = {'running': RUNNING} if name == 'running baseline' else {}
  report = assert_unbiased(*UNBIASED[name], **options)
  assert report.bias < 1e-12 and report.cosine == pytest.approx(1.0, abs=1e-12)


OVERLONG = compose(est.penalize_overlong(3, 2), LOO)
REWARDED = at_end(est.add_token_rewards(), est.reward_to_go())
# name: (estimator, toy, responses per prompt, reward and KL that it climbs)
OTHER_REWARDS = {
  'rloo with KL': (est.rloo(kl=KL), TOY, 2, TOY, KL),
  'KL per token': (token_kl(KL), TOY, 1, TOY, KL),
  'KL steered': (token_kl(est.adaptive_kl(KL, 1.0, 100)), TOY, 1, TOY, KL),
  'overlong': (OVERLONG, TOY, 2, penalized(TOY, 3, 2), 0.0),
  'token rewards': (REWARDED, WITH_TOKENS, 1, TOY._replace(rewards=BOTH), 0.0),
}


@pytest.mark.parametrize('name', OTHER_REWARDS)
def test_no_bias_for_the_reward_as_shaped(name):
  estimator, toy, samples, climbed, kl = OTHER_REWARDS[name]
  exact = enumeration.exact_gradient(climbed, kl=kl)
  assert_unbiased(estimator, toy, samples, exact=exact)
  assert np.abs(exact - enumeration.exact_gradient(toy)).max() > 0.01


# name: (estimator, toy, responses per prompt, scale)
SCALED = {
  'dr_grpo': (est.dr_grpo(max_length=5), TOY, 3, 2 / 3 / 5),
  'dr_grpo, two prompts': (est.dr_grpo(max_length=5), TWO, 2, 1 / 2 / 5),
  'group mean': (compose(est.subtract_group_mean()), TOY, 2, 1 / 2),
  'constant length': (compose(weights=est.constant_length(5)), TOY, 1, 1 / 5),
}


@pytest.mark.parametrize('name', SCALED)
def test_scale_only(name):
  estimator, toy, samples, scale = SCALED[name]
  report = examine(estimator, toy, samples)
  close(report.gradient, scale * report.exact_gradient)
  assert report.scale == pytest.approx(scale, rel=1e-10)
  assert report.bias == pytest.approx(1 - scale, rel=1e-10)


GAMMA = at_end(est.reward_to_go(0.5))
SELF_WEIGHTED = compose(est.subtract_weighted_mean(est.score_norm()))
WHITENED_TOKENS = by_token(est.whiten())
# name: (estimator, toy, responses per prompt)
TILTED = {
  'grpo': (est.grpo(kl=0.0), TOY, 3),
  'grpo, binary': (est.grpo(kl=0.0), BINARY, 3),
  'dapo': (est.dapo(max_length=9, buffer=2), TOY, 3),
  'cispo': (est.cispo(), TOY, 3),
  'rl_zvp': (est.rl_zvp(), TOY, 3),
  'opo': (est.opo(), TOY, 2),
  'score-weighted with itself': (SELF_WEIGHTED, TOY, 2),
  'reinforce_plus_plus': (est.reinforce_plus_plus(kl=0.0), TOY, 2),
  'with baseline': (est.reinforce_plus_plus_baseline(kl=0.0), TOY, 3),
  'standardize': (compose(est.standardize()), TOY, 3),
  'whiten': (compose(est.whiten()), TOY, 3),
  'whiten, over tokens': (WHITENED_TOKENS, TOY, 2),
  'whiten, over tokens, binary': (WHITENED_TOKENS, BINARY, 2),
  'sequence mean': (compose(weights=MEAN), TOY, 1),
  'token mean': (compose(weights=est.token_mean()), TOY, 2),
  'random critic at λ = 0': (actor(0.0), TOY, 1),
  'λ by length': (actor(est.length_adaptive(1.0)), EXACT_CRITIC, 1),
  'ppo': (est.ppo(), TOY, 2),
  'vapo': (est.vapo(), TOY, 2),
  'vine_ppo': (est.vine_ppo((0,), 2, 1, kl=0.0), TOY, 2),
  'terminal reward with γ < 1': (GAMMA, TOY, 1),
  'off policy, uncorrected': (centred(), OFF_POLICY, 2),
  'token ratio': (centred(loss=est.clipped(HUGE)), OFF_POLICY, 2),
  'clipped weight': (
    centred(loss=est.clipped_weight(HUGE, HUGE)),
    *(OFF_POLICY, 2),
  ),
  'sequence ratio': (
    centred(loss=unclipped(est.sequence_ratio), weights=MEAN),
    *(OFF_POLICY, 2),
  ),
  'p3o off policy, clipped': (est.p3o(0.05), OFF_POLICY, 2),
  'sampler, uncorrected': (centred(), OTHER_SAMPLER, 2),
  'sampler, token ratio': (corrected(lambda x: x), OTHER_SAMPLER, 2),
  'sampler, truncated': (
    corrected(est.truncate(1.2), WHOLE),
    *(OTHER_SAMPLER, 2),
  ),
  'sampler, masked': (
    corrected(est.mask_outside(0.7, 1.4), WHOLE),
    *(OTHER_SAMPLER, 2),
  ),
}


@pytest.mark.parametrize('name', TILTED)
def test_off_direction(name):
  report = examine(*TILTED[name])
  assert 0.3 < report.cosine < 0.9995
  assert report.bias > 0.03


def test_equalities_on_policy():
  """GSPO is GRPO, CISPO is DAPO without its penalty, P3O is RLOO."""
  look = lambda estimator, samples=3: examine(estimator, TOY, samples)
  for one, other in (
    (look(est.gspo()), look(est.grpo(kl=0.0))),
    (look(est.gspo(ratio=est.sequence_token_ratio)), look(est.grpo(kl=0.0))),
    (look(est.cispo()), look(est.dapo(max_length=9, buffer=2))),
    (look(est.p3o(), 2), look(est.rloo(), 2)),
  ):
    close(one.gradient, other.gradient)
    assert one.variance == pytest.approx(other.variance, rel=1e-10)


def standardized_scale(p, samples):
  """E[A | right] − E[A | wrong] of rewards that are 1 with probability p."""

  def first(rewards):
    deviation = np.std(rewards, ddof=1)
    return (rewards[0] - np.mean(rewards)) / deviation if deviation else 0.0

  scale = 0.0
  for k, share in counts(samples - 1, p).items():
    others = [1.0] * k + [0.0] * (samples - 1 - k)
    scale += share * (first([1.0, *others]) - first([0.0, *others]))
  return scale


def test_standardizing_scales_each_prompt_where_rewards_are_binary():
  toy = enumeration.toy(seed=3, words=1, max_length=2, prompts=2)
  toy = toy._replace(rewards=np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
  report = examine(compose(est.standardize(0.0)), toy, 4)
  scales = np.array([standardized_scale(p, 4) for p in success(toy)])
  assert abs(scales[0] - scales[1]) > 0.01  # it reweights prompts
  scales = scales[:, None, None]
  close(report.gradient, scales * report.exact_gradient)
  # All mixed groups of up to three have one deviation.
  for samples in (2, 3):
    one, other = (standardized_scale(p, samples) for p in (0.1, 0.6))
    assert one == pytest.approx(other, rel=1e-12)


def test_dropping_equal_groups_scales_each_prompt():
  """N counts the prompts that are kept: more, where the others are lost."""
  report = examine(centred(keep=est.mixed_outcomes()), TWO_BINARY, samples=2)
  mixed = 2 * success(TWO_BINARY) * (1 - success(TWO_BINARY))
  scales = 2 * (mixed[::-1] / 2 + (1 - mixed[::-1]))
  close(report.gradient, scales[:, None, None] * report.exact_gradient)


def test_whitening_binary_rewards_scales_each_prompt():
  report = examine(compose(est.whiten()), TWO_BINARY, 2)
  scales = []
  for got, exact in zip(report.gradient, report.exact_gradient, strict=True):
    scales.append((got * exact).sum() / (exact * exact).sum())
    close(got, scales[-1] * exact)
  assert abs(scales[0] - scales[1]) > 0.001
