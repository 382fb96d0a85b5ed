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


def by_loops(words):
  """The docstring's sum over an array of uint32 words, in Python integers."""
  lanes = []
  for lane in range(2):
    total = 0
    for index, word in np.ndenumerate(words):
      position = constant(lane, -1)
      for axis, i in enumerate(index):
        position = (position + i * constant(lane, axis)) % WORD
      word = int(word)
      total += (
        mix(word ^ mix(position)) if lane else mix((word + position) % WORD)
      )
    lanes.append(total % WORD)
  return lanes


def of(array):
  return tuple(np.asarray(digests.digest(array)).tolist())


def example(dtype, shape=(3, 5)):
  rng = np.random.default_rng(0)
  size = jnp.dtype(dtype).itemsize
  raw = rng.integers(0, 256, (*shape, size), np.uint8)
  if dtype == jnp.bool_:
    return jnp.asarray(raw[..., 0] > 127)
  return jnp.asarray(raw.view(jnp.dtype(dtype))[..., 0])


def test_equals_the_formula():
  for shape in [(), (7,), (3, 5), (2, 3, 4)]:
    array = example(jnp.uint32, shape)
    assert list(of(array)) == by_loops(np.asarray(array))
  half = example(jnp.bfloat16)
  words = np.asarray(half).view(np.uint16).astype(np.uint32)
  assert list(of(half)) == by_loops(words)


@pytest.mark.parametrize(
  'dtype',
  [
    *('float32', 'bfloat16', 'float16', 'float8_e4m3fn'),
    *('int32', 'uint32', 'int16', 'int8', 'uint8'),
  ],
)
def test_every_bit_counts(dtype):
  array = np.asarray(example(dtype, (2, 3)))
  size = array.dtype.itemsize
  seen = {of(array)}
  for byte in range(array.nbytes):
    for bit in range(8):
      raw = np.frombuffer(array.tobytes(), np.uint8).copy()
      raw[byte] ^= 1 << bit
      seen.add(of(raw.view(array.dtype).reshape(2, 3)))
  assert len(seen) == 1 + 6 * 8 * size


def test_other_dtypes():
  array = example(jnp.bool_)
  assert of(array) != of(array.at[1, 1].set(~array[1, 1]))
  array = jnp.asarray([1 + 2j, 3 - 1j], jnp.complex64)
  assert len({of(array), of(array.conj()), of(array[::-1])}) == 3
  with jax.enable_x64(True):
    array = np.array([1.0, 2.0])
    assert of(array) != of(np.nextafter(array, 3))
  assert of(np.float32([0.0])) != of(np.float32([-0.0]))
  bits = np.array([0x7FC00000, 0x7FC00001], np.uint32)  # two NaNs
  assert of(bits[:1].view(np.float32)) != of(bits[1:].view(np.float32))
  key = jax.random.key(3)
  assert of(key) == of(jax.random.key_data(key)) != of(jax.random.key(4))


def test_positions_count():
  array = example('float32', (4, 4))
  same = [array, array.T, array[::-1], array[:, ::-1], jnp.roll(array, 1, 0)]
  swapped = np.array(array)
  swapped[0, 3], swapped[1, 0] = swapped[1, 0], swapped[0, 3]
  assert len({of(x) for x in [*same, swapped]}) == 6
  zeros = {of(jnp.zeros(shape)) for shape in [(), (1,), (4,), (2, 2), (8,)]}
  assert len(zeros) >= 4  # (1,) holds the same word as ()


def test_names():
  tree = {'a': {'b': [np.zeros(2, np.float32)]}, 'c': (), 'd': None}
  assert list(digests.named_leaves(tree)) == ['a/b/0']
  assert list(digests.named_leaves(np.zeros(2, np.float32))) == ['state']


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
