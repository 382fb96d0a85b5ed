"""Reward models: one number for a whole response, learned from preferences.

A reward model is a critic with a trunk of its own (`critic.separate`), read at
one place: the score of a response is the value of the state after its last
token.  That is where *ForSequenceClassification of `transformers` reads it.
Parameters are {'trunk': …, 'value': …} of the critic.

`Outputs.values` of a critic stand before their tokens.  Here they are moved by
one, so that index t is the score of the response up to and with token t; the
state after token T is there too, and no batch needs a column for it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import critic, policy
from jaxrl_llm.batches import split_prompts
from jaxrl_llm.estimators import Batch, Outputs
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.training import Forward

Array = jax.Array


def forward(config: ModelConfig) -> Forward:
  """The forward pass for `estimators.reward_model`.

  `trainable['critic']` holds the parameters, as {'trunk': …, 'value': …}.  The
  head's bias gets no gradient: a constant cancels in every pair, and what is
  left of it by rounding Adam would blow up to steps of full size.

  A reward model gives no probabilities: those of the batch are handed on.

  Args:
    config: of the trunk.
  """

  def apply(trainable, frozen, prompts: policy.Prompts, batch: Batch):
    del frozen
    params = trainable['critic']
    head = params['value']
    head = {**head, 'bias': jax.lax.stop_gradient(head['bias'])}
    values = _values(config, {**params, 'value': head}, prompts, batch.tokens)
    return Outputs(log_probs=batch.log_probs, values=values[:, :, 1:])

  return apply


@functools.partial(jax.jit, static_argnames=('config', 'micro_prompts'))
def score(
  config: ModelConfig,
  params: Any,
  prompts: policy.Prompts,
  responses: Array,
  lengths: Array,
  micro_prompts: int,
) -> Array:
  """Scores of whole responses, `micro_prompts` prompts at a time.

  Args:
    config, params: the reward model.
    prompts: P prompts.
    responses: [P, G, T] int32; anything may stand behind a response's end.
    lengths: [P, G] int32, tokens; after 0 the prompt itself is scored, and T
      may be 0.
    micro_prompts: prompts, with all their responses, read at one time.

  Returns:
    [P, G] float32, in nats where the model was trained by `bradley_terry`.
  """

  def part(inputs):
    prompts, responses, lengths = inputs
    values = _values(config, params, prompts, responses)
    return jnp.take_along_axis(values, lengths[:, :, None], axis=2)[:, :, 0]

  parts = split_prompts((prompts, responses, lengths), micro_prompts)
  scores = jax.lax.map(part, parts)
  return scores.swapaxes(0, 1).reshape(lengths.shape)


def _values(
  config: ModelConfig, params: Any, prompts: policy.Prompts, responses: Array
) -> Array:
  """[P, G, T + 1]: before every token, and after the last one."""
  trunk = critic.separate(config).config
  hidden = policy.read_through(trunk, params['trunk'], prompts, responses)
  return critic.apply_head(params['value'], hidden)
