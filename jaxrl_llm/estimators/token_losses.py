"""Losses of every token, before weighting.

Losses are minimised.  Each maps the model's `Outputs` and a prepared `Batch`
to [P, G, T]; `add` sums several.  Entries outside the mask are finite and
have a weight of 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.ratios import token_ratio
from jaxrl_llm.estimators.types import (
  Array,
  Batch,
  Needs,
  Outputs,
  Ratio,
  Running,
  TokenLoss,
  merge_needs,
)

# Maps the log-probabilities of the policy and of the reference, [P, G, T] in
# nats, to a per-token divergence, [P, G, T] in nats.
Divergence = Callable[[Array, Array], Array]


def add(*losses: TokenLoss) -> TokenLoss:
  """Sums `losses` token by token."""

  def apply(outputs: Outputs, batch: Batch) -> Array:
    return sum(loss.apply(outputs, batch) for loss in losses)

  return TokenLoss(apply, merge_needs(*(loss.needs for loss in losses)))


def score_function() -> TokenLoss:
  """The score function (REINFORCE, likelihood-ratio) surrogate.

    ℓᵢₜ = − Aᵢₜ log πᵢₜ

  Its gradient is a policy gradient only while the sampling policy is current.

  References:
    Williams, `Simple statistical gradient-following algorithms for
    connectionist reinforcement learning
    <https://doi.org/10.1007/BF00992696>`_, 1992
  """

  def apply(outputs: Outputs, batch: Batch) -> Array:
    return -batch.advantages * outputs.log_probs

  return TokenLoss(apply, Needs(on_policy=True))


def negative_log_likelihood() -> TokenLoss:
  """Maximum likelihood, whatever the responses' source and reward.

  ℓᵢₜ = − log πᵢₜ
  """
  return TokenLoss(lambda outputs, batch: -outputs.log_probs)


def clipped(
  low: float,
  high: float | None = None,
  ratio: Ratio = token_ratio,
  dual: float | None = None,
) -> TokenLoss:
  """The clipped surrogate of PPO.

    ℓᵢₜ = − min(ρᵢₜ Aᵢₜ, clip(ρᵢₜ, 1−ε_low, 1+ε_high) Aᵢₜ)
    ℓᵢₜ ← min(ℓᵢₜ, − dual · Aᵢₜ)   where Aᵢₜ < 0

  At the first update after sampling, ρ = 1 and its gradient is that of
  `score_function`.

  Args:
    low: ε_low.
    high: ε_high; ε_low if None.
    ratio: ρ, per token or per response: see `ratios`.  With a ratio per
      response, each token carries the whole gradient: use `sequence_mean`.
    dual: the largest ratio for a negative advantage, above 1; no bound if None.

  References:
    Schulman et al., `Proximal Policy Optimization Algorithms
    <https://arxiv.org/abs/1707.06347>`_, 2017
    Ye et al., `Mastering Complex Control in MOBA Games
    <https://arxiv.org/abs/1912.09729>`_, 2019 (dual)
  """
  high = low if high is None else high
  if low < 0 or high < 0:
    raise ValueError(f'{low=} and {high=} have to be at least 0')
  if dual is not None and dual <= 1:
    raise ValueError(f'{dual=} has to be above 1')

  def apply(outputs: Outputs, batch: Batch) -> Array:
    advantages = batch.advantages
    rho = ratio(outputs, batch)
    inside = jnp.clip(rho, 1.0 - low, 1.0 + high)
    loss = -jnp.minimum(rho * advantages, inside * advantages)
    if dual is None:
      return loss
    bounded = jnp.minimum(loss, -dual * advantages)
    return jnp.where(advantages < 0, bounded, loss)

  return TokenLoss(apply)


def clipped_weight(
  low: float, high: float, ratio: Ratio = token_ratio
) -> TokenLoss:
  """The score function under a clipped importance weight.

    ℓᵢₜ = − sg[clip(ρᵢₜ, 1−ε_low, 1+ε_high)] Aᵢₜ log πᵢₜ

  Every token keeps a gradient, unlike in `clipped`.

  Args:
    low: ε_low; 1 leaves small ratios unchanged.
    high: ε_high.
    ratio: ρ.

  References:
    MiniMax, `MiniMax-M1 <https://arxiv.org/abs/2506.13585>`_, 2025 (CISPO)
  """

  if low < 0 or high < 0:
    raise ValueError(f'{low=} and {high=} have to be at least 0')

  def apply(outputs: Outputs, batch: Batch) -> Array:
    weight = jnp.clip(ratio(outputs, batch), 1.0 - low, 1.0 + high)
    weight = jax.lax.stop_gradient(weight)
    return -weight * batch.advantages * outputs.log_probs

  return TokenLoss(apply)


def k1(log_probs: Array, ref_log_probs: Array) -> Array:
  """log π − log π_ref: unbiased as a *value*; its gradient's mean is zero."""
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
  # Clipped as the ratios are, so that the exponential cannot overflow.
  return jnp.expm1(jnp.clip(difference, -20.0, 20.0)) - difference


def kl_penalty(coefficient: float, divergence: Divergence = k3) -> TokenLoss:
  """A divergence from the reference policy, in the loss.

    ℓᵢₜ = β d(log πᵢₜ, log π_refᵢₜ)

  Ignores a token's effect on later states, unlike a KL in the reward.

  Args:
    coefficient: β, in units of the advantage per nat.
    divergence: `k2` or `k3`.

  Raises:
    ValueError: for `k1`, whose expected gradient in the loss is zero.
  """
  if isinstance(coefficient, Running):
    raise ValueError(
      'kl_penalty: a running coefficient works on the reward; see '
      '`subtract_response_kl` and `subtract_token_kl`'
    )
  if divergence is k1:
    raise ValueError(
      'kl_penalty(k1): the expected gradient of k1 in the loss is zero; '
      'use k2 or k3, or subtract the KL from the reward'
    )

  def apply(outputs: Outputs, batch: Batch) -> Array:
    return coefficient * divergence(outputs.log_probs, batch.ref_log_probs)

  return TokenLoss(apply, Needs(reference=True))


def value_error(coefficient: float, clip: float | None = None) -> TokenLoss:
  """The squared error of the critic.

    ℓᵢₜ = c/2 · max((V − target)², (clip(V, V_old − ε, V_old + ε) − target)²)

  Args:
    coefficient: c.
    clip: ε, in units of the reward; None does not clip.

  References:
    Schulman et al., `Proximal Policy Optimization Algorithms
    <https://arxiv.org/abs/1707.06347>`_, 2017; the clipping is that of its
    authors' code.
  """

  def apply(outputs: Outputs, batch: Batch) -> Array:
    error = jnp.square(outputs.values - batch.value_targets)
    if clip is not None:
      near = jnp.clip(outputs.values, batch.values - clip, batch.values + clip)
      error = jnp.maximum(error, jnp.square(near - batch.value_targets))
    return 0.5 * coefficient * error

  return TokenLoss(apply, Needs(critic=True))


def entropy_bonus(coefficient: float) -> TokenLoss:
  """Rewards entropy of the next-token distributions, ignoring later states.

    ℓᵢₜ = − c Hᵢₜ

  Args:
    coefficient: c, in units of the advantage per nat.
  """

  def apply(outputs: Outputs, batch: Batch) -> Array:
    if outputs.entropy is None:
      raise ValueError('entropy_bonus needs `entropy` in the outputs')
    return -coefficient * outputs.entropy

  return TokenLoss(apply)
