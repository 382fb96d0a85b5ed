"""Supervised and preference estimators in the same algebra, without RL."""

from jaxrl_llm.estimators.advantages import ones
from jaxrl_llm.estimators.compose import Estimator, estimator
from jaxrl_llm.estimators.preferences import (
  bradley_terry,
  distinct_pairs,
  logistic_preference,
  preference_sign,
  squared_preference,
)
from jaxrl_llm.estimators.token_losses import negative_log_likelihood
from jaxrl_llm.estimators.weights import (
  reward_above,
  sequence_mean,
  sequence_sum,
  token_mean,
)


def sft() -> Estimator:
  """Maximum likelihood of responses from a data set.

    L = − 1/ΣT Σᵢ Σₜ log πᵢₜ

  Bias: another objective; no reward enters.
  """
  return estimator(ones(), negative_log_likelihood(), token_mean())


def rest_em(threshold: float = 0.5) -> Estimator:
  """Maximum likelihood of sampled responses with a high enough reward.

    L = − 1/N Σ_{Rᵢ > threshold} Σₜ log πᵢₜ,   N = |{i : Rᵢ > threshold}|

  The driver restarts from the initial model each round and limits how many
  responses a prompt contributes.

  Bias: another objective.  On policy each prompt climbs log P(R > threshold),
  at the rate of its expected share of the responses that are kept.

  Args:
    threshold: in units of the reward; only responses above it are trained on.

  References:
    Singh et al., `Beyond Human Data <https://arxiv.org/abs/2312.06585>`_, 2023
  """
  return estimator(
    ones(),
    negative_log_likelihood(),
    sequence_sum(),
    keep=reward_above(threshold),
  )


def dpo(beta: float = 0.1) -> Estimator:
  """Direct Preference Optimization.

    L = − 1/pairs Σ log σ(β h),   h = log π/π_ref (y⁺) − log π/π_ref (y⁻)

  Responses pair up along G; the higher reward is preferred, and pairs of
  equal rewards do not count.

  Bias: another objective.

  Args:
    beta: β, in 1/nats.

  References:
    Rafailov et al., `Direct Preference Optimization
    <https://arxiv.org/abs/2305.18290>`_, 2023
  """
  return estimator(
    preference_sign(),
    logistic_preference(beta),
    sequence_mean(),
    keep=distinct_pairs,
  )


def dpop(beta: float = 0.1, floor: float = 50.0) -> Estimator:
  """DPO-Positive: DPO that keeps the preferred response likely.

    L = − 1/pairs Σ log σ(β (h − λ max(0, log π_ref(y⁺) − log π(y⁺))))

  Bias: another objective.

  Args:
    beta: β, in 1/nats.
    floor: λ.

  References:
    Pal et al., `Smaug <https://arxiv.org/abs/2402.13228>`_, 2024
  """
  return estimator(
    preference_sign(),
    logistic_preference(beta, floor),
    sequence_mean(),
    keep=distinct_pairs,
  )


def ipo(beta: float = 0.1) -> Estimator:
  """Identity Preference Optimization.

    L = 1/pairs Σ (h − 1/(2β))²

  h sums over tokens, as in the paper; TRL averages over them.

  Bias: another objective.

  Args:
    beta: β, in 1/nats.

  References:
    Azar et al., `A General Theoretical Paradigm to Understand Learning from
    Human Preferences <https://arxiv.org/abs/2310.12036>`_, 2023
  """
  return estimator(
    preference_sign(),
    squared_preference(beta),
    sequence_mean(),
    keep=distinct_pairs,
  )


def reward_model() -> Estimator:
  """Maximum likelihood of preferences under the Bradley-Terry model.

    L = − 1/pairs Σ log σ(s(y⁺) − s(y⁻))

  Responses pair up along G as in `dpo`.  s is the score of a whole response,
  in nats of the odds that it is preferred; see
  `jaxrl_llm.training.reward_model` for the model that computes it.  No policy
  is trained.

  Bias: another objective.

  References:
    Christiano et al., `Deep Reinforcement Learning from Human Preferences
    <https://arxiv.org/abs/1706.03741>`_, 2017
  """
  return estimator(
    preference_sign(),
    bradley_terry(),
    sequence_mean(),
    keep=distinct_pairs,
  )
