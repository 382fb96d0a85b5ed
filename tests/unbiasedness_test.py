"""What each estimator's gradient is in expectation, by exact enumeration.

A language of two words and EOS, at most three tokens long, has 15 responses.
The policy has a row of logits per prefix, so every expectation is a finite
sum: over responses for the true gradient, over all groups of responses for an
estimator's.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import estimators as est

WORDS, EOS, LIMIT = 2, 2, 3
KL = 0.3


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def is_over(prefix):
  return len(prefix) == LIMIT or prefix[-1:] == (EOS,)


def grow(prefix=()):
  """All responses that begin with `prefix`."""
  if is_over(prefix):
    return [prefix]
  return [r for token in range(WORDS + 1) for r in grow((*prefix, token))]


RESPONSES = grow()
PREFIXES = sorted({r[:t] for r in RESPONSES for t in range(len(r))})
ROW = {prefix: i for i, prefix in enumerate(PREFIXES)}
# Padded to [15, LIMIT]: the prefix's row, the token, the mask.
_pad = lambda x: list(x) + [0] * (LIMIT - len(x))
ROWS = np.array([_pad([ROW[r[:t]] for t in range(len(r))]) for r in RESPONSES])
TOKENS = np.array([_pad(r) for r in RESPONSES])
MASK = np.array([_pad([True] * len(r)) for r in RESPONSES]).astype(bool)


def make_logits(seed):
  random = np.random.default_rng(seed)
  return random.normal(size=(len(PREFIXES), WORDS + 1))


def token_log_probs(logits):
  """[15, LIMIT] of each response's tokens."""
  return jax.nn.log_softmax(logits, axis=-1)[ROWS, TOKENS]


def probabilities(logits):
  """[15] of the responses."""
  total = jnp.where(MASK, token_log_probs(logits), 0.0).sum(axis=1)
  return jnp.exp(total)


LOGITS, REFERENCE = make_logits(0), make_logits(1)
REWARDS = np.random.default_rng(2).normal(1.0, 1.0, len(RESPONSES))
BINARY = (REWARDS > 1.0).astype(float)


def exact_gradient(rewards=REWARDS, kl=0.0):
  """∇ of E[R] − β KL(π‖π_ref), from the definitions."""

  def objective(logits):
    p = probabilities(logits)
    ratio = jnp.log(p) - jnp.log(probabilities(REFERENCE))
    return (p * rewards).sum() - kl * (p * ratio).sum()

  return np.asarray(jax.grad(objective)(LOGITS))


def expected_gradient(estimator, samples, rewards=REWARDS):
  """E[− ∇ loss] over all groups of `samples` responses to one prompt."""
  groups = np.array(
    list(itertools.product(range(len(RESPONSES)), repeat=samples))
  )
  weights = np.asarray(probabilities(LOGITS))[groups].prod(axis=1)
  np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-12)

  def gradient(group):
    of_group = lambda array: jnp.asarray(array)[group][None]
    rollouts = est.Rollouts(
      tokens=of_group(TOKENS),
      mask=of_group(MASK),
      log_probs=of_group(token_log_probs(LOGITS)),
      rewards=of_group(rewards)[..., None],
      ref_log_probs=of_group(token_log_probs(REFERENCE)),
    )
    batch = estimator.prepare(rollouts)
    outputs = lambda x: est.Outputs(log_probs=of_group(token_log_probs(x)))
    return jax.grad(lambda x: -estimator.loss(outputs(x), batch))(LOGITS)

  def total(groups, weights):
    gradients = jax.vmap(gradient)(groups)
    return jnp.einsum('g,g...->...', weights, gradients)

  return np.asarray(jax.jit(total)(groups, weights))


def cosine(x, y):
  return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())


def compose(advantages=None, weights=None):
  return est.estimator(
    advantages or est.identity(),
    est.score_function(),
    weights or est.sequence_sum(),
  )


def test_the_language_is_whole():
  assert len(RESPONSES) == 1 + 2 + 4 * 3 and len(PREFIXES) == 7
  assert float(probabilities(LOGITS).sum()) == pytest.approx(1.0, rel=1e-12)
  assert 0 < BINARY.sum() < len(BINARY)


@pytest.mark.parametrize('samples', [2, 3])
@pytest.mark.parametrize('name', ['reinforce', 'rloo'])
def test_unbiased(name, samples):
  estimator = {'reinforce': est.reinforce(), 'rloo': est.rloo()}[name]
  got = expected_gradient(estimator, samples)
  np.testing.assert_allclose(got, exact_gradient(), rtol=0, atol=1e-10)


@pytest.mark.parametrize('samples', [2, 3])
def test_rloo_with_kl_is_unbiased_for_the_regularised_objective(samples):
  got = expected_gradient(est.rloo(kl=KL), samples)
  exact = exact_gradient(kl=KL)
  np.testing.assert_allclose(got, exact, rtol=0, atol=1e-10)
  assert np.abs(exact - exact_gradient()).max() > 0.01


@pytest.mark.parametrize('samples', [2, 3])
def test_dr_grpo_is_scaled_only(samples):
  got = expected_gradient(est.dr_grpo(max_length=LIMIT), samples)
  scale = (samples - 1) / samples / LIMIT
  np.testing.assert_allclose(got, scale * exact_gradient(), rtol=0, atol=1e-10)


def test_grpo_is_off_direction():
  for rewards in (REWARDS, BINARY):
    got = expected_gradient(est.grpo(kl=0.0), 3, rewards)
    assert 0.5 < cosine(got, exact_gradient(rewards)) < 0.999


def test_standardizing_keeps_the_direction_for_binary_rewards_only():
  standardized = compose(est.standardize(epsilon=0.0))
  got = expected_gradient(standardized, 3, BINARY)
  assert cosine(got, exact_gradient(BINARY)) == pytest.approx(1.0, abs=1e-12)
  got = expected_gradient(standardized, 3)
  assert cosine(got, exact_gradient()) < 1 - 1e-6


@pytest.mark.parametrize('weights', [est.sequence_mean(), est.token_mean()])
def test_own_length_in_the_denominator_tilts(weights):
  got = expected_gradient(compose(weights=weights), 2)
  assert cosine(got, exact_gradient()) < 0.999


def test_constant_length_scales():
  got = expected_gradient(compose(weights=est.constant_length(5)), 1)
  np.testing.assert_allclose(5 * got, exact_gradient(), rtol=0, atol=1e-10)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_response_reward_models_hidden_token_rewards(seed):
  """The theorem: token rewards and γ, both unknown, summed into R.

  The oracle never sees a response's reward: it differentiates Bellman's
  equation for the token rewards, discounted by γ.
  """
  random = np.random.default_rng(seed)
  gamma = random.uniform(0.3, 0.95)
  token_rewards = random.normal(size=(len(PREFIXES), WORDS + 1))

  def value(logits, prefix=()):
    if is_over(prefix):
      return 0.0
    p = jax.nn.softmax(logits[ROW[prefix]])
    return sum(
      p[token]
      * (
        token_rewards[ROW[prefix], token]
        + gamma * value(logits, (*prefix, token))
      )
      for token in range(WORDS + 1)
    )

  exact = np.asarray(jax.jit(jax.grad(value))(LOGITS))
  discounted = gamma ** np.arange(LIMIT) * token_rewards[ROWS, TOKENS]
  whole = (discounted * MASK).sum(axis=1)
  for estimator in (est.reinforce(), est.rloo()):
    got = expected_gradient(estimator, 2, whole)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-10)
  # The same rewards taken as if undiscounted are another problem.
  wrong = (token_rewards[ROWS, TOKENS] * MASK).sum(axis=1)
  assert np.abs(expected_gradient(est.rloo(), 2, wrong) - exact).max() > 0.01


def per_token_kl(of_rows):
  """E over the policy's responses of the sum of a divergence per prefix.

  Blind to later states: the distribution over prefixes is held fixed.
  """
  visits = np.zeros(len(PREFIXES))
  p = np.asarray(probabilities(LOGITS))
  for i in range(len(RESPONSES)):
    for t in range(MASK[i].sum()):
      visits[ROWS[i, t]] += p[i]
  gradient = jax.grad(lambda x: (visits * of_rows(x)).sum())(LOGITS)
  return np.asarray(gradient)


def test_divergences_in_the_loss():
  """k1 has no gradient, k2 that of KL(π‖π_ref), k3 that of KL(π_ref‖π)."""
  ref = jax.nn.log_softmax(REFERENCE, axis=-1)

  def forward(x):
    new = jax.nn.log_softmax(x, axis=-1)
    return (jnp.exp(new) * (new - ref)).sum(axis=1)

  def reverse(x):
    new = jax.nn.log_softmax(x, axis=-1)
    return (jnp.exp(ref) * (ref - new)).sum(axis=1)

  def gradient(divergence):
    loss = est.TokenLoss(
      lambda outputs, batch: divergence(outputs.log_probs, batch.ref_log_probs)
    )
    weights = est.sequence_sum()
    return -expected_gradient(
      est.estimator(est.identity(), loss, weights), samples=1
    )

  np.testing.assert_allclose(gradient(est.k1), 0.0, atol=1e-12)
  np.testing.assert_allclose(
    gradient(est.k2), per_token_kl(forward), rtol=0, atol=1e-10
  )
  np.testing.assert_allclose(
    gradient(est.k3), per_token_kl(reverse), rtol=0, atol=1e-10
  )
  # Neither is the gradient of the whole response's KL.
  whole = exact_gradient() - exact_gradient(kl=1.0)
  assert np.abs(per_token_kl(forward) - whole).max() > 0.01
