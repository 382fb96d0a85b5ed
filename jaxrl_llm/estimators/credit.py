"""Turns a response's reward into advantages of its tokens.

One `gae` over the segments between known `values` serves PPO, VinePPO and
TRePO.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.estimators.advantages import current, running_part, token_kl
from jaxrl_llm.estimators.baselines import varies
from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Needs,
  Rollouts,
  Running,
  valid_responses,
)
from jaxrl_llm.estimators.values import Known, Values, critic

# Maps advantages at known states, [P, G, T], `where` they are known and the
# mask to advantages of all tokens.
Fill = Callable[[Array, Array, Array], Array]
# λ, which may depend on the responses' lengths, [P, G, 1] tokens.
Lambda = float | Callable[[Array], Array]


def at_last_token() -> AdvantageTransform:
  """Puts a response's reward on its last token, 0 elsewhere.

  Level: [P, G, 1] → token, [P, G, T].
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    mask = rollouts.mask
    last = jnp.arange(mask.shape[2])[None, None] == _end(mask) - 1
    return jnp.where(mask & last, advantages, 0.0)

  return AdvantageTransform(apply, takes='response', gives='token reward')


def at_every_token() -> AdvantageTransform:
  """Assigns to every token its response's advantage, to average over tokens.

  Level: [P, G, 1] → token, [P, G, T].
  Bias: none.
  """
  return AdvantageTransform(
    lambda advantages, rollouts: jnp.where(rollouts.mask, advantages, 0.0),
    takes='response',
    gives='token advantage',
    centres=True,
  )


def add_token_rewards() -> AdvantageTransform:
  """Adds known token rewards to the flowing ones.

  Level: token, [P, G, T] → [P, G, T].
  Bias: none for the sum of both rewards.
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    return advantages + jnp.where(rollouts.mask, rollouts.token_rewards, 0.0)

  return AdvantageTransform(
    apply, Needs(token_rewards=True), takes='token reward'
  )


def subtract_token_kl(coefficient: float | Running) -> AdvantageTransform:
  """Subtracts from each token its log-ratio to the reference policy.

    rᵢₜ ← rᵢₜ − β (log πᵢₜ − log π_refᵢₜ)

  k1 inside the reward, for transforms that sum rewards to go.

  Level: token, [P, G, T] → [P, G, T].
  Bias: none for the objective E[R] − β KL(π‖π_ref) of whole responses.

  Args:
    coefficient: β, in units of the reward per nat, or `adaptive_kl`.
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    return advantages - current(coefficient, rollouts) * token_kl(rollouts)

  needs = Needs(reference=True, running=running_part(coefficient))
  return AdvantageTransform(apply, needs, takes='token reward')


def reward_to_go(gamma: float = 1.0) -> AdvantageTransform:
  """Sums the rewards of a token and all later ones.

    Aₜ = Σ_{s≥t} γ^{s−t} rₛ

  Level: token, [P, G, T] → [P, G, T].
  Bias: none at γ = 1.  A terminal reward with γ < 1 is a silent pressure
  towards short responses.
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    nothing = jnp.zeros_like(advantages)
    known = Known(nothing, nothing, jnp.zeros_like(rollouts.mask))
    return _scan(advantages, known, rollouts.mask, gamma, 0.0)

  return AdvantageTransform(
    apply, takes='token reward', gives='token advantage', centres=True
  )


def gae(
  gamma: float,
  lam: Lambda,
  values: Values,
  fill: Fill | None = None,
) -> AdvantageTransform:
  """Generalised advantage estimation over segments between known values.

    δₖ = Σ_{t in segment k} γ^… rₜ + γ^{length} Vₖ₊₁ − Vₖ
    Aₖ = δₖ + λ γ^{length} Aₖ₊₁,   V after the last token = 0

  With a value at every token these are the textbook formulas, λ γ per token.
  Segments end where a value replaces the rewards to go; a state with only a
  baseline gets an advantage against it that extends to the next such value.
  λ passes on advantages against values, even where a state's own is against
  another baseline: their mean, given the prefix, is 0.

  Level: token, [P, G, T] → [P, G, T].
  Bias: as good as the values; none at γ = 1 with `hold` where they are
  unbiased (branches, an exact critic), or at γ = λ = 1 with any critic.  A λ
  that knows the response's length tilts even with exact values.

  Args:
    gamma: γ; must be 1 with branches or a reward for the whole response.
    lam: λ, a number or a function of the lengths, [P, G, 1] tokens.
    values: `critic()`, `branches(…)` or `branches_with_critic(…)`.
    fill: assigns advantages between known states; `hold` if None.

  References:
    Schulman et al., `High-Dimensional Continuous Control Using Generalized
    Advantage Estimation <https://arxiv.org/abs/1506.02438>`_, 2015
  """
  if gamma != 1 and values.needs.branches is not None:
    raise ValueError(
      f'{gamma=}: branches value states by the undiscounted reward of whole '
      'responses: γ has to be 1'
    )
  if not 0 <= gamma <= 1 or not (callable(lam) or 0 <= lam <= 1):
    raise ValueError(f'{gamma=} and {lam=} have to be between 0 and 1')
  fill = fill or hold

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    known = values.apply(advantages, rollouts)
    lengths = rollouts.mask.sum(axis=2, keepdims=True)
    factor = lam(lengths) if callable(lam) else lam
    estimates = _scan(advantages, known, rollouts.mask, gamma, factor)
    return fill(estimates, known.where & rollouts.mask, rollouts.mask)

  return AdvantageTransform(
    apply,
    values.needs,
    takes='token reward',
    gives='token advantage',
    centres=True,
    takes_reward=True,
  )


def lambda_return(gamma: float, lam: Lambda) -> AdvantageTransform:
  """Computes the targets of a critic: its values plus `gae`.

  Level: token, [P, G, T] → [P, G, T].
  """
  advantage = gae(gamma, lam, critic())

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    return advantage.apply(advantages, rollouts) + rollouts.values

  return advantage._replace(apply=apply)


def monte_carlo_return(values: Values) -> AdvantageTransform:
  """Computes the targets of a critic from branches.

    targetₜ = V of the first state with branches at or after t, else R to go,
      and the rewards of the tokens before that state

  Its mean is the state's value: nothing is bootstrapped from the critic.

  Level: token, [P, G, T] → [P, G, T].

  Args:
    values: the source of the branches, the same as in `gae`.
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    known = values.apply(advantages, rollouts)
    fresh = (known.where if known.fresh is None else known.fresh) & (
      jnp.arange(rollouts.mask.shape[2])[None, None] > 0
    )
    nothing = jnp.zeros_like(advantages)
    nowhere = jnp.zeros_like(rollouts.mask)
    known = Known(known.values, nothing, nowhere, fresh)
    to_go = _scan(advantages, known, rollouts.mask, 1.0, 0.0)
    return jnp.where(fresh & rollouts.mask, known.values, to_go)

  return AdvantageTransform(
    apply,
    values.needs,
    takes='token reward',
    gives='token advantage',
    centres=True,
    takes_reward=True,
  )


def length_adaptive(alpha: float) -> Lambda:
  """λ = 1 − 1/(α T), at least 0; approaches 1 for long responses.

  Bias: the response's own length is in its weights: tilts, if only a little
  where the values are exact.

  References:
    Yue et al., `VAPO <https://arxiv.org/abs/2504.05118>`_, 2025
  """
  return lambda lengths: jnp.clip(
    1.0 - 1.0 / (alpha * jnp.maximum(lengths, 1)), 0.0, 1.0
  )


def hold(advantages: Array, where: Array, mask: Array) -> Array:
  """Assigns to every token of a segment the segment's advantage.

    Aₜ = V_b − V_a   for a < t ≤ b

  A segment is one macro action, so the gradient is exact if its ends are
  stopping times.
  """
  start, _ = _segment(where, mask)
  held = jnp.take_along_axis(advantages, jnp.maximum(start, 0), axis=2)
  return jnp.where(mask, held, 0.0)


def interpolate_values(advantages: Array, where: Array, mask: Array) -> Array:
  """Interpolates values linearly: Aₜ = (V_b − V_a) / (b − a).

  For λ = 0 and γ = 1.

  Bias: tilts; with one segment, the 1/length of a sequence mean.
  """
  start, end = _segment(where, mask)
  return hold(advantages, where, mask) / jnp.maximum(end - start, 1)


def interpolate_advantages(
  advantages: Array, where: Array, mask: Array
) -> Array:
  """Interpolates advantages linearly between exactly known ones.

  They are exact where a segment is one token long (`positions.pairs`), and
  constant beyond the outermost; a response without any gets `hold`.

  Bias: tilts; TRePO as its authors' words read.
  """
  start, end = _segment(where, mask)
  exact = where & (end - start == 1)
  time = jnp.broadcast_to(jnp.arange(mask.shape[2]), mask.shape)
  before = jax.lax.cummax(jnp.where(exact, time, -1), axis=2)
  size = mask.shape[2]
  after = jax.lax.cummin(jnp.where(exact, time, size), axis=2, reverse=True)
  left = jnp.where(before < 0, after, before)
  right = jnp.where(after >= size, before, after)
  pick = lambda i: jnp.take_along_axis(
    advantages, jnp.clip(i, 0, size - 1), axis=2
  )
  share = (time - left) / jnp.maximum(right - left, 1)
  line = pick(left) + share * (pick(right) - pick(left))
  some = exact.any(axis=2, keepdims=True)
  line = jnp.where(some, line, hold(advantages, where, mask))
  return jnp.where(mask, line, 0.0)


def whiten(epsilon: float = 1e-8) -> AdvantageTransform:
  """Centres over the whole batch and divides by the deviation.

    A ← (A − mean A) / √(var A + ε)

  Both moments are over tokens if the array is per token, else over responses.
  The variance has N in its denominator; TRL has N − 1.  A batch of equal
  advantages yields exactly 0.

  Level: either.
  Bias: both moments contain the response itself.  Over responses with binary
  rewards that is a scale per prompt; otherwise, and over tokens, it tilts.

  References:
    Hu et al., `REINFORCE++ <https://arxiv.org/abs/2501.03262>`_, 2025
  """

  def apply(advantages: Array, rollouts: Rollouts) -> Array:
    valid = valid_responses(rollouts)
    per_token = advantages.shape == rollouts.mask.shape
    kept = valid & rollouts.mask if per_token else valid
    count = jnp.maximum(kept.sum(keepdims=True), 1)
    mean = jnp.where(kept, advantages, 0.0).sum(keepdims=True) / count
    squares = jnp.where(kept, jnp.square(advantages - mean), 0.0)
    variance = squares.sum(keepdims=True) / count
    whitened = (advantages - mean) * jax.lax.rsqrt(variance + epsilon)
    kept &= varies(advantages, kept, axis=None)
    return jnp.where(kept, whitened, 0.0)

  return AdvantageTransform(apply, centres=True)


def _segment(where: Array, mask: Array) -> tuple[Array, Array]:
  """Returns each token's segment: its first index (−1: none), one past it."""
  time = jnp.broadcast_to(jnp.arange(mask.shape[2]), mask.shape)
  start = jax.lax.cummax(jnp.where(where, time, -1), axis=2)
  later = jnp.where(where, time, _end(mask))
  ends = jax.lax.cummin(later, axis=2, reverse=True)
  after = jnp.pad(
    ends[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=mask.shape[2]
  )
  return start, jnp.minimum(after, _end(mask))


def _end(mask: Array) -> Array:
  """Returns one past the policy's last token, [P, G, 1]; 0 for none.

  This is not the number of such tokens: a tool's may lie between them.
  """
  time = jnp.arange(1, mask.shape[2] + 1)[None, None]
  return jnp.where(mask, time, 0).max(axis=2, keepdims=True)


def _scan(
  rewards: Array, known: Known, mask: Array, gamma: float, lam: float | Array
) -> Array:
  """Scans from last to first token: A where known, else the return to go."""
  fresh = known.where if known.fresh is None else known.fresh
  lam = jnp.broadcast_to(lam, mask.shape[:2] + (1,))[..., 0]

  def step(carry, x):
    to_go, advantage = carry
    reward, value, baseline, where, fresh, inside = x
    to_go = jnp.where(inside, reward, 0.0) + gamma * to_go
    advantage = gamma * advantage
    here = to_go - baseline + lam * advantage
    fresh = fresh & inside
    # The part passed on to earlier tokens has mean 0, whatever the baseline.
    over = to_go - value + lam * advantage
    carry = (jnp.where(fresh, value, to_go), jnp.where(fresh, over, advantage))
    return carry, jnp.where(where & inside, here, to_go)

  by_time = lambda x: jnp.moveaxis(x, 2, 0)
  xs = (rewards, known.values, known.baselines, known.where, fresh, mask)
  zeros = jnp.zeros(mask.shape[:2], rewards.dtype)
  _, results = jax.lax.scan(
    step, (zeros, zeros), jax.tree.map(by_time, xs), reverse=True
  )
  return jnp.where(mask, jnp.moveaxis(results, 0, 2), 0.0)
