"""Names, shapes, dtypes and digests of the arrays in a tree."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.errors import UserError


def named_leaves(tree) -> dict:
  """Returns the leaves of a tree of arrays by name, such as `params/layers/w`.

  Raises:
    UserError: a leaf is not an array, two share a name, or JAX would convert
      one.
  """
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/') or 'state'
    if name in leaves:
      raise UserError(f'Two leaves are called {name}: use no slash in names.')
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise UserError(
        f'{name} in the state is a {type(leaf).__name__}, not an array.\n'
        'Make it an array, or keep it in the metadata.'
      )
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    kept = leaf.dtype if key else jax.dtypes.canonicalize_dtype(leaf.dtype)
    if kept != leaf.dtype:
      raise UserError(
        f'{name} in the state is {leaf.dtype}, which JAX would make {kept}.\n'
        'Convert it yourself, or set jax_enable_x64.'
      )
    leaves[name] = leaf
  return leaves


def describe(leaves: dict) -> dict:
  """Returns shape, dtype and digest of each leaf, as JSON values."""
  described = {}
  for name, leaf in leaves.items():
    # One at a time: full devices of several processes wait for each other.
    lanes = ''.join(f'{lane:08x}' for lane in np.asarray(digest(leaf)))
    form = {'dtype': str(leaf.dtype), 'shape': list(leaf.shape)}
    described[name] = {**form, 'digest': lanes}
  return described


def differences(stored: dict, wanted: dict) -> list[str]:
  """Returns the differences between stored and wanted leaves, a phrase each.

  Args:
    stored: as `describe` returns them.
    wanted: arrays or their shapes, by name.
  """
  there = {n: f'{x["dtype"]}{x["shape"]}' for n, x in stored.items()}
  here = {n: f'{x.dtype}{list(x.shape)}' for n, x in wanted.items()}
  return [
    f'{name} is {there.get(name, "missing")} in it, '
    f'the program wants {here.get(name, "none")}'
    for name in {**here, **there}
    if here.get(name) != there.get(name)
  ]


def digest(array) -> jax.Array:
  """Computes a digest of an array's bits that does not depend on its sharding.

    dₗ = Σᵢ mixₗ(bitsᵢ, positionᵢ)  mod 2³²,   l = 1, 2

  An integer sum has no order, so every layout gives the same 64 bits.  mixₗ is
  a bijection of the word at each position: a change of one 32-bit word always
  changes the sum; other changes escape with probability about 2⁻⁶⁴.  The
  mixing steps are those of `MurmurHash3
  <https://github.com/aappleby/smhasher/wiki/MurmurHash3>`_'s finaliser.

  Args:
    array: an array of any dtype and sharding, or typed PRNG keys.

  Returns:
    uint32 array [2] on the array's devices.
  """
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  return _digest(array)


@jax.jit
def _digest(array):
  words = _words(array)
  lanes = []
  for lane in range(2):
    position = jnp.full(words.shape, _odd_constant(lane, -1))
    for axis in range(words.ndim):
      index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
      position += index * _odd_constant(lane, axis)
    mixed = _mix(words ^ _mix(position)) if lane else _mix(words + position)
    lanes.append(jnp.sum(mixed, dtype=jnp.uint32))
  return jnp.stack(lanes)


def _words(array):
  """Returns the array's bits as uint32; 8-byte elements get an axis of 2."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  if jnp.issubdtype(array.dtype, jnp.complexfloating):
    return _words(jnp.stack([array.real, array.imag], axis=-1))
  bits = jax.lax.bitcast_convert_type
  size = array.dtype.itemsize
  if size >= 4:
    return bits(array, jnp.uint32)
  return bits(array, {1: jnp.uint8, 2: jnp.uint16}[size]).astype(jnp.uint32)


def _mix(x):
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _odd_constant(lane, axis):
  """Returns a constant unrelated to those of other axes and lanes."""
  text = f'{lane} {axis}'.encode()
  return np.uint32(int.from_bytes(hashlib.sha256(text).digest()[:4]) | 1)
