"""Prefill, decode and fork: tokens and their log-probabilities from prompts.

Shapes are static: one program per (P, G, S, T), and for branches per number of
places, branches and rows.
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

# Of the decode batch of branches, unless there are fewer branches.
_FEWEST_ROWS = 16


@chex.dataclass(frozen=True)
class Samples:
  """Responses to P prompts, G each, of up to T tokens.

  Of `fork`: [P, G, M, K, T − 1] in place of [P, G, T].

  Attributes:
    tokens: [P, G, T] int32, `pad_id` behind a response's end.
    mask: [P, G, T] bool, True for the response's tokens, EOS included.
    log_probs: [P, G, T] float32, nats, of the chosen tokens under the adjusted
      distribution they were drawn from; 0 outside the mask.
    finished: [P, G, 1] bool, whether the response ended with EOS.
    entropy: [P, G, T] float32, nats, of the distribution that each token was
      drawn from; None unless asked for.
    score_norms: [P, G, T] float32, ‖∂ log p(token) / ∂ logits‖² under it; None
      unless asked for.
  """

  tokens: Array
  mask: Array
  log_probs: Array
  finished: Array
  entropy: Array | None = None
  score_norms: Array | None = None


@chex.dataclass(frozen=True)
class Work:
  """What branches cost.

  Attributes:
    row_steps: float32 scalar, rows times decode steps that were computed.
    tokens: int32 scalar, tokens that branches wrote: of these rows' steps the
      useful ones.
    copied: float32 scalar, bytes of keys and values that were copied: every
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
  """The responses of `sample_and_keep`, which takes the same arguments."""
  found, _ = sample_and_keep(config, params, prompts, key, **settings)
  return found


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
    pad_id: stands behind a response's end.
    statistics: which of 'entropy' and 'score_norms' to keep.

  Returns:
    `Samples`, and the keys and values that `fork` goes on from.

  Raises:
    UserError: S + T exceeds the model's positions (true lengths are not known
      under jit: the padded width counts); no samples or no tokens asked for;
      statistics of another name.
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
    step, found = decode_rows(
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
      tokens=shaped(found.tokens),
      mask=shaped(found.mask),
      finished=shaped(found.done),
      **jax.tree.map(shaped, found.recorded),
    )
    keys, values = found.suffix
    suffix = transformer.Segment(
      keys=keys, values=values, lengths=jnp.zeros_like(found.number)
    )
    return written, transformer.Cache(
      prefixes=(segment.split(),), suffix=suffix, index=step
    )

  run = sharding.over_rows(
    of_rows, (P(), P(rows[0]), rows, P()), (rows, _cache_spec(rows))
  )
  return run(params, prompts, numbers, key)


def _cache_spec(rows: P) -> transformer.Cache:
  """PartitionSpecs of a cache of `sample_and_keep`.

  Of responses that share a prompt across devices the rows' order is that of the
  devices: only `fork` may read it.
  """

  def segment(axes):
    of = P(axes)
    return transformer.Segment(keys=of, values=of, lengths=of)

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
  """Draws K fresh continuations from M places inside each response.

  A branch goes on from the response's own keys and values and those of the
  prompt: nothing is computed again or tokenised anew, and what is copied is
  copied when a row takes a response over, not per branch (`scheduling`).  Its
  budget is what the response had left there.  A branch's tokens depend on its
  place in the result, on the key and on the model, and not on how the rows were
  used, up to the rounding of the logits.  It takes twice the memory of the
  rows' keys and values.

  Args:
    config, params: the model that sampled.
    cache: of `sample_and_keep`.
    responses: [P, G, T] of the same call.
    positions: [P, G, M] int32; a branch at p keeps the first p tokens of the
      response.  p < 1 makes no branch; p must lie inside the response, whose
      first p tokens hold no EOS then.
    key: PRNG key; not used by greedy decoding.
    branches: K.
    decoding, eos_ids, pad_id: as the responses were sampled.
    statistics: which of 'entropy' and 'score_norms' to keep.
    rows: of the decode batch; None for as many as there are responses, or 16
      if there are fewer.

  Returns:
    `Samples` of the continuations, [P, G, M, K, T − 1], whose mask is False
    where there is no branch; and what they cost.

  Raises:
    UserError: no branches, no rows, or no room for any: T is 1; a cache of
      other responses; statistics of another name.
  """
  max_tokens = responses.tokens.shape[-1]
  if branches < 1 or max_tokens < 2:
    raise UserError(f'{branches=} must be ≥ 1 and {max_tokens=} ≥ 2')
  if rows is not None and rows < 1:
    raise UserError(f'{rows=} must be at least 1')
  if cache.suffix.capacity != max_tokens:
    raise UserError(
      f'the cache has room for {cache.suffix.capacity} tokens, the responses '
      f'have {max_tokens}: it is of others'
    )
  _check_statistics(statistics)
  at = jnp.repeat(positions, branches, axis=2)
  # One number per branch and token.
  uniform = jax.random.uniform(key, (at.size, max_tokens - 1))
  uniform = uniform.reshape(*at.shape, max_tokens - 1)
  of = sharding.row_spec(*at.shape[:2])
  shards = sharding.shards(of)

  def of_rows(params, cache, tokens, at, uniform):
    params = transformer.split_layers(params)
    count = min(max(at[..., 0].size, _FEWEST_ROWS), at.size)
    if rows is not None:
      count = -(-rows // shards)
    uniform = uniform.reshape(at.size, -1)
    written = {'tokens': jnp.full(uniform.shape, pad_id, jnp.int32)}
    for name in ('log_probs', *statistics):
      written[name] = jnp.zeros(uniform.shape, jnp.float32)
    written, *work = scheduling.run(
      scheduling.make_jobs(tokens, at, count),
      count,
      (cache.suffix.keys, cache.suffix.values),
      functools.partial(
        _branch_step, config, params, cache, uniform, decoding, eos_ids
      ),
      written,
    )
    written = {name: x.reshape(*at.shape, -1) for name, x in written.items()}
    return written, [x[None] for x in work]

  run = sharding.over_rows(
    of_rows,
    (P(), _cache_spec(of), of, of, of),
    (of, P(sharding.flat(of))),
  )
  written, (row_steps, copies) = run(
    params, cache, responses.tokens, at, uniform
  )
  shape = (*positions.shape, branches, max_tokens - 1)
  written = {name: x.reshape(shape) for name, x in written.items()}
  found = _until_end(written, positions, max_tokens, eos_ids)
  row_bytes = sum(
    x.nbytes // x.shape[0]
    for x in jax.tree.leaves((cache.suffix.keys, cache.suffix.values))
  )
  return found, Work(
    row_steps=row_steps.sum(),
    tokens=found.mask.sum(dtype=jnp.int32),
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
  """One token of every row, as `scheduling.run` asks for it.

  Args:
    cache: of the responses, whose prompt's part is read.
    uniform: [R · N, T − 1] float32 in [0, 1), one for each branch's tokens.
    held: keys and values of the rows.
    written: [R · N, T − 1] each, what is kept of the branches' tokens.
  """
  suffix = cache.suffix.replace(keys=held[0], values=held[1])
  (prompt,) = cache.prefixes
  prompt = prompt.replace(readers=readers)
  seen = transformer.Cache(prefixes=(prompt,), suffix=suffix, index=now.index)
  hidden, seen = transformer.apply(config, params, now.token[:, None], seen)
  logits = transformer.logits(config, params, hidden[:, 0])
  place = now.branch, now.index - now.start
  token, found = draw_token(
    logits, uniform.at[place].get(mode='clip'), decoding
  )
  ended = is_end(token, eos_ids) | (now.index + 1 == suffix.capacity)
  new = {'tokens': token, **found}
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
      f'statistics {unknown} are not kept; choose of {list(_STATISTICS)}'
    )
