"""`attend` against a loop over single queries in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.attention import Part, attend


def loop(query, parts, scale, softcap):
  """Softmax attention, one query and one head at a time."""
  batch, length, heads, dim = query.shape
  out = np.zeros((batch, length, heads, dim))
  for b, t, n in np.ndindex(batch, length, heads):
    scores, values = [], []
    for keys, vals, valid in parts:
      rows, groups = keys.shape[:2]
      g = batch // rows
      r, h = b // g, n // (heads // groups)
      shape = (rows, 1, g, 1, length, keys.shape[-1])
      seen = np.broadcast_to(valid, shape)[r, 0, b % g, 0, t]
      score = scale * (query[b, t, n] @ keys[r, h].astype(np.float64))
      if softcap is not None:
        score = softcap * np.tanh(score / softcap)
      scores.append(np.where(seen, score, -np.inf))
      values.append(vals[r, h])
    scores, values = np.concatenate(scores), np.concatenate(values)
    weights = np.exp(scores - scores.max())
    out[b, t, n] = weights @ values / weights.sum()
  return out


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_equals_a_loop(softcap):
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  batch, length, heads, groups, dim = 6, 3, 4, 2, 8

  def part(rows, slots, valid):
    return draw(rows, groups, dim, slots), draw(rows, groups, slots, dim), valid

  lengths = np.array([5, 0])[:, None, None, None, None, None]
  parts = [
    part(2, 5, np.arange(5).reshape(1, 1, 1, 1, 1, 5) < lengths),
    part(3, 4, random.random((3, 1, 2, 1, length, 4)) < 0.5),
    part(6, 3, np.tri(3, dtype=bool)[None, None, None, None]),
  ]
  query = draw(batch, length, heads, dim)
  out = attend(
    jnp.asarray(query),
    [Part(*map(jnp.asarray, part)) for part in parts],
    scale=0.7,
    softcap=softcap,
  )
  expected = loop(query, parts, 0.7, softcap)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_huge_scores_stay_finite():
  """Scores near ±1e4 neither overflow nor let a masked key in."""
  query = jnp.full((1, 1, 1, 2), 100.0)
  keys = jnp.array([[[[-100.0, 100.0, 100.0], [0.0, 0.0, 100.0]]]])
  values = jnp.array([[[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]]])
  valid = jnp.array([True, True, False]).reshape(1, 1, 1, 1, 1, 3)
  out = attend(query, [Part(keys, values, valid)], scale=1.0)
  np.testing.assert_array_equal(out, jnp.full((1, 1, 1, 2), 2.0))
