"""Causal attention over shared prefixes and a row's own tokens.

`attend` works for every pass, and decoding always uses it; `kernels.choose`
selects the passes that use a fused kernel instead.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row of masked scores has no NaN; its exponential is 0.
MASKED = -1e30


class Readers(NamedTuple):
  """Assignment of a batch's rows to the R that they read, in any order.

  Attributes:
    rows: [R, g] int32, as in `Segment.readers`.
    places: [B] int32, index of each row in the flattened `rows`; R · g for one
      that is not in it and reads nothing.
  """

  rows: jax.Array
  places: jax.Array


class Part(NamedTuple):
  """Keys and values of one layer that R rows share among B.

  Attributes:
    keys: [R, H, d, S].
    values: [R, H, S, d].
    valid: the keys that a query may see, [R, 1, g, 1, T, S] or broadcastable to
      it (of the same rank), where g = B // R, or that of the readers.
    readers: None: each of the R is read by the next g rows of the batch.
  """

  keys: jax.Array
  values: jax.Array
  valid: jax.Array
  readers: Readers | None = None


def attend(query, parts, *, scale, softcap=None):
  """Computes softmax attention over the concatenation of all parts.

    oᵢ = Σⱼ softmaxⱼ(scale · qᵢ·kⱼ) vⱼ,   j over the valid keys of every part

  Parts are never concatenated, and a shared part is never copied per row: its
  rows' queries are stacked instead.  Scores and softmax are float32.
  Every query needs at least one valid key (its own).

  Args:
    query: [B, T, N, d], N = H · M query heads (M share a key head).
    parts: sequence of Part.
    scale: multiplies q·k.
    softcap: c of c·tanh(x/c) on the scaled scores, or None.

  Returns:
    [B, T, N, d] in the query's dtype.

  References:
    Juravsky et al., `Hydragen <https://arxiv.org/abs/2402.05099>`_, 2024
  """
  batch, length, heads, dim = query.shape
  groups = parts[0].keys.shape[1]
  query = query.reshape(batch, length, groups, heads // groups, dim)
  query = query.transpose(0, 2, 3, 1, 4)
  scores = [_scores(query, part, scale, softcap) for part in parts]
  highest = MASKED
  for part, score in zip(parts, scores, strict=True):
    of_part = _per_row(score.max(axis=-1), part, MASKED)
    highest = jnp.maximum(highest, of_part)
  # The result does not depend on the shift, so neither does its gradient.
  highest = jax.lax.stop_gradient(highest)
  total, normalizer = 0.0, 0.0
  for part, score in zip(parts, scores, strict=True):
    shift = _per_part(highest, part)
    weights = jnp.exp(score - shift[..., None])
    normalizer += _per_row(weights.sum(axis=-1), part)
    total += _per_row(
      jnp.einsum(
        'rhgmts,rhsd->rhgmtd',
        weights.astype(part.values.dtype),
        part.values,
        preferred_element_type=jnp.float32,
      ),
      part,
    )
  out = (total / normalizer[..., None]).astype(query.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def _scores(query, part: Part, scale, softcap):
  """Computes masked scores [R, H, g, M, T, S] float32 of [B, H, M, T, d]."""
  scores = jnp.einsum(
    'rhgmtd,rhds->rhgmts',
    _per_part(query, part),
    part.keys,
    preferred_element_type=jnp.float32,
  )
  scores = scores * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return jnp.where(part.valid, scores, MASKED)


def _per_part(x, part: Part):
  """Groups rows that share a part: [B, H, ...] → [R, H, g, ...]."""
  if part.readers is None:
    rows = part.keys.shape[0]
    x = x.reshape(rows, x.shape[0] // rows, *x.shape[1:])
  else:
    x = x.at[part.readers.rows].get(mode='clip')
  return x.swapaxes(1, 2)


def _per_row(x, part: Part, nothing=0.0):
  """Inverts `_per_part`; rows that do not read the part get `nothing`."""
  x = x.swapaxes(1, 2)
  x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
  if part.readers is None:
    return x
  return x.at[part.readers.places].get(mode='fill', fill_value=nothing)
