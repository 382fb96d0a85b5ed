"""Decoding of a batch of rows, one token of each at a time.

Rows that have ended cost as much as others.  So when no more than a quarter of
a batch goes on, those rows go on alone, with copies of their keys and values,
and once more: a few long responses cost little beside the many short ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling.policy import Decoding, draw_token

Array = jax.Array

# What a batch is divided by when so few rows go on, the fewest that do so
# alone, and the fewest tokens for which another program is worth compiling.
_SHRINK = 4
_FEWEST_ROWS = 16
_FEWEST_TOKENS = 128


class Settings(NamedTuple):
  """How rows are decoded, static under jit; as of `sampling.sample`."""

  decoding: Decoding
  eos_ids: tuple[int, ...]
  pad_id: int
  statistics: tuple[str, ...]


class Rows(NamedTuple):
  """What B rows have written, [B, ...] each.

  Attributes:
    number: int32, which row of all devices' rows it is.
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
  """Which tokens end a response."""
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
  """Decodes rows behind their prompts until each has ended or is full.

  A row's tokens depend on its number and the key, and not on which rows are
  decoded beside it, up to the rounding of the logits.

  Args:
    config, params: the model.
    key: PRNG key.
    prompt: P rows, each read by the next B / P of the batch.
    first: [B] int32, the first input of each row.
    numbers: [B] int32, which of the `total` rows of all devices these are.
    total: rows of all devices.
    max_tokens: T.
    settings: how.

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
  """Rows of the batch, and of those that go on; each reads a prompt then."""
  sizes, fewer = [rows], rows // _SHRINK
  while fewer >= _FEWEST_ROWS:
    if fewer <= prompts:
      sizes.append(fewer)
    fewer //= _SHRINK
  return sizes


def _run(step, sizes: list[int], prompt, index: Array, rows: Rows):
  """Decodes until no more rows go on than are decoded alone, then those."""
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
  of = kept // (size // prompt.rows)
  take = lambda tree, which: jax.tree.map(lambda x: x[which], tree)
  index, part = _run(step, fewer, take(prompt, of), index, take(rows, kept))
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
  """One token of every row."""
  keys, values = rows.suffix
  suffix = transformer.Segment(keys=keys, values=values, lengths=rows.token)
  cache = transformer.Cache(prefixes=(prompt,), suffix=suffix, index=index)
  hidden, cache = transformer.apply(config, params, rows.token[:, None], cache)
  logits = transformer.logits(config, params, hidden[:, 0])
  uniform = jax.random.uniform(jax.random.fold_in(key, index), (total,))
  token, found = draw_token(logits, uniform[rows.number], settings.decoding)
  writes = ~rows.done
  token = jnp.where(writes, token, settings.pad_id)
  return index + 1, Rows(
    number=rows.number,
    token=token,
    done=rows.done | (writes & is_end(token, settings.eos_ids)),
    tokens=_write(rows.tokens, token, index),
    mask=_write(rows.mask, writes, index),
    recorded={
      name: _write(buffer, jnp.where(writes, found[name], 0.0), index)
      for name, buffer in rows.recorded.items()
    },
    suffix=(cache.suffix.keys, cache.suffix.values),
  )


def _write(buffer: Array, column: Array, index: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, column[:, None].astype(buffer.dtype), index, axis=1
  )
