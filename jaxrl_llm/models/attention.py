"""Causal attention over shared prefixes and a row's own tokens.

Every pass can be computed here, and decoding is; `kernels.choose` says which
passes have a fused kernel instead.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row of masked scores has no NaN; its exponential is 0.
MASKED = -1e30


class Readers(NamedTuple):
  """Which rows of a batch read which part of it, in any order.

  Attributes:
    rows: [R, g] int32, as `Segment.readers`.
    places: [B] int32, where in the flat `rows` each row stands; R · g for one
      that stands nowhere and reads nothing.
  """

  rows: jax.Array
  places: jax.Array


class Part(NamedTuple):
  """Keys and values of one layer that R rows share among B.

  Attributes:
    keys: [R, H, d, S].
    values: [R, H, S, d].
    valid: which keys a query may see, [R, 1, g, 1, T, S] or broadcastable to
      it (of the same rank), where g = B // R, or that of the readers.
    readers: None: each of the R is read by the next g rows of the batch.
  """

  keys: jax.Array
  values: jax.Array
  valid: jax.Array
  readers: Readers | None = None


def attend(query, parts, *, scale, softcap=None):
  """Softmax attention over the concatenation of all parts.

    oᵢ = Σⱼ softmaxⱼ(scale · qᵢ·kⱼ) vⱼ,   j over the valid keys of every part

  The parts are never concatenated and a shared part is never copied per row:
  its rows' queries are stacked instead.  Scores and softmax are float32.
  Every query needs at least one valid key (its own).

  Args:
    query: [B, T, N, d], N = H · M query heads (M share a key head).
    parts: sequence of Part.
    scale: multiplies q·k.
    softcap: c of c·tanh(x/c) on the scaled scores, or None.

  Returns:
    [B, T, N, d] of the query's dtype.

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
  """Masked scores [R, H, g, M, T, S] float32 of queries [B, H, M, T, d]."""
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
  """[B, H, ...] to [R, H, g, ...]: the rows that share a part, side by side."""
  if part.readers is None:
    rows = part.keys.shape[0]
    x = x.reshape(rows, x.shape[0] // rows, *x.shape[1:])
  else:
    x = x.at[part.readers.rows].get(mode='clip')
  return x.swapaxes(1, 2)


def _per_row(x, part: Part, nothing=0.0):
  """[R, H, g, ...] back to [B, H, ...]; `nothing` for rows that do not read."""
  x = x.swapaxes(1, 2)
  x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
  if part.readers is None:
    return x
  return x.at[part.readers.places].get(mode='fill', fill_value=nothing)
