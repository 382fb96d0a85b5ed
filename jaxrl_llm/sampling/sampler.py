"""Prefill, decode and fork: tokens and their log-probabilities from prompts.

Shapes are static: one program per (P, G, S, T), and for branches per number of
positions, branches and rows.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig, check_length
from jaxrl_llm.models.prompts import Prompts, last_tokens, prefill_prompts
from jaxrl_llm.sampling import scheduling
from jaxrl_llm.sampling.decoding import Settings, decode_rows, is_end
from jaxrl_llm.sampling.policy import Decoding, draw_token

Array = jax.Array

# Minimum rows of a decode batch of branches, unless there are fewer branches.
_FEWEST_ROWS = 16


@chex.dataclass(frozen=True)
class Samples:
  """Responses to P prompts, G each, of up to T tokens.

  From `fork`: [P, G, M, K, T − 1] in place of [P, G, T].

  Attributes:
    tokens: [P, G, T] int32, `pad_id` after a response's end.
    mask: [P, G, T] bool, True for the response's tokens, EOS included.
    log_probs: [P, G, T] float32, nats, of the chosen tokens under the adjusted
      distribution they were drawn from; 0 outside the mask.
    finished: [P, G, 1] bool, whether the response ended with EOS.
    entropy: [P, G, T] float32, nats, of the distribution that each token was
      drawn from; None unless requested.
    score_norms: [P, G, T] float32, ‖∂ log p(token) / ∂ logits‖² under it; None
      unless requested.
  """

  tokens: Array
  mask: Array
  log_probs: Array
  finished: Array
  entropy: Array | None = None
  score_norms: Array | None = None


@chex.dataclass(frozen=True)
class Work:
  """Cost of branches.

  Attributes:
    row_steps: float32 scalar, rows times decode steps that were computed.
    tokens: int32 scalar, tokens that branches wrote: the useful row steps.
    copied: float32 scalar, bytes of keys and values that were copied: each
      row's at the start and when it takes over a response, and those of the
      rows that are kept when the others are dropped.
  """

  row_steps: Array
  tokens: Array
  copied: Array


_STATISTICS = 'entropy', 'score_norms'
_STATIC = (
  'config',
  'decoding',
  'eos_ids',
  'pad_id',
  'statistics',
)


@functools.partial(jax.jit, static_argnames=(*_STATIC, 'samples', 'max_tokens'))
def sample(
  config: ModelConfig, params, prompts: Prompts, key: Array, **settings
) -> Samples:
  """Returns the responses of `sample_and_keep`, with the same arguments."""
  responses, _ = sample_and_keep(config, params, prompts, key, **settings)
  return responses


@functools.partial(jax.jit, static_argnames=(*_STATIC, 'samples', 'max_tokens'))
def sample_and_keep(
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
  statistics: tuple[str, ...] = (),
) -> tuple[Samples, transformer.Cache]:
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
    pad_id: fills a row after a response's end.
    statistics: which of 'entropy' and 'score_norms' to keep.

  Returns:
    `Samples`, and the keys and values that `fork` continues from.

  Raises:
    UserError: S + T exceeds the model's positions (true lengths are not known
      under jit: the padded width counts); `samples` or `max_tokens` is below 1;
      unknown statistics.
  """
  if samples < 1 or max_tokens < 1:
    raise UserError(f'{samples=} and {max_tokens=} must be at least 1')
  _check_statistics(statistics)
  check_length(config, prompts.tokens.shape[1] + max_tokens)
  num_prompts = prompts.tokens.shape[0]
  numbers = jnp.arange(num_prompts * samples, dtype=jnp.int32)
  numbers = numbers.reshape(num_prompts, samples)
  rows = sharding.row_spec(num_prompts, samples)

  def of_rows(params, prompts, numbers, key):
    params = transformer.split_layers(params)
    segment = prefill_prompts(config, params, prompts)
    step, result = decode_rows(
      config,
      params,
      key,
      segment,
      jnp.repeat(last_tokens(prompts), numbers.shape[1]),
      numbers.reshape(-1),
      num_prompts * samples,
      max_tokens,
      Settings(decoding, eos_ids, pad_id, statistics),
    )
    shaped = lambda x: x.reshape(*numbers.shape, -1)
    written = Samples(
      tokens=shaped(result.tokens),
      mask=shaped(result.mask),
      finished=shaped(result.done),
      **jax.tree.map(shaped, result.recorded),
    )
    keys, values = result.suffix
    suffix = transformer.Segment(
      keys=keys, values=values, lengths=jnp.zeros_like(result.number)
    )
    return written, transformer.Cache(
      prefixes=(segment.split(),), suffix=suffix, index=step
    )

  run = sharding.over_rows(
    of_rows, (P(), P(rows[0]), rows, P()), (rows, _cache_spec(rows))
  )
  return run(params, prompts, numbers, key)


def _cache_spec(rows: P) -> transformer.Cache:
  """Returns the PartitionSpecs of a cache of `sample_and_keep`.

  If a prompt's responses lie on several devices, the order of rows is that of
  the devices: only `fork` may read them.
  """

  def segment(axes):
    spec = P(axes)
    return transformer.Segment(keys=spec, values=spec, lengths=spec)

  return transformer.Cache(
    prefixes=(segment(rows[0]),),
    suffix=segment(sharding.flat(rows)),
    index=P(),
  )


@functools.partial(jax.jit, static_argnames=(*_STATIC, 'branches', 'rows'))
def fork(
  config: ModelConfig,
  params,
  cache: transformer.Cache,
  responses: Samples,
  positions: Array,
  key: Array,
  *,
  branches: int,
  decoding: Decoding = Decoding(),
  eos_ids: tuple[int, ...] = (),
  pad_id: int = 0,
  statistics: tuple[str, ...] = (),
  rows: int | None = None,
) -> tuple[Samples, Work]:
  """Draws K fresh continuations from M positions inside each response.

  A branch continues from the keys and values of the response and the prompt:
  nothing is computed or tokenised again, and copies are made when a row takes
  over a response, not per branch (`scheduling`).  Its budget is the rest of the
  response's.  A branch's tokens depend on its index in the result, the key and
  the model, not on the use of the rows, up to the rounding of the logits.
  Decoding needs twice the memory of the rows' keys and values.

  Args:
    config, params: the model that sampled.
    cache: of `sample_and_keep`.
    responses: [P, G, T] of the same call.
    positions: [P, G, M] int32; a branch at p keeps the first p tokens of the
      response.  p < 1 makes no branch; p must lie inside the response, so that
      its first p tokens contain no EOS.
    key: PRNG key; not used by greedy decoding.
    branches: K.
    decoding, eos_ids, pad_id: as the responses were sampled.
    statistics: which of 'entropy' and 'score_norms' to keep.
    rows: of the decode batch; None for the number of responses, at least 16.

  Returns:
    `Samples` of the continuations, [P, G, M, K, T − 1], whose mask is False
    where there is no branch; and their cost.

  Raises:
    UserError: no branches, no rows, or no room for any: T is 1; a cache of
      other responses; unknown statistics.
  """
  max_tokens = responses.tokens.shape[-1]
  _check_fork(cache, max_tokens, branches, rows)
  _check_statistics(statistics)
  starts = jnp.repeat(positions, branches, axis=2)
  # One number per branch and token.
  uniform = jax.random.uniform(key, (starts.size, max_tokens - 1))
  uniform = uniform.reshape(*starts.shape, max_tokens - 1)
  spec = sharding.row_spec(*starts.shape[:2])
  shards = sharding.shards(spec)

  def of_rows(params, cache, tokens, starts, uniform):
    params = transformer.split_layers(params)
    count = min(max(starts[..., 0].size, _FEWEST_ROWS), starts.size)
    if rows is not None:
      count = -(-rows // shards)
    uniform = uniform.reshape(starts.size, -1)
    written = {'tokens': jnp.full(uniform.shape, pad_id, jnp.int32)}
    for name in ('log_probs', *statistics):
      written[name] = jnp.zeros(uniform.shape, jnp.float32)
    written, *work = scheduling.run(
      scheduling.make_jobs(tokens, starts, count),
      count,
      (cache.suffix.keys, cache.suffix.values),
      functools.partial(
        _branch_step, config, params, cache, uniform, decoding, eos_ids
      ),
      written,
    )
    written = {
      name: x.reshape(*starts.shape, -1) for name, x in written.items()
    }
    return written, [x[None] for x in work]

  run = sharding.over_rows(
    of_rows,
    (P(), _cache_spec(spec), spec, spec, spec),
    (spec, P(sharding.flat(spec))),
  )
  written, (row_steps, copies) = run(
    params, cache, responses.tokens, starts, uniform
  )
  shape = (*positions.shape, branches, max_tokens - 1)
  written = {name: x.reshape(shape) for name, x in written.items()}
  samples = _until_end(written, positions, max_tokens, eos_ids)
  return samples, _total_work(cache, samples, row_steps, copies)


def _check_fork(
  cache: transformer.Cache, max_tokens: int, branches: int, rows: int | None
) -> None:
  if branches < 1 or max_tokens < 2:
    raise UserError(f'{branches=} must be ≥ 1 and {max_tokens=} ≥ 2')
  if rows is not None and rows < 1:
    raise UserError(f'{rows=} must be at least 1')
  if cache.suffix.capacity != max_tokens:
    raise UserError(
      f'the cache has room for {cache.suffix.capacity} tokens, the responses '
      f'have {max_tokens}: it belongs to others'
    )


def _total_work(
  cache: transformer.Cache, samples: Samples, row_steps: Array, copies: Array
) -> Work:
  """Adds up the work of all devices, whose counts are given one each."""
  row_bytes = sum(
    x.nbytes // x.shape[0]
    for x in jax.tree.leaves((cache.suffix.keys, cache.suffix.values))
  )
  return Work(
    row_steps=row_steps.sum(),
    tokens=samples.mask.sum(dtype=jnp.int32),
    copied=copies.sum().astype(jnp.float32) * row_bytes,
  )


def _branch_step(
  config: ModelConfig,
  params,
  cache: transformer.Cache,
  uniform: Array,
  decoding: Decoding,
  eos_ids: tuple[int, ...],
  readers: Array,
  now: scheduling.Rows,
  held: Any,
  written: dict[str, Array],
) -> tuple[Array, Array, Any, dict[str, Array]]:
  """Decodes one token of every row, as the `step` of `scheduling.run`.

  Args:
    cache: of the responses; only the prompts' part is read.
    uniform: [R · N, T − 1] float32 in [0, 1), one for each branch's tokens.
    held: keys and values of the rows.
    written: [R · N, T − 1] each, tokens and statistics of the branches.
  """
  suffix = cache.suffix.replace(keys=held[0], values=held[1])
  (prompt,) = cache.prefixes
  prompt = prompt.replace(readers=readers)
  seen = transformer.Cache(prefixes=(prompt,), suffix=suffix, index=now.index)
  hidden, seen = transformer.apply(config, params, now.token[:, None], seen)
  logits = transformer.logits(config, params, hidden[:, 0])
  place = now.branch, now.index - now.start
  token, record = draw_token(
    logits, uniform.at[place].get(mode='clip'), decoding
  )
  ended = is_end(token, eos_ids) | (now.index + 1 == suffix.capacity)
  new = {'tokens': token, **record}
  written = {
    name: buffer.at[place].set(new[name], mode='drop')
    for name, buffer in written.items()
  }
  return token, ended, (seen.suffix.keys, seen.suffix.values), written


def _until_end(
  written: dict[str, Array],
  positions: Array,
  max_tokens: int,
  eos_ids: tuple[int, ...],
) -> Samples:
  """Finds each branch's end: its EOS, or the last token of its budget."""
  tokens = written['tokens']
  budget = jnp.where(positions >= 1, max_tokens - positions, 0)
  slot = jnp.arange(tokens.shape[-1])[None, None, None, None]
  inside = jnp.broadcast_to(slot < budget[..., None, None], tokens.shape)
  ends = inside & is_end(tokens, eos_ids)
  finished = ends.any(axis=-1, keepdims=True)
  end = jnp.argmax(ends, axis=-1, keepdims=True)
  mask = inside & ((slot <= end) | ~finished)
  return Samples(mask=mask, finished=finished, **written)


def _check_statistics(statistics: tuple[str, ...]) -> None:
  unknown = sorted(set(statistics) - set(_STATISTICS))
  if unknown:
    raise UserError(
      f'statistics {unknown} are not kept; choose from {list(_STATISTICS)}'
    )
