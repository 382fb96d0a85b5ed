"""Train state and the jitted update.

An update scans over micro-batches, sums their gradients, which add up exactly
because losses are plain sums, and takes one optax step.
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
  """What an update changes.

  Attributes:
    trainable: {'policy': parameters}, and with a critic {'critic': parameters}
      beside them.
    opt_state: optax state of `trainable`.
    updates: int32, optimiser steps taken.
    skipped: int32, non-finite updates skipped since the last finite one.
    running: {name: scalar}, the estimator's numbers that outlive a batch; the
      loop changes them, once per batch.
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
  """A state that has taken no update; on a mesh it lives where training is."""

  @jax.jit
  def rest(trainable, running):
    made = {
      'opt_state': optimizer.init(trainable),
      'updates': jnp.int32(0),
      'skipped': jnp.int32(0),
      'running': running,
    }
    return sharding.constrain_params(made)

  return TrainState(trainable=trainable, **rest(trainable, running or {}))


def schedule(
  learning_rate: float,
  total_updates: int,
  warmup_updates: int = 0,
  decay: str = 'constant',
) -> optax.Schedule:
  """Linear warm-up, then a constant, linear or cosine course.

  Args:
    learning_rate: the highest one.
    total_updates: where a decay reaches 0; 0 where there is to be no update.
    warmup_updates: updates in which the rate rises from 0, fewer than all.
    decay: 'constant', 'linear' or 'cosine'.

  Raises:
    UserError: for another `decay`, or a warm-up that takes all updates.
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
  # The first update already moves: the rate at update 0 is not 0.
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
  """AdamW behind clipping of the gradient's global norm.

  Args:
    learning_rate: a rate or a schedule of the number of updates.
    b1, b2, eps: Adam's.
    weight_decay: decoupled; matrices decay, norms and biases do not.
    max_grad_norm: the largest global norm; None does not clip.
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
    seen: int32, updates it was asked for, up to those that it leaves out.
    inner: state of the optimiser.
  """

  seen: Array
  inner: Any


def delayed(
  optimizer: optax.GradientTransformation, updates: int
) -> optax.GradientTransformation:
  """An optimiser that leaves out its first updates.

  Parameters and its own state stay as they are until then, bit for bit, so
  that its schedule begins when it does.

  Args:
    optimizer: what begins later.
    updates: how many are left out.
  """

  def init(params: Any) -> DelayedState:
    return DelayedState(seen=jnp.int32(0), inner=optimizer.init(params))

  def update(gradients: Any, state: DelayedState, params: Any = None):
    begun = state.seen >= updates
    changes, inner = optimizer.update(gradients, state.inner, params)
    # x + −0 is x also where x is −0.
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
  """An optimiser of its own for each part of `TrainState.trainable`.

  Each clips, schedules and decays by itself: the size of one part's gradient
  changes nothing for another.

  Args:
    **optimizers: by the part's name, such as policy=…, critic=….
  """
  return optax.partition(optimizers, {name: name for name in optimizers})


def policy_forward(
  config: ModelConfig, decoding: policy.Decoding, chunk: int = 256
) -> Forward:
  """The forward pass of a policy without a critic.

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
  """The forward pass of a policy and its critic; the policy is read once.

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

  An update whose loss or gradient is not finite is skipped: parameters and
  optimiser state stay as they are, bit for bit, and `state.skipped` grows.

  Args:
    forward: gives the loss's inputs from the parameters.
    estimator: the loss.
    optimizer: optax transformation of `trainable`.
    micro_prompts: prompts, each with all its responses, per micro-batch.
    per_token: metrics to average over the minibatch's tokens.
    per_response: metrics, [P, G, 1], to average over its valid responses.

  Returns:
    update(state, frozen, prompts, batch) → (state, metrics).  `state` is
    donated.  metrics holds scalars: `loss`, `skipped`, the policy's
    `grad_norm` (and another part's, as `critic/grad_norm`), the means of
    `per_token` and `per_response`, and the mean and maximum of
    `log_prob_difference`.
  """
  per_token, per_response = dict(per_token or {}), dict(per_response or {})
  per_token['log_prob_difference/mean'] = diagnostics.log_prob_difference

  def loss_fn(trainable, frozen, prompts, batch):
    outputs = forward(trainable, frozen, prompts, batch)
    mask = batch.mask & batch.valid
    sums = {
      name: jnp.where(mask, metric(outputs, batch), 0.0).sum()
      for name, metric in per_token.items()
    }
    sums |= {
      name: jnp.where(batch.valid, metric(outputs, batch), 0.0).sum()
      for name, metric in per_response.items()
    }
    difference = diagnostics.log_prob_difference(outputs, batch)
    highest = jnp.where(mask, difference, 0.0).max()
    return estimator.loss(outputs, batch), (sums, highest)

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
    # Sums of bfloat16 gradients would depend on how they were split.
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
      state.trainable,
    )
    zeros = sharding.constrain_params(zeros)
    gradients, (losses, (sums, highest)) = jax.lax.scan(micro, zeros, parts)
    gradients = jax.tree.map(
      lambda gradient, x: gradient.astype(x.dtype), gradients, state.trainable
    )
    tokens = jnp.maximum((batch.mask & batch.valid).sum(), 1)
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
  """True for kernels and embeddings, by name: stacked norms are 2-D too."""

  def is_matrix(path, leaf) -> bool:
    del leaf
    return path[-1].key in ('kernel', 'embedding')

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def mean_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the numbers of a step's updates: means over them, except for two.

  The log-probability difference is that of the first update, whose parameters
  are those that sampled; `skipped` is the longest run of skips.

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
