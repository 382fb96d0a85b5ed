"""Named estimators with an advantage per response, as one-line compositions.

`actor_critic` contains the estimators that value states,
`supervised_preference` those that are not reinforcement learning.

A is the advantage, ρ the ratio of the policy to the one that sampled, N the
number of responses, Tᵢ the length of response i in tokens.
"""

from jaxrl_llm.estimators.advantages import (
  chain,
  entropy_where_equal,
  identity,
  penalize_overlong,
  subtract_response_kl,
)
from jaxrl_llm.estimators.baselines import (
  length,
  score_norm,
  standardize,
  subtract_greedy_reward,
  subtract_group_mean,
  subtract_leave_one_out_mean,
  subtract_partner,
  subtract_running_mean,
  subtract_weighted_leave_one_out_mean,
  subtract_weighted_mean,
)
from jaxrl_llm.estimators.compose import Estimator, estimator
from jaxrl_llm.estimators.credit import (
  at_every_token,
  at_last_token,
  reward_to_go,
  subtract_token_kl,
  whiten,
)
from jaxrl_llm.estimators.ratios import sequence_ratio, trajectory_ratio
from jaxrl_llm.estimators.token_losses import (
  add,
  clipped,
  clipped_weight,
  k2,
  kl_penalty,
  score_function,
)
from jaxrl_llm.estimators.types import Ratio, Running
from jaxrl_llm.estimators.weights import (
  constant_length,
  mixed_outcomes,
  sequence_mean,
  sequence_sum,
  token_mean,
)


def reinforce() -> Estimator:
  """The policy gradient from the response's reward alone.

    L = − 1/N Σᵢ Σₜ Rᵢ log πᵢₜ

  By the Trajectory Policy Gradient Theorem this models all token rewards that
  add up to R, whatever the discount.

  Bias: none.

  References:
    Williams, `Simple statistical gradient-following algorithms for
    connectionist reinforcement learning
    <https://doi.org/10.1007/BF00992696>`_, 1992
    He et al., `Response-Level Rewards Are All You Need
    <https://arxiv.org/abs/2506.02553>`_, 2025
  """
  return estimator(identity(), score_function(), sequence_sum())


def reinforce_baseline(decay: float = 0.9) -> Estimator:
  """REINFORCE with the average reward of earlier batches as the baseline.

    L = − 1/N Σᵢ Σₜ (Rᵢ − b) log πᵢₜ,   b ← decay · b + (1 − decay) · mean R

  Bias: none: b knows earlier batches only.

  Args:
    decay: between 0 and 1.
  """
  return estimator(
    subtract_running_mean(decay), score_function(), sequence_sum()
  )


def remax() -> Estimator:
  """REINFORCE with the greedy response's reward as the baseline.

    L = − 1/N Σᵢ Σₜ (Rᵢ − R(greedy)) log πᵢₜ

  Bias: none.

  References:
    Li et al., `ReMax <https://arxiv.org/abs/2310.10505>`_, 2023
  """
  return estimator(subtract_greedy_reward(), score_function(), sequence_sum())


def rloo(kl: float | Running = 0.0) -> Estimator:
  """REINFORCE with the siblings' mean as the baseline of each response.

    L = − 1/N Σᵢ Σₜ Aᵢ log πᵢₜ,   Aᵢ = Rᵢ − 1/(G−1) Σ_{j≠i} Rⱼ
    Rᵢ ← Rᵢ − β Σₜ (log πᵢₜ − log π_refᵢₜ)

  Bias: none, for E[R] − β KL(π‖π_ref).

  Args:
    kl: β, in units of the reward per nat, or `adaptive_kl`.  At 0 no reference
      is needed.

  References:
    Ahmadian et al., `Back to Basics <https://arxiv.org/abs/2402.14740>`_, 2024
  """
  shaping = (subtract_response_kl(kl),) if kl else ()
  return estimator(
    chain(*shaping, subtract_leave_one_out_mean()),
    score_function(),
    sequence_sum(),
  )


def reinforce_plus_plus(
  clip: float = 0.2, kl: float | Running = 0.01
) -> Estimator:
  """REINFORCE++: reward minus KL, to go, whitened over the batch's tokens.

    L = − 1/ΣT Σᵢ Σₜ min(ρᵢₜ Aᵢₜ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢₜ)
    Aᵢₜ = whiten(Rᵢ − β Σ_{s≥t} log πᵢₛ/π_refᵢₛ)

  The moments of `whiten` are over all valid tokens of the batch, so that long
  responses count more, as in OpenRLHF.

  Bias: tilts, by `whiten` over tokens and by `token_mean`.

  Args:
    clip: ε.
    kl: β, in units of the reward per nat, or `adaptive_kl`.  At 0 no reference
      is needed.

  References:
    Hu et al., `REINFORCE++ <https://arxiv.org/abs/2501.03262>`_, 2025
  """
  shaping = (subtract_token_kl(kl),) if kl else ()
  return estimator(
    chain(at_last_token(), *shaping, reward_to_go(), whiten()),
    clipped(clip),
    token_mean(),
  )


def reinforce_plus_plus_baseline(
  clip: float = 0.2, kl: float = 0.01
) -> Estimator:
  """REINFORCE++-baseline: centred by prompt, whitened by batch, k2 in the loss.

    L = − 1/ΣT Σᵢ Σₜ [min(ρᵢₜ Aᵢ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢ) − β k2ᵢₜ]
    Aᵢ = whiten(Rᵢ − mean R)

  The moments are over tokens, as in `reinforce_plus_plus`.

  Bias: as `reinforce_plus_plus`; the KL's as in `k2`.

  Args:
    clip: ε.
    kl: β, in units of the advantage per nat.  At 0 no reference is needed.

  References:
    Hu et al., `REINFORCE++ <https://arxiv.org/abs/2501.03262>`_, 2025
  """
  penalty = (kl_penalty(kl, k2),) if kl else ()
  return estimator(
    chain(subtract_group_mean(), at_every_token(), whiten()),
    add(clipped(clip), *penalty),
    token_mean(),
  )


def grpo(clip: float = 0.2, kl: float = 0.04) -> Estimator:
  """Group Relative Policy Optimization.

    L = − 1/N Σᵢ 1/Tᵢ Σₜ [min(ρᵢₜ Aᵢ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢ) − β k3ᵢₜ]
    Aᵢ = (Rᵢ − mean R) / std R

  Bias: 1/Tᵢ tilts; `standardize` scales each prompt, and tilts where rewards
  are not binary; the KL's as in `k3`.

  Args:
    clip: ε.
    kl: β, in units of the advantage per nat.  At 0 no reference is needed.

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


def dapo(
  max_length: int,
  buffer: int,
  clip: float = 0.2,
  clip_high: float = 0.28,
) -> Estimator:
  """Decoupled Clip and Dynamic Sampling Policy Optimization.

    L = − 1/ΣT Σᵢ Σₜ min(ρᵢₜ Aᵢ, clip(ρᵢₜ, 1−ε_low, 1+ε_high) Aᵢ)
    Aᵢ = (R′ᵢ − mean R′) / std R′,   R′ = R less the overlong penalty

  Groups of equal R are dropped and do not count; the driver refills them.  No
  KL.

  Bias: as `grpo`, with one mean over all tokens for 1/Tᵢ.

  Args:
    max_length: tokens at which the overlong penalty is 1.
    buffer: tokens over which it rises.
    clip: ε_low.
    clip_high: ε_high.

  References:
    Yu et al., `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025
  """
  return estimator(
    chain(penalize_overlong(max_length, buffer), standardize()),
    clipped(clip, clip_high),
    token_mean(),
    keep=mixed_outcomes(),
  )


def gspo(
  clip: float = 3e-4, clip_high: float = 4e-4, ratio: Ratio = sequence_ratio
) -> Estimator:
  """Group Sequence Policy Optimization.

    L = − 1/N Σᵢ min(sᵢ Aᵢ, clip(sᵢ, 1−ε_low, 1+ε_high) Aᵢ)
    sᵢ = (πᵢ / π_oldᵢ)^{1/Tᵢ},   Aᵢ = (Rᵢ − mean R) / std R

  Bias: as `grpo`, which it is on policy.

  Args:
    clip: ε_low.
    clip_high: ε_high.
    ratio: `sequence_ratio`, or `sequence_token_ratio` for GSPO-token.

  References:
    Zheng et al., `Group Sequence Policy Optimization
    <https://arxiv.org/abs/2507.18071>`_, 2025
  """
  return estimator(
    standardize(), clipped(clip, clip_high, ratio), sequence_mean()
  )


def cispo(low: float = 1.0, high: float = 0.28) -> Estimator:
  """Clipped importance weights, under which every token keeps a gradient.

    L = − 1/ΣT Σᵢ Σₜ sg[clip(ρᵢₜ, 1−ε_low, 1+ε_high)] Aᵢ log πᵢₜ
    Aᵢ = (Rᵢ − mean R) / std R

  The paper tunes ε_high only and does not report it: the default is DAPO's.
  Dynamic sampling and the overlong penalty, which the paper adds, are
  `mixed_outcomes` and `penalize_overlong`, as in `dapo`.

  Bias: as `dapo` without the penalty; tokens of groups with equal rewards
  count in ΣT.

  Args:
    low: ε_low; 1 does not clip from below.
    high: ε_high.

  References:
    MiniMax, `MiniMax-M1 <https://arxiv.org/abs/2506.13585>`_, 2025
  """
  return estimator(standardize(), clipped_weight(low, high), token_mean())


def opo() -> Estimator:
  """On-policy RL with a length-weighted baseline, as published.

    L = − 1/N Σᵢ Σₜ (Rᵢ − Σⱼ Tⱼ Rⱼ / Σⱼ Tⱼ) log πᵢₜ

  Bias: the response is in its own baseline, which tilts.

  References:
    Hao et al., `On-Policy RL with Optimal Reward Baseline
    <https://arxiv.org/abs/2505.23585>`_, 2025
  """
  return estimator(
    subtract_weighted_mean(length()), score_function(), sequence_sum()
  )


def opo_leave_one_out() -> Estimator:
  """`opo` with the siblings alone in the baseline.

    L = − 1/N Σᵢ Σₜ (Rᵢ − Σ_{j≠i} Tⱼ Rⱼ / Σ_{j≠i} Tⱼ) log πᵢₜ

  Bias: none.
  """
  return estimator(
    subtract_weighted_leave_one_out_mean(length()),
    score_function(),
    sequence_sum(),
  )


def obl_reinforce() -> Estimator:
  """REINFORCE with a score-weighted baseline, near the one of least variance.

    L = − 1/N Σᵢ Σₜ (Rᵢ − Σ_{j≠i} Wⱼ Rⱼ / Σ_{j≠i} Wⱼ) log πᵢₜ
    Wⱼ = Σₜ ‖∇_logits log πⱼₜ‖²

  Bias: none: leave-one-out.  (Published forms keep the response in its own
  baseline.)
  """
  return estimator(
    subtract_weighted_leave_one_out_mean(score_norm()),
    score_function(),
    sequence_sum(),
  )


def rl_zvp(entropy: float = 0.1, clip: float = 0.2) -> Estimator:
  """GRPO that also learns from groups of equal rewards, by entropy.

    A as in `grpo`, but α Hᵢₜ where all are right and − α (maxₛ Hᵢₛ − Hᵢₜ)
    where all are wrong; right is a reward above 0.5.  No KL.

  Bias: as `grpo`, and on purpose where a group's rewards are equal.

  Args:
    entropy: α, in units of the advantage per nat.
    clip: ε.

  References:
    Le et al., `No Prompt Left Behind <https://arxiv.org/abs/2509.21880>`_, 2025
  """
  return estimator(
    chain(standardize(), entropy_where_equal(entropy)),
    clipped(clip),
    sequence_mean(),
  )


def p3o(clip: float = 0.2, ratio: Ratio = trajectory_ratio) -> Estimator:
  """Pairwise Proximal Policy Optimization.

    L = − 1/N Σᵢ min(ρᵢ Aᵢ, clip(ρᵢ, 1−ε, 1+ε) Aᵢ),   Aᵢ = Rᵢ − Rⱼ

  j is the partner of i along G.  The paper leaves the ratio open; we choose: V1
  clips each response's own trajectory ratio, V2 the product of the pair's, the
  importance weight of drawing that pair.  No KL, which the paper also controls.

  Bias: none on policy, where it is `rloo` with G = 2.

  Args:
    clip: ε.
    ratio: `trajectory_ratio` (V1) or `pair_ratio` (V2).

  References:
    Wu et al., `Pairwise Proximal Policy Optimization
    <https://arxiv.org/abs/2310.00212>`_, 2023
  """
  return estimator(
    subtract_partner(), clipped(clip, ratio=ratio), sequence_mean()
  )
