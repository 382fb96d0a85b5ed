"""Importance ratios of the trained policy to the one that sampled.

Each maps (outputs, batch) to [P, G, T].  |log ρ| is clipped at 20 so that ρ
cannot overflow: 0 · ∞ is NaN.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.baselines import partner
from jaxrl_llm.estimators.types import Array, Batch, Outputs, Ratio, TokenLoss


def token_ratio(outputs: Outputs, batch: Batch) -> Array:
  """ρᵢₜ = πᵢₜ / π_oldᵢₜ: the update's effect on each token.

  Off policy it corrects the choice of the token but not of the prefix.
  """
  return _exp(outputs.log_probs - batch.log_probs)


def sequence_ratio(outputs: Outputs, batch: Batch) -> Array:
  """sᵢ = (πᵢ / π_oldᵢ)^{1/Tᵢ}: the geometric mean of the tokens' ratios.

  References:
    Zheng et al., `Group Sequence Policy Optimization
    <https://arxiv.org/abs/2507.18071>`_, 2025
  """
  total, length = _sum(outputs.log_probs - batch.log_probs, batch.mask)
  return jnp.broadcast_to(_exp(total / length), batch.mask.shape)


def sequence_token_ratio(outputs: Outputs, batch: Batch) -> Array:
  """The value of `sequence_ratio` with per-token gradients: GSPO-token.

  sᵢₜ = sg[sᵢ] · πᵢₜ / sg[πᵢₜ]
  """
  ratio = jax.lax.stop_gradient(sequence_ratio(outputs, batch))
  change = outputs.log_probs - jax.lax.stop_gradient(outputs.log_probs)
  return ratio * jnp.exp(change)


def trajectory_ratio(outputs: Outputs, batch: Batch) -> Array:
  """ρᵢ = Πₜ πᵢₜ / π_oldᵢₜ, the ratio of the whole response.

  The exact off-policy correction, with a variance that grows with the length.
  Each token carries the whole gradient: combine it with `sequence_mean`.
  """
  total, _ = _sum(outputs.log_probs - batch.log_probs, batch.mask)
  return jnp.broadcast_to(_exp(total), batch.mask.shape)


def pair_ratio(outputs: Outputs, batch: Batch) -> Array:
  """ρᵢ · sg[ρⱼ], the ratio of the pair of i and its partner j.

  Responses pair up along G.  Each has its own gradient; both are clipped
  together.  Like `trajectory_ratio`, combine it with `sequence_mean`.
  """
  total, _ = _sum(outputs.log_probs - batch.log_probs, batch.mask)
  change = total - jax.lax.stop_gradient(total)
  both = jax.lax.stop_gradient(total + partner(total))
  return jnp.broadcast_to(_exp(both) * jnp.exp(change), batch.mask.shape)


def sampler_token_ratio(outputs: Outputs, batch: Batch) -> Array:
  """π_oldᵢₜ / π_samplerᵢₜ if the sampler is another program, else 1."""
  del outputs
  return _exp(_sampler_log_ratio(batch))


def sampler_trajectory_ratio(outputs: Outputs, batch: Batch) -> Array:
  """Πₜ π_oldᵢₜ / π_samplerᵢₜ; exact, unlike `sampler_token_ratio`."""
  del outputs
  total, _ = _sum(_sampler_log_ratio(batch), batch.mask)
  return jnp.broadcast_to(_exp(total), batch.mask.shape)


def truncate(highest: float = 2.0) -> Callable[[Array], Array]:
  """Caps importance weights at `highest`: little variance, some bias.

  References:
    Ionides, `Truncated Importance Sampling
    <https://doi.org/10.1198/106186008X320456>`_, 2008
  """
  if highest <= 0:
    raise ValueError(f'{highest=} has to be above 0')
  return lambda ratio: jnp.minimum(ratio, highest)


def mask_outside(
  low: float = 0.5, high: float = 2.0
) -> Callable[[Array], Array]:
  """Sets importance weights outside [low, high] to 0."""
  if not 0 <= low <= high:
    raise ValueError(f'{low=} and {high=} have to satisfy 0 ≤ low ≤ high')
  return lambda ratio: jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def correct_sampler(
  loss: TokenLoss,
  weight: Callable[[Array], Array],
  ratio: Ratio = sampler_token_ratio,
) -> TokenLoss:
  """Weights a loss to correct for a sampler that differs from the trainer.

    ℓᵢₜ ← sg[weight(π_old / π_sampler)] ℓᵢₜ

  Bias: none with `sampler_trajectory_ratio` and weights left as they are.

  Args:
    loss: the loss of every token.
    weight: `truncate`, `mask_outside` or any function of the ratio.
    ratio: `sampler_token_ratio` or `sampler_trajectory_ratio`.
  """

  def apply(outputs: Outputs, batch: Batch) -> Array:
    weights = jax.lax.stop_gradient(weight(ratio(outputs, batch)))
    return weights * loss.apply(outputs, batch)

  return TokenLoss(apply, loss.needs)


def _sampler_log_ratio(batch: Batch) -> Array:
  if batch.sampler_log_probs is None:
    return jnp.zeros_like(batch.log_probs)
  return batch.log_probs - batch.sampler_log_probs


def _sum(x: Array, mask: Array) -> tuple[Array, Array]:
  """Sums over a response, [P, G, 1], and its length in tokens, at least 1."""
  total = jnp.where(mask, x, 0.0).sum(axis=2, keepdims=True)
  return total, jnp.maximum(mask.sum(axis=2, keepdims=True), 1)


def _exp(log_ratio: Array) -> Array:
  return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
