"""The training step on stored responses, as a value of pure functions.

    trainer = offline(model, est.dpo(), adamw(1e-5))
    state = trainer.init(params)
    for step in range(100):
      groups = stored.take(pool, source.indices(step))
      state, metrics = trainer.step(state, groups, source.batch(step))

Supervised learning, RestEM, preference losses and reward models share it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm import sharding
from jaxrl_llm.estimators import Estimator, diagnostics
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.rollouts import responses, stored
from jaxrl_llm.sampling.policy import Decoding
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.training import update as update_lib
from jaxrl_llm.training.update import TrainState


class OfflineTrainer(NamedTuple):
  """Training of one estimator on stored responses.

  Attributes:
    init: parameters of the policy → `TrainState`.  The parameters are copied,
      since updates donate the state.
    step: (state, groups, prompts) → (state, metrics on the host); `groups` is a
      `stored.Pool` and `prompts` the `PromptBatch` of its groups, in order.
      `state` is donated.
    make_update: micro_prompts → the jitted update.
  """

  init: Callable[[Any], TrainState]
  step: Callable[..., tuple[TrainState, dict[str, Any]]]
  make_update: Callable[[int], update_lib.Update]


def offline(
  model: ModelConfig,
  estimator: Estimator,
  optimizer: optax.GradientTransformation,
  *,
  decoding: Decoding = Decoding(),
  micro_prompts: int | None = None,
  chunk: int = 256,
  forward: update_lib.Forward | None = None,
  per_token: Mapping[str, diagnostics.Diagnostic] | None = None,
  per_response: Mapping[str, diagnostics.Diagnostic] | None = None,
) -> OfflineTrainer:
  """Builds the training step on stored responses.

  Args:
    model: configuration of the policy.
    estimator: such as `estimators.sft()` or `estimators.dpo()`; one that needs
      a reference reads `ref_log_probs` of the groups, see `score_pool`.
    optimizer: optimiser of the trained parameters.
    decoding: distribution of the likelihoods; temperature 1 by default.
    micro_prompts: groups in memory at one time; None for all of a step.
    chunk: positions whose logits exist at one time.
    forward: forward pass; None for a policy's, `reward_model.forward(model)`
      for a reward model.
    per_token, per_response: metrics, as for `make_update`.
  """
  forward = forward or update_lib.policy_forward(model, decoding, chunk)
  prepare = jax.jit(estimator.prepare)

  @functools.cache
  def make_update(size: int) -> update_lib.Update:
    return update_lib.make_update(
      forward, estimator, optimizer, size, per_token, per_response
    )

  def init(params: Any) -> TrainState:
    copied = jax.tree.map(jnp.copy, params)
    return update_lib.init_state({'policy': copied}, optimizer)

  def step(
    state: TrainState, groups: stored.Pool, prompts: prompts_lib.PromptBatch
  ) -> tuple[TrainState, dict[str, Any]]:
    batch = prepare(stored.to_rollouts(groups))
    update = make_update(micro_prompts or len(groups.prompts))
    read = responses.to_prompts(prompts)
    state, metrics = update(state, None, read, batch)
    return state, jax.device_get(metrics)

  return OfflineTrainer(init, step, make_update)


def score_pool(
  model: ModelConfig,
  params: Any,
  pool: stored.Pool,
  encoded: prompts_lib.EncodedPrompts,
  micro_prompts: int,
  decoding: Decoding = Decoding(),
  chunk: int = 256,
  stop: Any = None,
) -> np.ndarray:
  """Computes the log-probabilities of a pool's tokens under a policy.

  Args:
    model, params: the policy.
    pool: N groups of g responses.
    encoded: prompts that the pool's positions index.
    micro_prompts: groups scored at one time.
    decoding, chunk: as for `offline`.
    stop: object whose `check()` is called between parts and may raise.

  Returns:
    [N, g, T] float32 log-probabilities, nats; 0 after the responses' ends.
  """
  count = len(pool.prompts)
  scored = []
  for start in range(0, count, micro_prompts):
    if stop is not None:
      stop.check()
    # The last part is padded, so that only one shape is compiled.
    part = [min(i, count - 1) for i in range(start, start + micro_prompts)]
    groups = stored.take(pool, part)
    statistics = responses.score_tokens(
      model,
      params,
      responses.to_prompts(prompts_lib.gather(encoded, groups.prompts)),
      sharding.place_rows(groups.tokens),
      decoding,
      micro_prompts,
      chunk,
    )
    mask = np.arange(groups.tokens.shape[2]) < groups.lengths[..., None]
    log_probs = sharding.to_host(statistics.log_probs)
    scored.append(np.where(mask, log_probs, 0.0))
  if not scored:
    return np.zeros(pool.tokens.shape, np.float32)
  return np.concatenate(scored)[:count].astype(np.float32)
