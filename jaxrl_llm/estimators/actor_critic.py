"""Named estimators that value states, by a critic or by branches.

A is the advantage, V a value, ρ the ratio of the policy to the one that
sampled, N the number of responses, ΣT that of tokens.
"""

import math
from collections.abc import Callable

from jaxrl_llm.estimators.advantages import chain, subtract_response_kl
from jaxrl_llm.estimators.compose import Estimator, estimator
from jaxrl_llm.estimators.credit import (
  Fill,
  at_last_token,
  gae,
  hold,
  interpolate_advantages,
  lambda_return,
  length_adaptive,
  monte_carlo_return,
  subtract_token_kl,
  whiten,
)
from jaxrl_llm.estimators.positions import (
  Positions,
  delimiter,
  pairs,
  uniform,
)
from jaxrl_llm.estimators.thresholds import Threshold
from jaxrl_llm.estimators.token_losses import (
  add,
  clipped,
  kl_penalty,
  score_function,
  value_error,
)
from jaxrl_llm.estimators.trees import tree
from jaxrl_llm.estimators.types import AdvantageTransform, Running
from jaxrl_llm.estimators.values import (
  branches,
  branches_with_critic,
  critic,
)
from jaxrl_llm.estimators.weighted_trees import TreeBaseline, weighted_tree
from jaxrl_llm.estimators.weights import sequence_sum, token_mean


def ppo(
  clip: float = 0.2,
  lam: float = 0.95,
  kl: float | Running = 0.0,
  value_coefficient: float = 0.5,
  value_clip: float = 0.2,
  dual_clip: float | None = None,
) -> Estimator:
  """Proximal Policy Optimization with a critic and generalised advantages.

    L = 1/ΣT Σᵢ Σₜ [− min(ρᵢₜ Aᵢₜ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢₜ) + c/2 (V − V̂)²]
    A = whiten(GAE(1, λ)),   V̂ = V_old + GAE(1, λ),   r = R at the end − β k1

  γ is 1, because the reward is for the whole response.

  Bias: as good as the critic; `whiten` and `token_mean` as their lines say.

  Args:
    clip: ε.
    lam: λ.
    kl: β, in units of the reward per nat, or `adaptive_kl`.
    value_coefficient: c.
    value_clip: maximum change of the critic, in units of the reward.
    dual_clip: the largest ratio for a negative advantage.

  References:
    Schulman et al., `Proximal Policy Optimization Algorithms
    <https://arxiv.org/abs/1707.06347>`_, 2017
  """
  reward = _reward(kl)
  return estimator(
    chain(reward, gae(1.0, lam, critic()), whiten()),
    add(
      clipped(clip, dual=dual_clip), value_error(value_coefficient, value_clip)
    ),
    token_mean(),
    value_target=chain(reward, lambda_return(1.0, lam)),
  )


def vapo(
  alpha: float = 0.05,
  clip: float = 0.2,
  clip_high: float = 0.28,
  value_coefficient: float = 0.5,
  value_clip: float = 0.5,
) -> Estimator:
  """PPO with λ = 1 for the critic and a λ by length for the policy.

    A = whiten(GAE(1, 1 − 1/(α T))),   V̂ = R

  The rest of the paper's recipe (value pretraining, likelihood of right
  responses) is not part of the estimator; `whiten` and the clipping of values
  are those of `ppo`.

  Bias: as `ppo`, and `length_adaptive` tilts even with an exact critic.

  Args:
    alpha: α, in 1/tokens.
    clip: ε_low.
    clip_high: ε_high.
    value_coefficient, value_clip: as in `ppo`.

  References:
    Yue et al., `VAPO <https://arxiv.org/abs/2504.05118>`_, 2025
  """
  return estimator(
    chain(
      at_last_token(), gae(1.0, length_adaptive(alpha), critic()), whiten()
    ),
    add(clipped(clip, clip_high), value_error(value_coefficient, value_clip)),
    token_mean(),
    value_target=chain(at_last_token(), lambda_return(1.0, 1.0)),
  )


def vine_ppo(
  delimiters: tuple[int, ...],
  count: int = 8,
  samples: int = 9,
  clip: float = 0.2,
  kl: float = 1e-4,
) -> Estimator:
  """VinePPO: Monte Carlo values at the ends of reasoning steps.

    L = − 1/ΣT Σᵢ Σₜ [min(ρᵢₜ Aᵢₜ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢₜ) − β k3ᵢₜ]
    Aᵢₜ = whiten(V̂_b − V̂_a)   for t in the step (a, b]

  V̂ is the mean of K continuations, and at the prompt the siblings' mean.

  Bias: none but what `whiten`, `token_mean` and the KL's gradient add.

  Args:
    delimiters: token ids that end a step.
    count: maximum number of steps, our addition: the tail is one last step.
    samples: K.
    clip: ε.
    kl: β, in units of the advantage per nat.  At 0 no reference is needed.

  References:
    Kazemnejad et al., `VinePPO <https://arxiv.org/abs/2410.01679>`_, 2024
  """
  penalty = (kl_penalty(kl),) if kl else ()
  values = branches(count, samples, delimiter(*delimiters))
  return estimator(
    chain(at_last_token(), gae(1.0, 0.0, values), whiten()),
    add(clipped(clip), *penalty),
    token_mean(),
  )


def trepo(
  count: int = 4,
  samples: int = 4,
  positions: Positions | None = None,
  fill: Fill = hold,
  clip: float = 0.2,
  score_weighted: bool = False,
  kl: float | Running = 0.0,
) -> Estimator:
  """Token-level advantages from Monte Carlo branches, without a critic.

    L = − 1/N Σᵢ Σₜ min(ρᵢₜ Aᵢₜ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢₜ)
    Aᵢₜ = V̂_b − V̂_a   for a < t ≤ b,   V̂_T = Rᵢ

  V̂ at a position is the mean reward of K fresh continuations from there, at
  the prompt that of the siblings.  The authors interpolate between positions
  and leave open how: `interpolate_advantages` with `pairs(uniform())` is the
  most literal reading.  They call VinePPO the same algorithm: by its equation
  the advantage is that of a whole segment, `hold`, which is exact.

  Bias: none with `hold`; the interpolations tilt.

  Args:
    count: maximum number of positions per response.
    samples: K.
    positions: a rule of `positions`; if None `uniform()`, in `pairs` where the
      advantages are interpolated.
    fill: `hold`, `interpolate_values` or `interpolate_advantages`.
    clip: ε.
    score_weighted: baselines weighted by the continuations' squared scores.
    kl: β, in units of the reward per nat, or `adaptive_kl`, for the responses
      and their branches.

  References:
    He et al., `Response-Level Rewards Are All You Need
    <https://arxiv.org/abs/2506.02553>`_, 2025
  """
  if positions is None:
    positions = uniform()
    if fill is interpolate_advantages:
      positions = pairs(positions)
  values = branches(count, samples, positions, score_weighted)
  return estimator(
    chain(_reward(kl), gae(1.0, 0.0, values, fill)),
    clipped(clip),
    sequence_sum(),
  )


def trepo_tree(
  count: int = 4,
  samples: int = 4,
  positions: Positions | None = None,
  clip: float = 0.2,
  kl: float | Running = 0.0,
  mix: float | Running = 1.0,
) -> Estimator:
  """TRePO that also trains on its branches.

    L = − 1/N Σ_rows Σₜ sₜ min(ρₜ Aₜ, clip(ρₜ, 1−ε, 1+ε) Aₜ)
    Aₜ = V(c) − mean of V of the other continuations

  c is the continuation that contains token t, from the last fork before it.  V
  of a fork is the mean of its continuations, and the share s has a factor
  1/(K+1) for each fork before the token.  N counts whole responses.

  Bias: none.

  Args:
    count, samples, clip, kl: as in `trepo`.
    positions: a rule of `positions`; `uniform()` if None.
    mix: share of the siblings in the baseline behind a fork, a constant or
      `tree_mix`; the rest are the prompt's other responses.

  References:
    He et al., `Response-Level Rewards Are All You Need
    <https://arxiv.org/abs/2506.02553>`_, 2025
  """
  kl_part = (subtract_response_kl(kl),) if kl else ()
  return estimator(
    chain(*kl_part, tree(count, samples, positions or uniform(), mix)),
    clipped(clip),
    sequence_sum(),
  )


def trepo_weighted(
  tau: float | Callable = 1 / 8,
  at_most: int | None = None,
  baseline: TreeBaseline | None = None,
  clip: float | None = None,
  kl: float | Running = 0.0,
) -> Estimator:
  """TRePO on weighted prefix trees: every prefix once, no critic.

    L = − 1/N Σ_nodes w(s,a) ℓ(s,a),   ℓ = A log π(a|s) or its clipped form
    A = Q̂(s,a) − b(s),   Q̂(s,a) = Σ_{leaves below (s,a)} w R / w(s,a)

  A child of weight v = w(s) π(a|s) is kept if v ≥ τ, with that weight; of the
  others systematic sampling keeps an expected v/τ, with weight τ.  N counts
  trees.  The tree and its weights are ours; a per-token advantage by Monte
  Carlo, with the memory of GRPO, is the paper's.

  Bias: none with one update per batch.

  Args:
    tau: τ, a number in (0, 1] or a function of `thresholds.Standing`.
    at_most: M, the largest number of responses of a tree; ⌈1/τ⌉ if None.
    baseline: b, of `weighted_trees`; none if None.
    clip: ε; None does not clip, for one update per batch.
    kl: β, in units of the reward per nat, or `adaptive_kl`.

  References:
    He et al., `Response-Level Rewards Are All You Need
    <https://arxiv.org/abs/2506.02553>`_, 2025
    Fearnhead and Clifford, `On-line inference for hidden Markov models via
    particle filters <https://doi.org/10.1111/1467-9868.00421>`_, 2003: the
    threshold and the systematic draw
  """
  if at_most is None:
    if callable(tau):
      raise ValueError('at_most has to be given where tau is a function')
    at_most = math.ceil(1 / tau)
  kl_part = (subtract_response_kl(kl),) if kl else ()
  return estimator(
    chain(*kl_part, weighted_tree(Threshold(tau, at_most), baseline)),
    score_function() if clip is None else clipped(clip),
    sequence_sum(),
  )


def trepo_critic(
  count: int = 1,
  samples: int = 4,
  positions: Positions | None = None,
  clip: float = 0.2,
  kl: float | Running = 0.0,
  value_coefficient: float = 0.5,
  value_clip: float | None = None,
) -> Estimator:
  """Few branches, with baselines from a critic that is trained on them.

    L = 1/N Σᵢ Σₜ [− min(ρᵢₜ Aᵢₜ, clip(ρᵢₜ, 1−ε, 1+ε) Aᵢₜ) + c/2 (Vφ − V̂)²]
    Aᵢₜ = V̂_b − Vφ(sₜ)   for a < t ≤ b,   V̂_T = Rᵢ

  V̂ at a position is the mean of K fresh continuations; Vφ(sₜ), of the state
  before the token, is fitted to V̂ of the next position, or to R, without
  bootstrapping.

  Bias: none for the policy, whatever the critic says.

  Args:
    count, samples, clip, kl: as in `trepo`.
    positions: a rule of `positions`; `uniform()` if None.
    value_coefficient: c.
    value_clip: as in `ppo`; None does not clip.

  References:
    He et al., `Response-Level Rewards Are All You Need
    <https://arxiv.org/abs/2506.02553>`_, 2025
  """
  values = branches_with_critic(count, samples, positions or uniform())
  reward = _reward(kl)
  return estimator(
    chain(reward, gae(1.0, 0.0, values)),
    add(clipped(clip), value_error(value_coefficient, value_clip)),
    sequence_sum(),
    value_target=chain(reward, monte_carlo_return(values)),
  )


def _reward(kl: float | Running) -> AdvantageTransform:
  """Puts the reward on the last token and subtracts every token's KL."""
  kl_part = (subtract_token_kl(kl),) if kl else ()
  return chain(at_last_token(), *kl_part)
