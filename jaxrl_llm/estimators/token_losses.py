"""The loss of every token, before weighting.

Losses are minimised.  Each maps the model's `Outputs` and a prepared `Batch`
to [P, G, T]; `add` sums several.  Entries outside the mask are finite and
meet a weight of 0.
"""

from collections.abc import Callable

import jax.numpy as jnp

from jaxrl_llm.estimators.types import (
  Array,
  Batch,
  Needs,
  Outputs,
  TokenLoss,
  merge_needs,
)

# Maps the log-probabilities of the policy and of the reference, [P, G, T] in
# nats, to a per-token divergence, [P, G, T] in nats.
Divergence = Callable[[Array, Array], Array]


def add(*losses: TokenLoss) -> TokenLoss:
  """The sum of `losses`, token by token."""

  def apply(outputs: Outputs, batch: Batch) -> Array:
    return sum(loss.apply(outputs, batch) for loss in losses)

  return TokenLoss(apply, merge_needs(*(loss.needs for loss in losses)))


def score_function() -> TokenLoss:
  """The score function (REINFORCE, likelihood-ratio) surrogate.

    ℓᵢₜ = − Aᵢₜ log πᵢₜ

  References:
    Williams, `Simple statistical gradient-following algorithms for
    connectionist reinforcement learning
    <https://doi.org/10.1007/BF00992696>`_, 1992
  """

  def apply(outputs: Outputs, batch: Batch) -> Array:
    return -batch.advantages * outputs.log_probs

  return TokenLoss(apply)


def token_ratio(outputs: Outputs, batch: Batch) -> Array:
  """ρᵢₜ = πᵢₜ / π_oldᵢₜ, [P, G, T]: how the update changed each token.

  |log ρ| is cut at 20: beyond, ρ would overflow, and 0 · ∞ is NaN.
  """
  return jnp.exp(jnp.clip(outputs.log_probs - batch.log_probs, -20.0, 20.0))


def clipped(low: float, high: float | None = None) -> TokenLoss:
  """The clipped surrogate of PPO.

    ℓᵢₜ = − min(ρᵢₜ Aᵢₜ, clip(ρᵢₜ, 1−ε_low, 1+ε_high) Aᵢₜ)

  At the first update after sampling ρ = 1 and its gradient is that of
  `score_function`.

  Args:
    low: ε_low.
    high: ε_high; ε_low if None.

  References:
    Schulman et al., `Proximal Policy Optimization Algorithms
    <https://arxiv.org/abs/1707.06347>`_, 2017
  """
  high = low if high is None else high

  def apply(outputs: Outputs, batch: Batch) -> Array:
    ratio = token_ratio(outputs, batch)
    inside = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    return -jnp.minimum(ratio * batch.advantages, inside * batch.advantages)

  return TokenLoss(apply)


def k1(log_probs: Array, ref_log_probs: Array) -> Array:
  """log π − log π_ref: unbiased as a *value*, useless as a loss."""
  return log_probs - ref_log_probs


def k2(log_probs: Array, ref_log_probs: Array) -> Array:
  """(log π − log π_ref)²/2: as a loss, the gradient of KL(π‖π_ref) per token.

  References:
    Schulman, `Approximating KL Divergence
    <http://joschu.net/blog/kl-approx.html>`_, 2020
  """
  return 0.5 * jnp.square(log_probs - ref_log_probs)


def k3(log_probs: Array, ref_log_probs: Array) -> Array:
  """π_ref/π − 1 + log π − log π_ref: as a loss, the gradient of KL(π_ref‖π).

  References:
    Schulman, `Approximating KL Divergence
    <http://joschu.net/blog/kl-approx.html>`_, 2020
  """
  difference = ref_log_probs - log_probs
  return jnp.expm1(difference) - difference


def kl_penalty(coefficient: float, divergence: Divergence = k3) -> TokenLoss:
  """A divergence from the reference policy, in the loss.

    ℓᵢₜ = β d(log πᵢₜ, log π_refᵢₜ)

  Blind to what a token does to later states, unlike a KL in the reward.

  Args:
    coefficient: β, in units of the advantage per nat.
    divergence: `k2` or `k3`.

  Raises:
    ValueError: for `k1`, whose expected gradient in the loss is zero.
  """
  if divergence is k1:
    raise ValueError(
      'kl_penalty(k1): the expected gradient of k1 in the loss is zero; '
      'use k2 or k3, or subtract the KL from the reward'
    )

  def apply(outputs: Outputs, batch: Batch) -> Array:
    return coefficient * divergence(outputs.log_probs, batch.ref_log_probs)

  return TokenLoss(apply, Needs(reference=True))
