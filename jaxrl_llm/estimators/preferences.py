"""Losses of pairs of responses to a prompt, one of which is preferred.

Responses pair up along G in their order; the one with the higher reward is
preferred.  A pair's loss is repeated at every token of both its responses, so
`sequence_mean` averages over pairs.  The implicit reward's margin is

    h = log π(y⁺)/π_ref(y⁺) − log π(y⁻)/π_ref(y⁻)   (sums over tokens, nats)

and a reward model's margin s(y⁺) − s(y⁻).
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.baselines import partner
from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Batch,
  Needs,
  Outputs,
  Rollouts,
  TokenLoss,
  valid_responses,
)


def preference_sign() -> AdvantageTransform:
  """Maps the better response of each pair to +1, the worse to −1, ties to 0.

  Level: response, [P, G, 1] → [P, G, 1].
  Bias: another objective; for responses that were given, not sampled.
  """
  return AdvantageTransform(
    lambda advantages, rollouts: jnp.sign(advantages - partner(advantages)),
    Needs(samples=2),
    takes='response',
    centres=True,
  )


def distinct_pairs(rollouts: Rollouts) -> Array:
  """Keeps pairs of valid responses with tokens and with different rewards.

  A pair's loss lies at its tokens: if one response had none, its partner would
  carry only half of it.
  """
  some = rollouts.mask.any(axis=2, keepdims=True) & valid_responses(rollouts)
  differ = rollouts.rewards != partner(rollouts.rewards)
  return some & partner(some) & differ


def logistic_preference(beta: float, floor: float = 0.0) -> TokenLoss:
  """The logistic loss of the implicit reward's margin.

    ℓ = − log σ(β (h − λ max(0, log π_ref(y⁺) − log π(y⁺))))

  Args:
    beta: β, in 1/nats.
    floor: λ, weight of keeping the preferred response as likely as under the
      reference policy.

  References:
    Rafailov et al., `Direct Preference Optimization
    <https://arxiv.org/abs/2305.18290>`_, 2023
    Pal et al., `Smaug <https://arxiv.org/abs/2402.13228>`_, 2024 (λ)
  """

  if beta <= 0:
    raise ValueError(f'{beta=} has to be above 0')

  def apply(outputs: Outputs, batch: Batch) -> Array:
    ratio = sequence_log_ratio(outputs, batch)
    preferred = jnp.where(batch.advantages > 0, ratio, partner(ratio))
    margin = _margin(ratio, batch)
    if floor:
      # At π = π_ref, where training starts, the gradient of `relu` is 0.
      margin = margin - floor * jax.nn.relu(-preferred)
    return jnp.broadcast_to(
      -jax.nn.log_sigmoid(beta * margin), batch.mask.shape
    )

  return TokenLoss(apply, Needs(samples=2, reference=True))


def squared_preference(beta: float) -> TokenLoss:
  """The squared distance of the margin from a fixed one.

    ℓ = (h − 1/(2β))²

  h sums over tokens, as in the paper; TRL averages over them.

  Args:
    beta: β, in 1/nats.

  References:
    Azar et al., `A General Theoretical Paradigm to Understand Learning from
    Human Preferences <https://arxiv.org/abs/2310.12036>`_, 2023
  """

  if beta <= 0:
    raise ValueError(f'{beta=} has to be above 0')

  def apply(outputs: Outputs, batch: Batch) -> Array:
    margin = _margin(sequence_log_ratio(outputs, batch), batch)
    error = jnp.square(margin - 0.5 / beta)
    return jnp.broadcast_to(error, batch.mask.shape)

  return TokenLoss(apply, Needs(samples=2, reference=True))


def bradley_terry() -> TokenLoss:
  """The logistic loss of a reward model's margin.

    ℓ = − log σ(s⁺ − s⁻)

  s is the score of a whole response: `Outputs.values` at its last token, where
  index t of a reward model, unlike a critic's, is the state *after* token t.  A
  constant in s cancels, so no data can determine it.

  Returns:
    A loss that raises ValueError if the outputs have no values.

  References:
    Bradley and Terry, `Rank Analysis of Incomplete Block Designs
    <https://doi.org/10.2307/2334029>`_, 1952
    Christiano et al., `Deep Reinforcement Learning from Human Preferences
    <https://arxiv.org/abs/1706.03741>`_, 2017
  """

  def apply(outputs: Outputs, batch: Batch) -> Array:
    if outputs.values is None:
      raise ValueError('bradley_terry needs `values` in the outputs')
    margin = _margin(last_value(outputs.values, batch.mask), batch)
    return jnp.broadcast_to(-jax.nn.log_sigmoid(margin), batch.mask.shape)

  return TokenLoss(apply, Needs(samples=2))


def last_value(values: Array, mask: Array) -> Array:
  """Selects values at the responses' last tokens, [P, G, 1]; 0 without any."""
  numbers = jnp.arange(1, mask.shape[2] + 1)[None, None]
  numbers = jnp.where(mask, numbers, 0)
  last = mask & (numbers == numbers.max(axis=2, keepdims=True))
  return jnp.where(last, values, 0.0).sum(axis=2, keepdims=True)


def sequence_log_ratio(outputs: Outputs, batch: Batch) -> Array:
  """Returns log π(y)/π_ref(y) of whole responses, [P, G, 1] nats."""
  ratio = outputs.log_probs - batch.ref_log_probs
  return jnp.where(batch.mask, ratio, 0.0).sum(axis=2, keepdims=True)


def _margin(x: Array, batch: Batch) -> Array:
  """Returns the preferred `x` minus the rejected one, for both of a pair."""
  return batch.advantages * (x - partner(x))
