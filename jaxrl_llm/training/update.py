"""Train state and the jitted update.

An update scans over micro-batches, sums their gradients and takes one optax
step.  The sum is exact because losses are plain sums over tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import Batch, Estimator, Outputs, diagnostics
from jaxrl_llm.minibatches import split_prompts
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling import policy
from jaxrl_llm.training.critic import Critic

Array = jax.Array
# (trainable, frozen, prompts, batch) → outputs; differentiated in `trainable`.
Forward = Callable[[Any, Any, policy.Prompts, Batch], Outputs]
Update = Callable[..., tuple['TrainState', dict[str, Array]]]


@chex.dataclass(frozen=True)
class TrainState:
  """State of training: parameters, optimiser state and counters.

  Attributes:
    trainable: {'policy': parameters}, with a critic also
      {'critic': parameters}.
    opt_state: optax state of `trainable`.
    updates: int32, optimiser steps taken.
    skipped: int32, non-finite updates skipped since the last finite one.
    running: {name: scalar}, the estimator's numbers that persist across
      batches; the loop changes them once per batch.
  """

  trainable: Any
  opt_state: Any
  updates: Array
  skipped: Array
  running: dict[str, Array]


def init_state(
  trainable: Any,
  optimizer: optax.GradientTransformation,
  running: dict[str, Array] | None = None,
) -> TrainState:
  """Returns a state before the first update, sharded as for training."""

  @jax.jit
  def rest(trainable, running):
    others = {
      'opt_state': optimizer.init(trainable),
      'updates': jnp.int32(0),
      'skipped': jnp.int32(0),
      'running': running,
    }
    return sharding.constrain_params(others)

  return TrainState(trainable=trainable, **rest(trainable, running or {}))


def schedule(
  learning_rate: float,
  total_updates: int,
  warmup_updates: int = 0,
  decay: str = 'constant',
) -> optax.Schedule:
  """Builds a schedule: linear warm-up, then constant, linear or cosine.

  Args:
    learning_rate: the highest learning rate.
    total_updates: number of updates after which a decay reaches 0; 0 if there
      are no updates.
    warmup_updates: number of updates in which the rate rises from 0; less than
      `total_updates`.
    decay: 'constant', 'linear' or 'cosine'.

  Raises:
    UserError: `decay` is unknown, or the warm-up takes all updates.
  """
  if warmup_updates >= total_updates > 0:
    raise UserError(
      f'warmup_updates is {warmup_updates}, but there are only '
      f'{total_updates} updates\n'
      f'set warmup_updates to {total_updates - 1} or less, or take more steps'
    )
  remaining = max(total_updates - warmup_updates, 1)
  courses = {
    'constant': lambda: optax.constant_schedule(learning_rate),
    'linear': lambda: optax.linear_schedule(learning_rate, 0.0, remaining),
    'cosine': lambda: optax.cosine_decay_schedule(learning_rate, remaining),
  }
  if decay not in courses:
    raise UserError(f'decay is {decay!r}; choose one of {list(courses)}')
  if not warmup_updates:
    return courses[decay]()
  # The rate is positive at update 0, so that the first update has an effect.
  rise = optax.linear_schedule(
    learning_rate / warmup_updates, learning_rate, warmup_updates - 1
  )
  return optax.join_schedules([rise, courses[decay]()], [warmup_updates])


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """Builds AdamW with clipping of the gradient's global norm.

  Args:
    learning_rate: a rate or a schedule of the number of updates.
    b1, b2, eps: parameters of Adam.
    weight_decay: decoupled weight decay; applies to matrices, not to norms and
      biases.
    max_grad_norm: largest global norm; None for no clipping.
  """
  clip = (
    optax.identity()
    if max_grad_norm is None
    else optax.clip_by_global_norm(max_grad_norm)
  )
  return optax.chain(
    clip,
    optax.adamw(
      learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=_is_matrix
    ),
  )


class DelayedState(NamedTuple):
  """State of `delayed`.

  Attributes:
    seen: int32, number of updates requested, at most the number skipped.
    inner: state of the optimiser.
  """

  seen: Array
  inner: Any


def delayed(
  optimizer: optax.GradientTransformation, updates: int
) -> optax.GradientTransformation:
  """Wraps an optimiser so that it skips its first updates.

  Until then, parameters and optimiser state are unchanged, bit for bit, so that
  the schedule starts with the first update that is applied.

  Args:
    optimizer: the optimiser to delay.
    updates: number of updates to skip.
  """

  def init(params: Any) -> DelayedState:
    return DelayedState(seen=jnp.int32(0), inner=optimizer.init(params))

  def update(gradients: Any, state: DelayedState, params: Any = None):
    begun = state.seen >= updates
    changes, inner = optimizer.update(gradients, state.inner, params)
    # −0 leaves every x unchanged, including −0; +0 would not.
    changes = jax.tree.map(lambda x: jnp.where(begun, x, -0.0), changes)
    inner = jax.tree.map(
      lambda new, old: jnp.where(begun, new, old), inner, state.inner
    )
    seen = jnp.where(begun, state.seen, state.seen + 1)
    return changes, DelayedState(seen=seen, inner=inner)

  return optax.GradientTransformation(init, update)


def by_part(
  **optimizers: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Combines one optimiser for each part of `TrainState.trainable`.

  Each has its own clipping, schedule and decay: the gradient norm of one part
  does not affect another.

  Args:
    **optimizers: by the part's name, such as policy=…, critic=….
  """
  return optax.partition(optimizers, {name: name for name in optimizers})


def policy_forward(
  config: ModelConfig, decoding: policy.Decoding, chunk: int = 256
) -> Forward:
  """Builds the forward pass of a policy without a critic.

  Args:
    config: the model; `trainable['policy']` holds its parameters.
    decoding: the settings that the responses were sampled with.
    chunk: positions whose logits exist at one time.
  """

  def forward(trainable, frozen, prompts: policy.Prompts, batch: Batch):
    del frozen
    statistics = policy.score(
      config, trainable['policy'], prompts, batch.tokens, decoding, chunk
    )
    return Outputs(log_probs=statistics.log_probs, entropy=statistics.entropy)

  return forward


def actor_critic_forward(
  config: ModelConfig,
  decoding: policy.Decoding,
  critic: Critic,
  chunk: int = 256,
) -> Forward:
  """Builds the forward pass of a policy and its critic.

  The policy is evaluated once.

  Args:
    config: the policy; `trainable['policy']` holds its parameters.
    decoding: the settings that the responses were sampled with.
    critic: `trainable['critic']` holds its parameters.
    chunk: positions whose logits exist at one time.
  """

  def forward(trainable, frozen, prompts: policy.Prompts, batch: Batch):
    del frozen
    params, tokens = trainable['policy'], batch.tokens
    hidden = policy.read(config, params, prompts, tokens)
    statistics = policy.token_statistics(
      config, params, hidden, tokens, decoding, chunk
    )
    return Outputs(
      log_probs=statistics.log_probs,
      entropy=statistics.entropy,
      values=critic.values(trainable['critic'], prompts, tokens, hidden),
    )

  return forward


def make_update(
  forward: Forward,
  estimator: Estimator,
  optimizer: optax.GradientTransformation,
  micro_prompts: int,
  per_token: Mapping[str, diagnostics.Diagnostic] | None = None,
  per_response: Mapping[str, diagnostics.Diagnostic] | None = None,
) -> Update:
  """Builds the jitted update.

  An update with a non-finite loss or gradient is skipped: parameters and
  optimiser state are unchanged, bit for bit, and `state.skipped` increases.

  Args:
    forward: computes the loss's inputs from the parameters.
    estimator: estimator that defines the loss.
    optimizer: optax transformation of `trainable`.
    micro_prompts: prompts, each with all its responses, per micro-batch.
    per_token: metrics to average over the minibatch's tokens.
    per_response: metrics, [P, G, 1], to average over its valid responses.

  Returns:
    update(state, frozen, prompts, batch) → (state, metrics).  `state` is
    donated.  metrics holds scalars: `loss`, `skipped`, the policy's
    `grad_norm` (for other parts, such as `critic/grad_norm`), the means of
    `per_token` and `per_response`, and the mean and maximum of
    `log_prob_difference`.
  """
  per_token, per_response = dict(per_token or {}), dict(per_response or {})
  per_token['log_prob_difference/mean'] = diagnostics.log_prob_difference

  def loss_fn(trainable, frozen, prompts, batch):
    outputs = forward(trainable, frozen, prompts, batch)
    sums = _metric_sums(per_token, per_response, outputs, batch)
    return estimator.loss(outputs, batch), sums

  @jax.jit(donate_argnames='state')
  def update(state: TrainState, frozen, prompts, batch):
    def micro(gradients, part):
      part = sharding.constrain_rows(part)
      (loss, aux), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
        state.trainable, frozen, *part
      )
      gradient = sharding.constrain_params(gradient)
      return jax.tree.map(jnp.add, gradients, gradient), (loss, aux)

    parts = split_prompts((prompts, batch), micro_prompts)
    # Sums of bfloat16 gradients would depend on the split into parts.
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
      state.trainable,
    )
    zeros = sharding.constrain_params(zeros)
    gradients, (losses, (sums, highest)) = jax.lax.scan(micro, zeros, parts)
    gradients = jax.tree.map(
      lambda gradient, x: gradient.astype(x.dtype), gradients, state.trainable
    )
    tokens = _token_weights(batch).sum()
    tokens = jnp.where(tokens > 0, tokens, 1)
    responses = jnp.maximum(batch.valid.sum(), 1)
    metrics = {
      name: value.sum() / (responses if name in per_response else tokens)
      for name, value in sums.items()
    }
    metrics['log_prob_difference/max'] = highest.max()
    metrics['loss'] = losses.sum()
    for part, gradient in gradients.items():
      prefix = '' if part == 'policy' else f'{part}/'
      metrics[f'{prefix}grad_norm'] = optax.tree.norm(gradient)
    finite = jnp.isfinite(metrics['loss'])
    finite &= jnp.isfinite(optax.tree.norm(gradients))
    state = _apply(state, gradients, finite, optimizer)
    metrics['skipped'] = state.skipped
    return state, metrics

  return update


def _metric_sums(
  per_token: Mapping[str, diagnostics.Diagnostic],
  per_response: Mapping[str, diagnostics.Diagnostic],
  outputs: Outputs,
  batch: Batch,
) -> tuple[dict[str, Array], Array]:
  """Returns the metrics' sums and the largest log-probability difference."""
  mask, weights = batch.mask & batch.valid, _token_weights(batch)
  sums = {
    name: (weights * jnp.where(mask, metric(outputs, batch), 0.0)).sum()
    for name, metric in per_token.items()
  }
  sums |= {
    name: jnp.where(batch.valid, metric(outputs, batch), 0.0).sum()
    for name, metric in per_response.items()
  }
  difference = diagnostics.log_prob_difference(outputs, batch)
  return sums, jnp.where(mask, difference, 0.0).max()


def _token_weights(batch: Batch) -> Array:
  """Returns what tokens count in means: in trees, as in their loss."""
  mask = batch.mask & batch.valid
  return mask if batch.shares is None else jnp.where(mask, batch.shares, 0.0)


def _apply(
  state: TrainState,
  gradients: Any,
  finite: Array,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  changes, opt_state = optimizer.update(
    gradients, state.opt_state, state.trainable
  )
  trainable = optax.apply_updates(state.trainable, changes)
  trainable, opt_state = sharding.constrain_params((trainable, opt_state))

  def keep_if_not_finite(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  return TrainState(
    trainable=keep_if_not_finite(trainable, state.trainable),
    opt_state=keep_if_not_finite(opt_state, state.opt_state),
    updates=state.updates + finite,
    skipped=jnp.where(finite, 0, state.skipped + 1),
    running=state.running,
  )


def _is_matrix(params: Any) -> Any:
  """Marks kernels and embeddings, by name: stacked norms are 2-D as well."""

  def is_matrix(path, leaf) -> bool:
    del leaf
    return path[-1].key in ('kernel', 'embedding')

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def mean_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Averages the metrics of a step's updates, with two exceptions.

  The log-probability difference is that of the first update, whose parameters
  are the ones that sampled; `skipped` is the longest run of skips.

  Args:
    records: metrics of each update, on the host.
  """
  metrics = {
    name: float(np.mean([record[name] for record in records]))
    for name in records[0]
  }
  for name in records[0]:
    if name.startswith('log_prob_difference/'):
      metrics[name] = float(records[0][name])
  metrics['skipped'] = int(max(record['skipped'] for record in records))
  return metrics
