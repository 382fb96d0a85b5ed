"""Forms that look like exact ones and are biased: what goes wrong, to be shown.

    est.enumeration.examine(est.estimator(
      relatives.own_token_shared(), est.score_function(), est.sequence_sum()
    ), toy, samples=3).bias

None of them trains.  Each differs in one place from an unbiased part of the
library.
"""

import jax.numpy as jnp

from jaxrl_llm.estimators.credit import gae, hold
from jaxrl_llm.estimators.positions import uniform
from jaxrl_llm.estimators.prefixes import mean_over, siblings
from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Array,
  Needs,
  Rollouts,
)
from jaxrl_llm.estimators.values import branches
from jaxrl_llm.estimators.weighted_trees import TreeBaseline, leaf_weights


def own_token_shared() -> AdvantageTransform:
  """Subtracts the mean of siblings that share token t, not only what is before.

  Bias: tilts: the baseline knows the token that it is to credit.
  """
  return _of_prefixes(lambda r, before, after, own: r - mean_over(after, r)[1])


def own_reward_inside() -> AdvantageTransform:
  """Subtracts the mean of all that share the prefix, the response included.

  Bias: tilts: by the number of those who share the prefix, token by token.
  """
  return _of_prefixes(
    lambda r, before, after, own: r - mean_over(before + own, r)[1]
  )


def value_difference() -> AdvantageTransform:
  """Credits a token with V(s′) − V(s), means over those who share a prefix.

  The temporal difference of TEMPO, without its group-relative term.

  Bias: tilts: V(s) holds the response's own reward.  In expectation it is
  `own_reward_inside`.

  References:
    Tran et al., `Exploiting Tree Structure for Credit Assignment in RL Training
    of LLMs <https://arxiv.org/abs/2509.18314>`_, 2025
  """
  return _of_prefixes(
    lambda r, before, after, own: (
      mean_over(after + own, r)[1] - mean_over(before + own, r)[1]
    )
  )


def cut_before_unlikely(
  count: int, samples: int, probability: float = 0.9
) -> AdvantageTransform:
  """Cuts before each token whose own sampled probability is below a bound.

  SPO's segments, valued by branches as `hold` does.  A cut before tokens whose
  distribution has no entry above the bound would be a stopping time.

  Bias: tilts: whether the segment begins at a token depends on the token.

  References:
    Guo et al., `Segment Policy Optimization
    <https://arxiv.org/abs/2505.23564>`_, 2025
  """
  exact = gae(1.0, 0.0, branches(count, samples, uniform()), hold)

  def apply(rewards: Array, rollouts: Rollouts) -> Array:
    unlikely = rollouts.log_probs < jnp.log(probability)
    first = jnp.arange(unlikely.shape[2])[None, None] == 0
    cut = rollouts.branch_mask & (unlikely | first)
    return exact.apply(rewards, rollouts.replace(branch_mask=cut))

  return exact._replace(apply=apply)


def cousins() -> TreeBaseline:
  """The mean of a weighted tree's other leaves.

  Bias: tilts: one uniform number draws all tokens of a depth, so that other
  branches of the tree know the token.
  """

  def apply(rewards: Array, rollouts: Rollouts) -> Array:
    own = leaf_weights(rollouts) * jnp.where(rollouts.valid, rewards, 0.0)
    others = own.sum(axis=1, keepdims=True) - own
    return jnp.broadcast_to(others, rollouts.mask.shape)

  return TreeBaseline(apply)


def _of_prefixes(advantage) -> AdvantageTransform:
  """Builds a transform from those who share a token's prefix, and the token."""

  def apply(rewards: Array, rollouts: Rollouts) -> Array:
    before, after = siblings(rollouts)
    own = jnp.eye(rewards.shape[1])[None, :, :, None]
    advantages = advantage(rewards, before, after, own)
    return jnp.where(rollouts.mask, advantages, 0.0)

  return AdvantageTransform(
    apply,
    Needs(samples=2),
    takes='response',
    gives='token advantage',
    centres=True,
  )
