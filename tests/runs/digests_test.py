"""Digests: every bit and every position counts, no layout does."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import digests

WORD = 2**32


def mix(x):
  x = (x ^ (x >> 16)) * 0x85EBCA6B % WORD
  x = (x ^ (x >> 13)) * 0xC2B2AE35 % WORD
  return x ^ (x >> 16)


def constant(lane, axis):
  text = f'{lane} {axis}'.encode()
  return int.from_bytes(hashlib.sha256(text).digest()[:4], 'big') | 1


def by_loops(words, lane):
  """The docstring's sum over an array of uint32 words, in Python integers."""
  total = 0
  for index, word in np.ndenumerate(words):
    position = constant(lane, -1)
    for axis, i in enumerate(index):
      position = (position + i * constant(lane, axis)) % WORD
    word = int(word)
    mixed = word ^ mix(position) if lane else (word + position) % WORD
    total += mix(mixed)
  return total % WORD


def of(array):
  return tuple(np.asarray(digests.digest(array)).tolist())


def example(dtype, shape):
  size = jnp.dtype(dtype).itemsize
  raw = np.random.default_rng(0).integers(0, 256, (*shape, size), np.uint8)
  return raw.view(jnp.dtype(dtype))[..., 0]


@pytest.mark.parametrize('shape', [(), (7,), (3, 5), (2, 3, 4)])
def test_equals_the_formula(shape):
  array = example('uint32', shape)
  assert of(array) == (by_loops(array, 0), by_loops(array, 1))


DTYPES = 'float32', 'bfloat16', 'float8_e4m3fn', 'int32', 'int16', 'uint8'


@pytest.mark.parametrize('dtype', DTYPES)
def test_every_bit_counts(dtype):
  array = example(dtype, (2, 3))
  seen = {of(array)}
  for bit in range(8 * array.nbytes):
    raw = np.frombuffer(array.tobytes(), np.uint8).copy()
    raw[bit // 8] ^= 1 << bit % 8
    seen.add(of(raw.view(array.dtype).reshape(2, 3)))
  assert len(seen) == 1 + 8 * array.nbytes


def test_other_dtypes():
  mask = jnp.array([True, False])
  assert of(mask) != of(mask[::-1])
  array = jnp.asarray([1 + 2j, 3 - 1j], jnp.complex64)
  assert of(array) != of(array.conj())
  with jax.enable_x64(True):
    array = np.array([1.0, 2.0])
    assert of(array) != of(np.nextafter(array, 3))
  key = jax.random.key(3)
  assert of(key) == of(jax.random.key_data(key)) != of(jax.random.key(4))


@pytest.mark.parametrize(
  'tree, message',
  [
    ({'step': 3}, 'step in the state is a int'),
    ({'a/b': np.zeros(1, bool), 'a': {'b': np.zeros(1, bool)}}, 'called a/b'),
    ({'n': np.zeros(2, np.int64)}, 'n in the state is int64'),
  ],
)
def test_leaves_that_cannot_be_saved_are_named(tree, message):
  with pytest.raises(UserError, match=message):
    digests.named_leaves(tree)
