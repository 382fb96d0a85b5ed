"""Keys and values that outlive one call of the model."""

import chex
import jax
import jax.numpy as jnp


@chex.dataclass(frozen=True)
class Segment:
  """Keys and values of consecutive tokens of R rows.

  Attributes:
    keys: for each layer [R, H, d, S], after rotation: an array [L, ...], or a
      tuple of L where they are read or written one token at a time, which
      would copy a layer out of an array at every token.  The token axis is last
      because the scores' matrix product then reads it contiguously on CPU.
    values: likewise [R, H, S, d].
    lengths: [R] int32, number of real tokens among the S; 0 is allowed.
    readers: [R, g] int32, the batch's rows, of B, that read each of the R;
      numbers outside the batch are ignored.  A row occurs at most once; one
      that does not occur reads nothing.  None: R divides B, and row b reads row
      b // (B // R).
  """

  keys: jax.Array | tuple[jax.Array, ...]
  values: jax.Array | tuple[jax.Array, ...]
  lengths: jax.Array
  readers: jax.Array | None = None

  @property
  def rows(self) -> int:
    return jax.tree.leaves(self.keys)[0].shape[-4]

  @property
  def capacity(self) -> int:
    return jax.tree.leaves(self.keys)[0].shape[-1]

  def split(self) -> 'Segment':
    """Returns a copy with a tuple of layers."""
    return self.replace(keys=tuple(self.keys), values=tuple(self.values))

  def stacked(self) -> 'Segment':
    """Returns a copy with an array of layers."""
    return self.replace(
      keys=jnp.asarray(self.keys), values=jnp.asarray(self.values)
    )


@chex.dataclass(frozen=True)
class Cache:
  """Tokens that B rows have read: shared prefixes, then their own suffix.

  Attributes:
    prefixes: read-only segments in reading order, shared by rows: samples of
      one prompt share its segment.
    suffix: the rows' own tokens, B rows, written at `index` by each call.
      Its `lengths` are not read; set them when making it a prefix.
      None is teacher forcing: the call's tokens are the whole suffix, and
      nothing is stored.
    index: int32 scalar, tokens already in the suffix.  It must stay below
      the suffix's capacity: a write past the end lands on the last tokens.
      Or [B], one per row, where an index at the capacity writes nothing:
      setting a row's index back forks it there and discards its later tokens.
  """

  prefixes: tuple[Segment, ...]
  suffix: Segment | None
  index: jax.Array
