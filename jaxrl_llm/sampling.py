"""Prefill and decode: tokens and their log-probabilities from prompts.

Shapes are static: one program per (P, G, S, T).  Decoding is one
`lax.while_loop` on the device that ends when every row has ended.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig, check_length
from jaxrl_llm.policy import (
  Decoding,
  Prompts,
  adjust_logits,
  last_tokens,
  prefill_prompts,
)

Array = jax.Array

_BLOCK = 128


@chex.dataclass(frozen=True)
class Samples:
  """Responses to P prompts, G each, of up to T tokens.

  Attributes:
    tokens: [P, G, T] int32, `pad_id` behind a response's end.
    mask: [P, G, T] bool, True for the response's tokens, EOS included.
    log_probs: [P, G, T] float32, nats, of the chosen tokens under the adjusted
      distribution they were drawn from; 0 outside the mask.
    finished: [P, G, 1] bool, whether the response ended with EOS.
  """

  tokens: Array
  mask: Array
  log_probs: Array
  finished: Array


class _State(NamedTuple):
  step: Array
  token: Array
  done: Array
  tokens: Array
  mask: Array
  log_probs: Array
  cache: transformer.Cache


@functools.partial(
  jax.jit,
  static_argnames=(
    'config',
    'samples',
    'max_tokens',
    'decoding',
    'eos_ids',
    'pad_id',
  ),
)
def sample(
  config: ModelConfig,
  params,
  prompts: Prompts,
  key: Array,
  *,
  samples: int,
  max_tokens: int,
  decoding: Decoding = Decoding(),
  eos_ids: tuple[int, ...] = (),
  pad_id: int = 0,
) -> Samples:
  """Draws G responses to each prompt.

  The prompt's keys and values are computed once per prompt and shared by its
  responses.  A row ends with an EOS token or after `max_tokens`.

  Args:
    config, params: the model.
    prompts: P prompts.
    key: PRNG key; not used by greedy decoding.
    samples: G.
    max_tokens: T, EOS included.
    decoding: temperature, top-k, top-p.
    eos_ids: any of these ends a response.
    pad_id: stands behind a response's end.

  Returns:
    `Samples`.

  Raises:
    UserError: S + T exceeds the model's positions (true lengths are not known
      under jit: the padded width counts); no samples or no tokens asked for.
  """
  if samples < 1 or max_tokens < 1:
    raise UserError(f'{samples=} and {max_tokens=} must be at least 1')
  check_length(config, prompts.tokens.shape[1] + max_tokens)
  num_prompts = prompts.tokens.shape[0]
  rows = num_prompts * samples
  segment = prefill_prompts(config, params, prompts)

  def unfinished(state: _State) -> Array:
    return (state.step < max_tokens) & ~jnp.all(state.done)

  def decode(state: _State) -> _State:
    hidden, cache = transformer.apply(
      config, params, state.token[:, None], state.cache
    )
    logits = transformer.logits(config, params, hidden[:, 0])
    step_key = jax.random.fold_in(key, state.step)
    token, log_prob = choose(logits, step_key, decoding)
    token = jnp.where(state.done, pad_id, token)
    ended = jnp.isin(token, jnp.array(eos_ids, jnp.int32))
    return _State(
      step=state.step + 1,
      token=token,
      done=state.done | ended,
      tokens=_write(state.tokens, token, state.step),
      mask=_write(state.mask, ~state.done, state.step),
      log_probs=_write(
        state.log_probs, jnp.where(state.done, 0.0, log_prob), state.step
      ),
      cache=cache,
    )

  final = jax.lax.while_loop(
    unfinished,
    decode,
    _State(
      step=jnp.int32(0),
      token=jnp.repeat(last_tokens(prompts), samples),
      done=jnp.zeros(rows, bool),
      tokens=jnp.full((rows, max_tokens), pad_id, jnp.int32),
      mask=jnp.zeros((rows, max_tokens), bool),
      log_probs=jnp.zeros((rows, max_tokens), jnp.float32),
      cache=transformer.new_cache(config, (segment,), rows, max_tokens),
    ),
  )
  shape = (num_prompts, samples, -1)
  return Samples(
    tokens=final.tokens.reshape(shape),
    mask=final.mask.reshape(shape),
    log_probs=final.log_probs.reshape(shape),
    finished=final.done.reshape(shape),
  )


def choose(
  logits: Array, key: Array, decoding: Decoding
) -> tuple[Array, Array]:
  """Draws one token per row and gives its log-probability.

  Args:
    logits: [N, V] float32, not adjusted.
    key: PRNG key.
    decoding: temperature, top-k, top-p.

  Returns:
    Tokens [N] int32 and log-probabilities [N] float32, nats.
  """
  adjusted = adjust_logits(logits, decoding)
  if decoding.greedy:
    token = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
  else:
    highest = adjusted.max(axis=-1, keepdims=True)
    token = _inverse_cdf(jnp.exp(adjusted - highest), key)
  chosen = jnp.take_along_axis(adjusted, token[:, None], axis=-1)[:, 0]
  return token, chosen - jax.nn.logsumexp(adjusted, axis=-1)


def _inverse_cdf(weights: Array, key: Array) -> Array:
  """Draws an index of each row in proportion to `weights`, [N, V].

  One uniform number per row, first a block of 128 tokens, then a token of it:
  far cheaper than a Gumbel variate per token at a large vocabulary.  A token
  of weight 0 is never drawn.
  """
  rows, vocabulary = weights.shape
  padding = -vocabulary % _BLOCK
  blocks = jnp.pad(weights, ((0, 0), (0, padding)))
  blocks = blocks.reshape(rows, -1, _BLOCK)
  sums = blocks.sum(axis=-1)
  uniform = jax.random.uniform(key, (rows, 1))
  target = uniform * sums.sum(axis=-1, keepdims=True)
  block, below = _first_above(sums, target)
  within = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
  index, _ = _first_above(within, target - below)
  return (block * _BLOCK + index)[:, 0].astype(jnp.int32)


def _first_above(weights: Array, target: Array) -> tuple[Array, Array]:
  """Index [N, 1] where the cumulative sum first exceeds `target`; its start.

  XLA adds long sums up as a tree: their rounding lets the cumulative sum fall,
  or rise at a weight of 0.  So only positive weights count, and a target that
  rounding has put past the end takes the last of them.
  """
  possible = weights > 0
  cumulative = jnp.where(possible, jnp.cumsum(weights, axis=-1), 0.0)
  highest = cumulative.max(axis=-1, keepdims=True)
  target = jnp.clip(target, 0.0, highest * (1.0 - 2.0**-23))
  index = jnp.argmax(cumulative > target, axis=-1, keepdims=True)
  start = jnp.take_along_axis(cumulative - weights, index, axis=-1)
  return index, start


def _write(buffer: Array, column: Array, step: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, column[:, None].astype(buffer.dtype), step, axis=1
  )
