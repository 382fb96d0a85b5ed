"""The critic: a learned value of the state before every token.

A value is a linear function of the hidden state that the logits of the next
token are computed from.  The trunk that gives the hidden states is the
critic's own (`separate`) or the policy's (`shared`).
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
  """A critic is a value of two pure functions.

  Attributes:
    config: of the trunk.
    init: (parameters of a decoder of `config`, score=None) → the critic's
      parameters, in arrays of their own.  `score`, [1, D], is the head of a
      reward model; without one the head is zeros.
    values: (parameters, prompts, responses, hidden) → [P, G, T] float32, in
      units of the reward; index t is the value of the state before token t.
      `hidden` is what `policy.read` gives of the policy.
  """

  config: ModelConfig
  init: Callable[..., Any]
  values: Callable[[Any, policy.Prompts, Array, Array], Array]


def separate(config: ModelConfig) -> Critic:
  """A critic with a trunk of its own: twice the memory, two aims kept apart.

  It begins as a copy of what `init` is given: the policy, or a reward model.

  Args:
    config: of the trunk, whose tokens are those of the policy.
  """
  trunk = value_head.trunk(config)

  def init(params, score: Array | None = None):
    own = {name: leaf for name, leaf in params.items() if name != 'head'}
    own = jax.tree.map(jnp.copy, own)
    return {'trunk': own, 'value': value_head.init_head(config, score)}

  def values(params, prompts, responses, hidden):
    del hidden
    own = policy.read(trunk, params['trunk'], prompts, responses)
    return value_head.apply_head(params['value'], own)

  return Critic(trunk, init, values)


def shared(config: ModelConfig) -> Critic:
  """A value head on the policy's hidden states, which it helps to shape.

  The gradient of the value error reaches the policy's trunk.

  Args:
    config: of the policy.
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
  """The critic's values of responses, `micro_prompts` prompts at a time.

  Args:
    config: of the policy.
    critic: whose values.
    trainable: {'policy': parameters, 'critic': parameters}.
    prompts: P prompts.
    responses: [P, G, T] int32.
    micro_prompts: prompts, with all their responses, read at one time.

  Returns:
    [P, G, T] float32, in units of the reward.
  """

  def part(inputs):
    inputs = sharding.constrain_rows(inputs)
    # Of no use to a trunk of its own, and then not computed under jit.
    hidden = policy.read(config, trainable['policy'], *inputs)
    return critic.values(trainable['critic'], *inputs, hidden)

  parts = split_prompts((prompts, responses), micro_prompts)
  values = jax.lax.map(part, parts)
  return values.swapaxes(0, 1).reshape(responses.shape)
