"""The policy: the distribution that tokens are drawn from and scored under.

Temperature, top-k, top-p and the vocabulary limit are defined only here.  The
sampler draws from `adjust_logits`; `score` returns log-probabilities and
entropy of given tokens under the same adjusted distribution.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import head
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.prompts import Prompts, read

Array = jax.Array

_BLOCK = 128  # tokens, of the two-level inversion in `draw_token`


@dataclasses.dataclass(frozen=True)
class Decoding:
  """Settings for drawing the next token.  Hashable: static under jit.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token (and then
      log-probabilities are those of temperature 1).
    top_k: keeps the k largest logits; 0 keeps all.
    top_p: keeps the smallest set of tokens whose probability reaches top_p.
    num_tokens: ids from here on are never drawn (vocabulary rows that only
      pad the embedding); None allows all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  num_tokens: int | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise UserError(
        f'temperature is {self.temperature}; it must be ≥ 0 and finite'
      )
    if self.top_k < 0:
      raise UserError(f'top_k is {self.top_k}; it must be ≥ 0 (0: off)')
    if not 0 < self.top_p <= 1:
      raise UserError(f'top_p is {self.top_p}; it must be in (0, 1] (1: off)')
    if self.num_tokens is not None and self.num_tokens < 1:
      raise UserError(
        f'num_tokens is {self.num_tokens}; it must be ≥ 1 (None: all)'
      )

  @property
  def greedy(self) -> bool:
    return self.temperature == 0


def adjust_logits(
  logits: Array, decoding: Decoding, chosen: Array | None = None
) -> Array:
  """Returns the logits of the distribution that tokens are drawn from.

  It applies temperature, then top-k, then top-p to the rest; excluded tokens
  get −inf.  Tokens tied with the last one kept are kept.

  Args:
    logits: [N, V] float32.
    decoding: settings.
    chosen: [N] tokens that are always kept.  A scorer passes the tokens that
      were drawn: an update may move them out of the present top-k, where a
      log-probability of −inf has no gradient.

  Returns:
    [N, V] float32; its softmax is the distribution.
  """
  ids = jnp.arange(logits.shape[-1])[None]
  if decoding.num_tokens is not None:
    logits = jnp.where(ids < decoding.num_tokens, logits, -jnp.inf)
  if not decoding.greedy:
    logits = logits / decoding.temperature
  keep = jnp.ones(logits.shape, bool)
  fixed = jax.lax.stop_gradient(logits)
  if 0 < decoding.top_k < logits.shape[-1]:
    count = lambda kept: kept.sum(axis=-1) >= decoding.top_k
    keep &= _highest_cut(fixed, count)
  if decoding.top_p < 1:
    probabilities = jax.nn.softmax(jnp.where(keep, fixed, -jnp.inf))
    mass = lambda kept: (
      jnp.where(kept, probabilities, 0.0).sum(axis=-1) >= decoding.top_p
    )
    keep &= _highest_cut(probabilities, mass)
  if chosen is not None:
    keep |= ids == chosen[:, None]
  return jnp.where(keep, logits, -jnp.inf)


def _highest_cut(x: Array, enough: Callable[[Array], Array]) -> Array:
  """Returns the smallest set {v : xᵥ ≥ cut} of each row that is `enough`.

  The cut is found bit by bit on the order-preserving integer form of a
  float32, in 32 passes over `x`: exact, and without a sort, the slowest
  operation here on a CPU.  The cut becomes a float again before the comparison,
  so that no second array like `x` exists.

  Args:
    x: [N, V] float32.
    enough: maps a set, [N, V] bool, to [N] bool; monotone in the set.

  Returns:
    [N, V] bool; all True where no set is enough.
  """
  sign = jnp.uint32(1 << 31)

  def at_least(cut: Array) -> Array:
    # From −inf to inf: beyond them are NaNs.
    cut = jnp.clip(cut, jnp.uint32(0x007FFFFF), jnp.uint32(0xFF800000))
    bits = jnp.where(cut & sign, cut ^ sign, ~cut)
    # Not x ≥ cut: a NaN stays in the set, and so visible.
    return ~(x < jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None])

  def raise_cut(i: Array, cut: Array) -> Array:
    higher = cut | (sign >> jnp.uint32(i))
    return jnp.where(enough(at_least(higher)), higher, cut)

  start = jnp.zeros(x.shape[0], jnp.uint32)
  return at_least(jax.lax.fori_loop(0, 32, raise_cut, start))


def draw_token(
  logits: Array, uniform: Array, decoding: Decoding
) -> tuple[Array, head.TokenStatistics]:
  """Draws one token per row by inverting the distribution function.

  Args:
    logits: [N, V] float32, not adjusted.
    uniform: [N] float32 in [0, 1), the only randomness; not read by greedy
      decoding.
    decoding: temperature, top-k, top-p.

  Returns:
    Tokens [N] int32, and the statistics that `score` computes of them.
  """
  adjusted = adjust_logits(logits, decoding)
  if decoding.greedy:
    token = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    normalizer = jax.nn.logsumexp(adjusted, axis=-1)
  else:
    highest = adjusted.max(axis=-1, keepdims=True)
    token, total = _inverse_cdf(jnp.exp(adjusted - highest), uniform[:, None])
    normalizer = highest[:, 0] + jnp.log(total)
  chosen = jnp.take_along_axis(adjusted, token[:, None], axis=-1)[:, 0]
  log_probs = chosen - normalizer
  return token, head.statistics(adjusted, token).replace(log_probs=log_probs)


class Blocks(NamedTuple):
  """Weights of tokens in blocks, to draw from them with one uniform number.

  One number selects a block of 128 tokens, then a token in it: far cheaper than
  a Gumbel variate per token at a large vocabulary.  No block lies on two
  devices of a mesh whose tensor axis splits the vocabulary.

  Attributes:
    weights: [N, blocks, 128], 0 beyond the vocabulary.
    sums: [N, blocks].
    width: size of the vocabulary's part on each device, a Python int.
  """

  weights: Array
  sums: Array
  width: int

  @classmethod
  def of(cls, weights: Array) -> 'Blocks':
    """Arranges weights, [N, V], of which none is below 0."""
    rows, vocabulary = weights.shape
    shards = sharding.tensor_shards(vocabulary)
    width = vocabulary // shards
    blocks = weights.reshape(rows, shards, width)
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, -width % _BLOCK)))
    blocks = blocks.reshape(rows, -1, _BLOCK)
    blocks = sharding.constrain(blocks, None, sharding.TENSOR, None)
    return cls(blocks, blocks.sum(axis=-1), width)

  def block(self, rows: Array, block: Array) -> Array:
    """Returns one block of each of the rows, [n, 128]."""
    return self.weights.at[rows, block].get(mode='clip')

  def token(self, block: Array, index: Array) -> Array:
    """Returns the token at an index of a block."""
    shard, block = jnp.divmod(block, -(-self.width // _BLOCK))
    token = shard * self.width + block * _BLOCK + index
    return token.astype(jnp.int32)

  def invert(self, rows: Array, target: Array) -> Array:
    """Returns the token of each row where cumulative weights exceed `target`.

    Args:
      rows: [n] int32, which rows to draw from.
      target: [n] float32, at least 0 and below the row's sum.
    """
    sums = self.sums.at[rows].get(mode='clip')
    block, below = first_above(sums, target[:, None])
    within = self.block(rows, block[:, 0])
    index, _ = first_above(within, target[:, None] - below)
    return self.token(block, index)[:, 0]


def _inverse_cdf(weights: Array, uniform: Array) -> tuple[Array, Array]:
  """Draws an index of each row in proportion to `weights`, [N, V]; their sum.

  A token of weight 0 is never drawn.

  Args:
    weights: at least 0.
    uniform: [N, 1], one number per row.
  """
  blocks = Blocks.of(weights)
  total = blocks.sums.sum(axis=-1)
  rows = jnp.arange(len(weights))
  return blocks.invert(rows, uniform[:, 0] * total), total


def first_above(weights: Array, target: Array) -> tuple[Array, Array]:
  """Finds the index, [N, 1], where cumulative sums exceed `target`; its start.

  XLA adds long sums as a tree, whose rounding lets the cumulative sum fall, or
  rise at a weight of 0.  So only positive weights count, and a target that
  rounding has put past the end selects the last of them.
  """
  possible = weights > 0
  cumulative = jnp.where(possible, jnp.cumsum(weights, axis=-1), 0.0)
  highest = cumulative.max(axis=-1, keepdims=True)
  target = jnp.clip(target, 0.0, highest * (1.0 - 2.0**-23))
  index = jnp.argmax(cumulative > target, axis=-1, keepdims=True)
  start = jnp.take_along_axis(cumulative - weights, index, axis=-1)
  return index, start


def score(
  config: ModelConfig,
  params,
  prompts: Prompts,
  responses: Array,
  decoding: Decoding = Decoding(),
  chunk: int = 256,
) -> head.TokenStatistics:
  """Computes log-probabilities and entropy of responses under the policy.

  Only response positions reach the head, `chunk` of them at a time.

  Args:
    config, params: the model.
    prompts: P prompts.
    responses: [P, G, T] int32; tokens after a response's end are ignored.
    decoding: the settings that the responses were sampled with.
    chunk: positions whose logits, [chunk, V] float32, exist at one time.

  Returns:
    `TokenStatistics` with arrays [P, G, T] in nats.  Differentiable.

  Raises:
    UserError: as `read`.
  """
  hidden = read(config, params, prompts, responses)
  return token_statistics(config, params, hidden, responses, decoding, chunk)


def token_statistics(
  config: ModelConfig,
  params,
  hidden: Array,
  responses: Array,
  decoding: Decoding = Decoding(),
  chunk: int = 256,
) -> head.TokenStatistics:
  """Computes the result of `score` from hidden states.

  Args:
    config, params: the model; only its head is used.
    hidden: [P, G, T, D] from `read`.
    responses: [P, G, T] int32.
    decoding, chunk: as in `score`.
  """
  return head.token_statistics(
    config,
    params,
    hidden,
    responses,
    adjust=functools.partial(_adjust_for_chosen, decoding),
    chunk=chunk,
  )


def _adjust_for_chosen(
  decoding: Decoding, logits: Array, chosen: Array
) -> Array:
  return adjust_logits(logits, decoding, chosen)
