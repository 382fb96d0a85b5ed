"""One token of a distribution, drawn by one uniform number."""

import jax
import jax.numpy as jnp

from jaxrl_llm import sharding
from jaxrl_llm.models import head
from jaxrl_llm.policy import Decoding, adjust_logits

Array = jax.Array

_BLOCK = 128


def choose(
  logits: Array, uniform: Array, decoding: Decoding
) -> tuple[Array, head.TokenStatistics]:
  """Draws one token per row, by inversion of the distribution function.

  Args:
    logits: [N, V] float32, not adjusted.
    uniform: [N] float32 in [0, 1), which alone decides; not read by greedy
      decoding.
    decoding: temperature, top-k, top-p.

  Returns:
    Tokens [N] int32, and what `policy.score` finds of them.
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


def _inverse_cdf(weights: Array, uniform: Array) -> tuple[Array, Array]:
  """Draws an index of each row in proportion to `weights`, [N, V]; their sum.

  One uniform number per row, [N, 1], first a block of 128 tokens, then a token
  of it: far cheaper than a Gumbel variate per token at a large vocabulary.  A
  token of weight 0 is never drawn.  No block lies on two devices of a mesh
  whose tensor axis splits the vocabulary.
  """
  rows, vocabulary = weights.shape
  shards = sharding.tensor_shards(vocabulary)
  own = vocabulary // shards
  blocks = weights.reshape(rows, shards, own)
  blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, -own % _BLOCK)))
  blocks = blocks.reshape(rows, -1, _BLOCK)
  blocks = sharding.constrain(blocks, None, sharding.TENSOR, None)
  sums = blocks.sum(axis=-1)
  total = sums.sum(axis=-1, keepdims=True)
  target = uniform * total
  block, below = _first_above(sums, target)
  within = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
  index, _ = _first_above(within, target - below)
  shard, block = jnp.divmod(block, -(-own // _BLOCK))
  found = shard * own + block * _BLOCK + index
  return found[:, 0].astype(jnp.int32), total[:, 0]


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
