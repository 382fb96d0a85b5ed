"""Trees of arrays, compared."""

import jax
import numpy as np


def bits(leaf) -> bytes:
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf).tobytes()


def assert_same(one, other):
  """The same structure, and the same bits in the same types."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert bits(x) == bits(y)


def assert_close(one, other, rtol=1e-5, atol=1e-6):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
