"""Decodes a batch of rows, one response each, by one token at a time.

Rows that have ended cost as much as others.  So when no more than a quarter of
a batch is unfinished, those rows continue alone, with copies of their keys and
values, and so on: a few long responses add little to the many short ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling.policy import Decoding, draw_token

Array = jax.Array

# Divisor of a batch when few rows continue, the fewest that continue alone, and
# the fewest tokens for which another program is worth compiling.
_SHRINK = 4
_FEWEST_ROWS = 16
_FEWEST_TOKENS = 128


class Settings(NamedTuple):
  """Settings of decoding, static under jit; as in `sampling.sample`."""

  decoding: Decoding
  eos_ids: tuple[int, ...]
  pad_id: int
  statistics: tuple[str, ...]


class Rows(NamedTuple):
  """State of B rows, [B, ...] each.

  Attributes:
    number: int32, index of the row among all devices' rows.
    token: int32, its next input.
    done: bool, whether it has ended.
    tokens, mask: [B, T].
    recorded: {name: [B, T] float32}.
    suffix: its own keys and values, by layer.
  """

  number: Array
  token: Array
  done: Array
  tokens: Array
  mask: Array
  recorded: dict[str, Array]
  suffix: Any


def is_end(tokens: Array, eos_ids: tuple[int, ...]) -> Array:
  """Marks the tokens that end a response."""
  return jnp.isin(tokens, jnp.array(eos_ids, jnp.int32))


def decode_rows(
  config: ModelConfig,
  params,
  key: Array,
  prompt: transformer.Segment,
  first: Array,
  numbers: Array,
  total: int,
  max_tokens: int,
  settings: Settings,
) -> tuple[Array, Rows]:
  """Decodes rows after their prompts until each has ended or is full.

  A row's tokens depend on its number and the key, not on the rows decoded with
  it, up to the rounding of the logits.

  Args:
    config, params: the model.
    key: PRNG key.
    prompt: P rows, each read by the next B / P of the batch.
    first: [B] int32, the first input of each row.
    numbers: [B] int32, indices of these rows among the `total` of all devices.
    total: rows of all devices.
    max_tokens: T.
    settings: of decoding.

  Returns:
    The number of steps, and the rows.
  """
  shape = first.size, max_tokens
  suffix = transformer.new_cache(config, (), *shape).suffix
  rows = Rows(
    number=numbers,
    token=first,
    done=jnp.zeros(first.size, bool),
    tokens=jnp.full(shape, settings.pad_id, jnp.int32),
    mask=jnp.zeros(shape, bool),
    recorded={
      name: jnp.zeros(shape, jnp.float32)
      for name in ('log_probs', *settings.statistics)
    },
    suffix=(suffix.keys, suffix.values),
  )
  step = functools.partial(_step, config, params, key, total, settings)
  sizes = [first.size]
  if settings.eos_ids and max_tokens >= _FEWEST_TOKENS:
    sizes = _sizes(first.size, prompt.rows)
  return _run(step, sizes, prompt.split(), jnp.int32(0), rows)


def _sizes(rows: int, prompts: int) -> list[int]:
  """Lists the sizes of the batch; after the first, each row has a prompt."""
  sizes, fewer = [rows], rows // _SHRINK
  while fewer >= _FEWEST_ROWS:
    if fewer <= prompts:
      sizes.append(fewer)
    fewer //= _SHRINK
  return sizes


def _run(step, sizes: list[int], prompt, index: Array, rows: Rows):
  """Decodes until the unfinished rows fit the next size, then those alone."""
  size, *fewer = sizes
  floor = fewer[0] if fewer else 0
  capacity = rows.tokens.shape[1]
  index, rows = jax.lax.while_loop(
    lambda now: (now[0] < capacity) & ((~now[1].done).sum() > floor),
    lambda now: step(prompt, *now),
    (index, rows),
  )
  if not fewer:
    return index, rows
  kept = jnp.argsort(rows.done, stable=True)[:floor]
  sources = kept // (size // prompt.rows)
  take = lambda tree, chosen: jax.tree.map(lambda x: x[chosen], tree)
  index, part = _run(
    step, fewer, take(prompt, sources), index, take(rows, kept)
  )
  put = lambda x, y: x.at[kept].set(y, unique_indices=True)
  return index, jax.tree.map(put, rows, part)


def _step(
  config: ModelConfig,
  params,
  key: Array,
  total: int,
  settings: Settings,
  prompt: transformer.Segment,
  index: Array,
  rows: Rows,
) -> tuple[Array, Rows]:
  """Decodes one token of every row."""
  keys, values = rows.suffix
  suffix = transformer.Segment(keys=keys, values=values, lengths=rows.token)
  cache = transformer.Cache(prefixes=(prompt,), suffix=suffix, index=index)
  hidden, cache = transformer.apply(config, params, rows.token[:, None], cache)
  logits = transformer.logits(config, params, hidden[:, 0])
  uniform = jax.random.uniform(jax.random.fold_in(key, index), (total,))
  token, record = draw_token(logits, uniform[rows.number], settings.decoding)
  writes = ~rows.done
  token = jnp.where(writes, token, settings.pad_id)
  return index + 1, Rows(
    number=rows.number,
    token=token,
    done=rows.done | (writes & is_end(token, settings.eos_ids)),
    tokens=_write(rows.tokens, token, index),
    mask=_write(rows.mask, writes, index),
    recorded={
      name: _write(buffer, jnp.where(writes, record[name], 0.0), index)
      for name, buffer in rows.recorded.items()
    },
    suffix=(cache.suffix.keys, cache.suffix.values),
  )


def _write(buffer: Array, column: Array, index: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, column[:, None].astype(buffer.dtype), index, axis=1
  )
