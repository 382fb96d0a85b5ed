"""A scalar head on hidden states: values of states, scores of responses.

The trunk is a decoder; parameters are {'trunk': …, 'value': …}.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.minibatches import split_prompts
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.prompts import Prompts, read_through

Array = jax.Array


def trunk(config: ModelConfig) -> ModelConfig:
  """The configuration of a decoder that gives hidden states only.

  A tied model has no head of its own, and a value head has no use for one.
  """
  return dataclasses.replace(config, tied=True)


def init_head(config: ModelConfig, score: Array | None) -> dict[str, Array]:
  """Parameters of a head: that of a reward model, [1, D], or zeros.

  Random weights would give every state a value of the rewards' size that means
  nothing; zeros begin at a value of 0, which is no baseline, and turn to what
  the hidden states tell with the first update.
  """
  kernel = jnp.zeros((config.hidden_size, 1), jnp.float32)
  if score is not None:
    kernel = jnp.asarray(score, jnp.float32).T
  return {'kernel': kernel, 'bias': jnp.zeros(1, jnp.float32)}


def apply_head(params: dict[str, Array], hidden: Array) -> Array:
  """[P, G, T, D] → [P, G, T] float32, also where the trunk is bfloat16."""
  values = jnp.einsum(
    'pgtd,d->pgt',
    hidden.astype(jnp.float32),
    params['kernel'][:, 0],
    precision='highest',
  )
  return values + params['bias'][0]


def values(
  config: ModelConfig, params: Any, prompts: Prompts, responses: Array
) -> Array:
  """[P, G, T + 1]: before every token, and after the last one."""
  hidden = read_through(trunk(config), params['trunk'], prompts, responses)
  return apply_head(params['value'], hidden)


@functools.partial(jax.jit, static_argnames=('config', 'micro_prompts'))
def score(
  config: ModelConfig,
  params: Any,
  prompts: Prompts,
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
    found = values(config, params, prompts, responses)
    return jnp.take_along_axis(found, lengths[:, :, None], axis=2)[:, :, 0]

  parts = split_prompts((prompts, responses, lengths), micro_prompts)
  scores = jax.lax.map(part, parts)
  return scores.swapaxes(0, 1).reshape(lengths.shape)
