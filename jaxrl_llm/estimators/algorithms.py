"""The named estimators: each a docstring over a one-line composition.

A is the advantage, ρ the ratio of the policy to the one that sampled, N the
number of responses, Tᵢ the length of response i in tokens.
"""

from jaxrl_llm.estimators.advantages import (
  chain,
  identity,
  ones,
  standardize,
  subtract_group_mean,
  subtract_leave_one_out_mean,
  subtract_response_kl,
)
from jaxrl_llm.estimators.compose import Estimator, estimator
from jaxrl_llm.estimators.token_losses import (
  add,
  clipped,
  kl_penalty,
  score_function,
)
from jaxrl_llm.estimators.weights import (
  constant_length,
  sequence_mean,
  sequence_sum,
  token_mean,
)


def reinforce() -> Estimator:
  """The policy gradient from the response's reward alone.

    L = − 1/N Σᵢ Σₜ Rᵢ log πᵢₜ

  By the Trajectory Policy Gradient Theorem this models every token reward
  that adds up to R, whatever the discount.

  Bias: none.

  References:
    Williams, `Simple statistical gradient-following algorithms for
    connectionist reinforcement learning
    <https://doi.org/10.1007/BF00992696>`_, 1992
    He et al., `Response-Level Rewards Are All You Need
    <https://arxiv.org/abs/2506.02553>`_, 2025
  """
  return estimator(identity(), score_function(), sequence_sum())


def rloo(kl: float = 0.0) -> Estimator:
  """REINFORCE with the siblings' mean as the baseline of each response.

    L = − 1/N Σᵢ Σₜ Aᵢ log πᵢₜ,   Aᵢ = Rᵢ − 1/(G−1) Σ_{j≠i} Rⱼ
    Rᵢ ← Rᵢ − β Σₜ (log πᵢₜ − log π_refᵢₜ)

  Bias: none, for E[R] − β KL(π‖π_ref).

  Args:
    kl: β, in units of the reward per nat.  At 0 no reference is asked for.

  References:
    Ahmadian et al., `Back to Basics <https://arxiv.org/abs/2402.14740>`_, 2024
  """
  shaping = (subtract_response_kl(kl),) if kl else ()
  return estimator(
    chain(*shaping, subtract_leave_one_out_mean()),
    score_function(),
    sequence_sum(),
  )


def grpo(clip: float = 0.2, kl: float = 0.04) -> Estimator:
  """Group Relative Policy Optimization.

    L = − 1/N Σᵢ 1/Tᵢ Σₜ [min(ρᵢₜ Aᵢ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢ) − β k3ᵢₜ]
    Aᵢ = (Rᵢ − mean R) / std R

  Bias: scale (G−1)/G; 1/std reweights prompts; 1/Tᵢ tilts the direction.

  Args:
    clip: ε.
    kl: β, in units of the advantage per nat.  At 0 no reference is asked for.

  References:
    Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, 2024
  """
  penalty = (kl_penalty(kl),) if kl else ()
  return estimator(standardize(), add(clipped(clip), *penalty), sequence_mean())


def dr_grpo(max_length: int, clip: float = 0.2) -> Estimator:
  """GRPO without its length and difficulty biases.

    L = − 1/(N·max_length) Σᵢ Σₜ min(ρᵢₜ Aᵢ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢ)
    Aᵢ = Rᵢ − mean R

  Differs from `grpo`: no division by the group's standard deviation, a
  constant (not each response's length) under the sum, no KL.

  Bias: scale (G−1)/(G · max_length) only.

  Args:
    max_length: the divisor, in tokens.  A constant of the run: not the padded
      width.
    clip: ε.

  References:
    Liu et al., `Understanding R1-Zero-Like Training
    <https://arxiv.org/abs/2503.20783>`_, 2025
  """
  return estimator(
    subtract_group_mean(), clipped(clip), constant_length(max_length)
  )


def sft() -> Estimator:
  """Maximum likelihood of responses that were given, not sampled.

    L = − 1/ΣT Σᵢ Σₜ log πᵢₜ

  Bias: another objective; no reward enters.
  """
  return estimator(ones(), score_function(), token_mean())
