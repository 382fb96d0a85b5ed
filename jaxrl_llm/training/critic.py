"""The critic: a learned value of the state before every token.

A value is a linear function of the hidden state from which the logits of the
next token are computed.  The trunk that computes the hidden states is either
the critic's own (`separate`) or the policy's (`shared`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm import sharding
from jaxrl_llm.minibatches import split_prompts
from jaxrl_llm.models import value_head
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling import policy

Array = jax.Array


class Critic(NamedTuple):
  """A critic as a pair of pure functions.

  Attributes:
    config: configuration of the trunk.
    init: (parameters of a decoder of `config`, score=None) → the critic's
      parameters, in newly allocated arrays.  `score`, [1, D], is the head of a
      reward model; without it the head is zeros.
    values: (parameters, prompts, responses, hidden) → [P, G, T] float32, in
      units of the reward; index t is the value of the state before token t.
      `hidden` is the result of `policy.read` for the policy.
  """

  config: ModelConfig
  init: Callable[..., Any]
  values: Callable[[Any, policy.Prompts, Array, Array], Array]


def separate(config: ModelConfig) -> Critic:
  """Builds a critic with its own trunk: twice the memory, separate objectives.

  The trunk starts as a copy of the parameters passed to `init`: those of the
  policy or of a reward model.

  Args:
    config: configuration of the trunk, which reads the policy's tokens.
  """
  trunk = value_head.trunk(config)

  def init(params, score: Array | None = None):
    kept = {name: leaf for name, leaf in params.items() if name != 'head'}
    kept = jax.tree.map(jnp.copy, kept)
    return {'trunk': kept, 'value': value_head.init_head(config, score)}

  def values(params, prompts, responses, hidden):
    del hidden
    states = policy.read(trunk, params['trunk'], prompts, responses)
    return value_head.apply_head(params['value'], states)

  return Critic(trunk, init, values)


def shared(config: ModelConfig) -> Critic:
  """Builds a critic that is a value head on the policy's hidden states.

  The gradient of the value error reaches the policy's trunk.

  Args:
    config: configuration of the policy.
  """

  def init(params, score: Array | None = None):
    del params
    return {'value': value_head.init_head(config, score)}

  def values(params, prompts, responses, hidden):
    del prompts, responses
    return value_head.apply_head(params['value'], hidden)

  return Critic(config, init, values)


@functools.partial(
  jax.jit, static_argnames=('config', 'critic', 'micro_prompts')
)
def score_values(
  config: ModelConfig,
  critic: Critic,
  trainable: Any,
  prompts: policy.Prompts,
  responses: Array,
  micro_prompts: int,
) -> Array:
  """Computes the critic's values of responses, `micro_prompts` at a time.

  Args:
    config: configuration of the policy.
    critic: the critic to apply.
    trainable: {'policy': parameters, 'critic': parameters}.
    prompts: P prompts.
    responses: [P, G, T] int32.
    micro_prompts: prompts, with all their responses, read at one time.

  Returns:
    [P, G, T] float32, in units of the reward.
  """

  def part(inputs):
    inputs = sharding.constrain_rows(inputs)
    # A separate trunk does not use this; jit then removes the computation.
    hidden = policy.read(config, trainable['policy'], *inputs)
    return critic.values(trainable['critic'], *inputs, hidden)

  parts = split_prompts((prompts, responses), micro_prompts)
  values = jax.lax.map(part, parts)
  return values.swapaxes(0, 1).reshape(responses.shape)
