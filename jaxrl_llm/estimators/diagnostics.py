"""Pure metrics of a batch and of the model's outputs for it.

Names follow TRL's vocabulary.
"""

from collections.abc import Callable

import jax.numpy as jnp

from jaxrl_llm.estimators.baselines import group_mean, partner, varies
from jaxrl_llm.estimators.preferences import last_value, sequence_log_ratio
from jaxrl_llm.estimators.ratios import token_ratio
from jaxrl_llm.estimators.token_losses import k1, k3, value_error
from jaxrl_llm.estimators.trees import whole_responses
from jaxrl_llm.estimators.types import (
  Array,
  Batch,
  Outputs,
  Ratio,
  Rollouts,
  valid_responses,
)
from jaxrl_llm.estimators.weighted_trees import leaf_weights

Diagnostic = Callable[[Outputs, Batch], Array]


def per_token(
  clip_low: float | None = None,
  clip_high: float | None = None,
  ratio: Ratio | None = None,
) -> dict[str, Diagnostic]:
  """Diagnostics with one value per token, to be averaged over the mask.

  Each maps (outputs, batch) to [P, G, T]:
    entropy: of the next-token distribution, nats.
    approx_kl: k3 of KL(π_old‖π), from the policy that sampled, nats.
    clip_ratio/low, clip_ratio/high: whether clipping cuts the surrogate's
      gradient, if the estimator clips (a dual clip does not count).

  Args:
    clip_low: ε below, None if the estimator does not clip.
    clip_high: ε above; `clip_low` if None.
    ratio: the ratio that the estimator clips; `token_ratio` if None.
  """
  ratio = ratio or token_ratio
  diagnostics = {
    'entropy': lambda outputs, batch: outputs.entropy,
    # Tokens come from the policy that sampled, so that one comes first.
    'approx_kl': lambda outputs, batch: k3(batch.log_probs, outputs.log_probs),
  }
  if clip_low is not None:
    high = clip_low if clip_high is None else clip_high
    diagnostics['clip_ratio/low'] = lambda outputs, batch: (
      (ratio(outputs, batch) < 1.0 - clip_low) & (batch.advantages < 0)
    )
    diagnostics['clip_ratio/high'] = lambda outputs, batch: (
      (ratio(outputs, batch) > 1.0 + high) & (batch.advantages > 0)
    )
  return diagnostics


def preference_statistics() -> dict[str, Diagnostic]:
  """Diagnostics of pairs, [P, G, 1], to be averaged over the responses.

  preference/margin: h, the log-ratios' difference within the pair, nats.
  preference/accuracy: whether it is above 0; a half at 0, where training
    starts from the reference.
  preference/chosen, preference/rejected: log π/π_ref of the preferred and of
    the other response, nats.
  """

  def of_pair(preferred: bool) -> Diagnostic:
    def ratio(outputs: Outputs, batch: Batch) -> Array:
      log_ratio = sequence_log_ratio(outputs, batch)
      mine = (batch.advantages > 0) == preferred
      return jnp.where(mine, log_ratio, partner(log_ratio))

    return ratio

  chosen, rejected = of_pair(True), of_pair(False)

  def margin(outputs: Outputs, batch: Batch) -> Array:
    return chosen(outputs, batch) - rejected(outputs, batch)

  return {
    'preference/margin': margin,
    'preference/accuracy': lambda outputs, batch: (
      0.5 * (1.0 + jnp.sign(margin(outputs, batch)))
    ),
    'preference/chosen': chosen,
    'preference/rejected': rejected,
  }


def score_statistics() -> dict[str, Diagnostic]:
  """Diagnostics of a reward model's pairs, [P, G, 1], as for preferences.

  score/margin: s⁺ − s⁻, nats.
  score/accuracy: whether it is above 0; a half where it is 0.
  """

  def margin(outputs: Outputs, batch: Batch) -> Array:
    score = last_value(outputs.values, batch.mask)
    return batch.advantages * (score - partner(score))

  return {
    'score/margin': margin,
    'score/accuracy': lambda outputs, batch: (
      0.5 * (1.0 + jnp.sign(margin(outputs, batch)))
    ),
  }


def critic_per_token(clip: float | None = None) -> dict[str, Diagnostic]:
  """Diagnostics of a critic, in the form of `per_token`.

    critic/value_mean: V, in units of the reward.
    critic/value_loss: half the squared error in the loss, before its
      coefficient.
    critic/clip_ratio: whether clipping cuts V's gradient, if the loss clips.

  Args:
    clip: maximum change of V in the loss, in units of the reward; None if it
      does not clip.
  """
  error = value_error(1.0, clip).apply
  diagnostics = {
    'critic/value_mean': lambda outputs, batch: outputs.values,
    'critic/value_loss': error,
  }
  if clip is not None:
    free = value_error(1.0).apply
    diagnostics['critic/clip_ratio'] = lambda outputs, batch: (
      error(outputs, batch) > free(outputs, batch)
    )
  return diagnostics


def explained_variance(batch: Batch) -> Array:
  """Returns the explained variance of a critic's targets at sampling time.

    1 − Var(V̂ − V) / Var(V̂)   over the tokens of valid responses

  1 is perfect, a constant gets 0, and less is worse than a constant.
  Bootstrapped targets flatter the critic, because they contain its values: pass
  a batch prepared with λ = 1, whose V̂ is the shaped reward to go.

  Args:
    batch: with `values` and `value_targets`.

  Returns:
    A scalar; NaN if the targets do not vary beyond rounding.
  """
  where = batch.mask & batch.valid
  count = jnp.maximum(where.sum(), 1)
  mean = lambda x: jnp.where(where, x, 0.0).sum() / count
  variance = lambda x: mean(jnp.square(x - mean(x)))
  targets, values = batch.value_targets, batch.values
  whole, rest = variance(targets), variance(targets - values)
  size = mean(jnp.square(targets) + jnp.square(values))
  known = whole > 1e-10 * size
  return jnp.where(known, 1.0 - rest / jnp.where(known, whole, 1.0), jnp.nan)


def reference_kl(outputs: Outputs, batch: Batch) -> Array:
  """Returns log π − log π_ref, [P, G, T] nats, whose mean is the KL."""
  return k1(outputs.log_probs, batch.ref_log_probs)


def log_prob_difference(outputs: Outputs, batch: Batch) -> Array:
  """Returns |log π_trainer − log π_sampler|, [P, G, T] nats.

  It is only rounding error while the parameters are those that sampled.
  """
  sampler = batch.sampler_log_probs
  sampler = batch.log_probs if sampler is None else sampler
  return jnp.abs(outputs.log_probs - sampler)


def effective_sample_size(log_ratios: Array, where: Array) -> Array:
  """Returns the effective number of equally weighted samples.

    ESS = (Σ w)² / Σ w²,   w = exp(log ratio)

  Args:
    log_ratios: of importance weights, any shape, nats; whole responses' are
      sums over their tokens.
    where: bool, the same shape, True for the entries that count.

  Returns:
    A scalar between 1 and the number of entries; 0 where none counts.
  """
  log_ratios = jnp.where(where, log_ratios, -jnp.inf)
  highest = log_ratios.max()
  # Relative to the largest weight nothing overflows.
  highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
  weights = jnp.exp(log_ratios - highest)
  squares = jnp.square(weights).sum()
  return jnp.square(weights.sum()) / jnp.where(squares > 0, squares, 1.0)


def sampler_statistics(rollouts: Rollouts) -> dict[str, Array]:
  """Scalars of a sampler whose log-probabilities differ from the trainer's.

  sampler/effective_samples: `effective_sample_size` of whole responses, as a
    share of the valid ones.
  sampler/kl: mean of log π_sampler − log π over tokens, nats.
  """
  valid = valid_responses(rollouts)
  mask = rollouts.mask & valid
  ratios = rollouts.log_probs - rollouts.sampler_log_probs
  ratios = jnp.where(mask, ratios, 0.0)
  size = effective_sample_size(ratios.sum(axis=2, keepdims=True), valid)
  return {
    'sampler/effective_samples': size / jnp.maximum(valid.sum(), 1),
    'sampler/kl': -ratios.sum() / jnp.maximum(mask.sum(), 1),
  }


def group_statistics(rollouts: Rollouts) -> dict[str, Array]:
  """Scalars of the rewards; only `reward` with one response per prompt.

  Each is NaN, not 0, without any data.

  reward: mean over valid responses.
  reward_std: deviation within a group (ddof = 1), averaged over prompts with
    at least two valid responses.
  frac_reward_zero_std: share of prompts with a valid response whose valid
    rewards are all equal, from which a group baseline learns nothing.
  """
  valid = valid_responses(rollouts)
  rewards = jnp.where(valid, rollouts.rewards, 0.0)
  if rollouts.node_weights is not None:
    return _tree_rewards(rewards, valid, rollouts)
  mean = lambda x, where: jnp.where(
    where.any(),
    jnp.where(where, x, 0).sum() / jnp.maximum(where.sum(), 1),
    jnp.nan,
  )
  metrics = {'reward': mean(rewards, valid)}
  if rewards.shape[1] == 1:
    return metrics
  count = valid.sum(axis=1, keepdims=True)
  centred = rewards - group_mean(rewards, valid)
  squares = jnp.where(valid, jnp.square(centred), 0.0)
  variance = squares.sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
  return metrics | {
    'reward_std': mean(jnp.sqrt(variance), count > 1),
    'frac_reward_zero_std': mean(~varies(rewards, valid), count > 0),
  }


def _tree_rewards(rewards, valid, rollouts: Rollouts) -> dict[str, Array]:
  """Computes the same of weighted trees, whose leaves count by weight."""
  weights = jnp.where(valid, leaf_weights(rollouts), 0.0)
  total = weights.sum(axis=1, keepdims=True)
  some = total > 0
  of_prompt = lambda x: (
    (weights * x).sum(axis=1, keepdims=True) / jnp.where(some, total, 1.0)
  )
  mean = lambda x: jnp.where(
    some.any(),
    jnp.where(some, x, 0).sum() / jnp.maximum(some.sum(), 1),
    jnp.nan,
  )
  centred = jnp.square(rewards - of_prompt(rewards))
  return {
    'reward': (weights * rewards).sum() / weights.sum(),
    'reward_std': mean(jnp.sqrt(of_prompt(centred))),
    'frac_reward_zero_std': mean(~varies(rewards, valid)),
  }


def tree_statistics(rollouts: Rollouts, finished: Array) -> dict[str, Array]:
  """Scalars of weighted trees; lengths as in `completion_statistics`.

  tree/responses: leaves per tree.
  tree/distinct: nodes as a share of all tokens of all responses.

  Args:
    rollouts: of P prompts' trees.
    finished: [P, R, 1] bool, whether the response ended with EOS.
  """
  weights, mask = leaf_weights(rollouts), rollouts.mask
  lengths = mask.sum(axis=2, keepdims=True)
  mean = lambda x: (weights * x).sum() / weights.sum()
  own = mask & (jnp.arange(mask.shape[2])[None, None] >= rollouts.forked_at)
  roots = mask.any(axis=2, keepdims=True) & whole_responses(rollouts)
  return {
    'completions/mean_length': mean(lengths),
    'completions/max_length': lengths.max(),
    'completions/clipped_ratio': mean(1.0 - finished),
    'tree/responses': mask.any(axis=2).sum() / jnp.maximum(roots.sum(), 1),
    'tree/distinct': own.sum() / jnp.maximum(mask.sum(), 1),
  }


def completion_statistics(mask: Array, finished: Array) -> dict[str, Array]:
  """Scalars of the responses' lengths, in tokens with EOS.

  completions/mean_length, completions/max_length: tokens.
  completions/clipped_ratio: share that reached the length limit without EOS.

  Args:
    mask: [P, G, T] bool.
    finished: [P, G, 1] bool, whether the response ended with EOS.
  """
  lengths = mask.sum(axis=2)
  return {
    'completions/mean_length': lengths.mean(),
    'completions/max_length': lengths.max(),
    'completions/clipped_ratio': 1.0 - finished.mean(),
  }
