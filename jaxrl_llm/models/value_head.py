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
  """Returns the configuration of a decoder that outputs hidden states only.

  A tied model has no separate head, and a value head does not need one.
  """
  return dataclasses.replace(config, tied=True)


def init_head(config: ModelConfig, score: Array | None) -> dict[str, Array]:
  """Initialises a head from that of a reward model, [1, D], or with zeros.

  Random weights would give every state a meaningless value of the rewards'
  size; zeros start at a value of 0, that is without a baseline, and learn from
  the hidden states with the first update.
  """
  kernel = jnp.zeros((config.hidden_size, 1), jnp.float32)
  if score is not None:
    kernel = jnp.asarray(score, jnp.float32).T
  return {'kernel': kernel, 'bias': jnp.zeros(1, jnp.float32)}


def apply_head(params: dict[str, Array], hidden: Array) -> Array:
  """Maps [P, G, T, D] → [P, G, T] float32, even if the trunk is bfloat16."""
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
  """Returns values before every token and after the last, [P, G, T + 1]."""
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
  """Scores whole responses, `micro_prompts` prompts at a time.

  Args:
    config, params: the reward model.
    prompts: P prompts.
    responses: [P, G, T] int32; tokens after a response's end are ignored.
    lengths: [P, G] int32, tokens; at 0 the prompt itself is scored, and T may
      be 0.
    micro_prompts: prompts, with all their responses, read at one time.

  Returns:
    [P, G] float32, in nats where the model was trained by `bradley_terry`.
  """

  def part(inputs):
    prompts, responses, lengths = inputs
    results = values(config, params, prompts, responses)
    return jnp.take_along_axis(results, lengths[:, :, None], axis=2)[:, :, 0]

  parts = split_prompts((prompts, responses, lengths), micro_prompts)
  scores = jax.lax.map(part, parts)
  return scores.swapaxes(0, 1).reshape(lengths.shape)
