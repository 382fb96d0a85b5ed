"""Keys and values that outlive one call of the model."""

import chex
import jax


@chex.dataclass(frozen=True)
class Segment:
  """Keys and values of consecutive tokens of R rows.

  Attributes:
    keys: [L, R, H, d, S], after rotation.  The token axis is last because the
      scores' matrix product then reads it contiguously on CPU.
    values: [L, R, H, S, d].
    lengths: [R] int32, how many of the S tokens are real; 0 is allowed.
    readers: [R, g] int32, which of the batch's B rows read each of the R; a
      number that is no row is nobody.  A row stands here once, or nowhere and
      reads nothing.  None: R divides B, and row b reads row b // (B // R).
  """

  keys: jax.Array
  values: jax.Array
  lengths: jax.Array
  readers: jax.Array | None = None

  @property
  def rows(self) -> int:
    return self.keys.shape[1]

  @property
  def capacity(self) -> int:
    return self.keys.shape[-1]


@chex.dataclass(frozen=True)
class Cache:
  """What B rows have already read: shared prefixes, then their own suffix.

  Attributes:
    prefixes: read-only segments in reading order, shared by rows: samples of
      one prompt share its segment.
    suffix: the rows' own tokens, B rows, written at `index` by each call.
      Its `lengths` are not read; set them when making it a prefix.
      None is teacher forcing: the call's tokens are the whole suffix, and
      nothing is stored.
    index: int32 scalar, tokens already in the suffix.  It must stay below
      the suffix's capacity: a write past the end lands on the last tokens.
      Or [B], each row's own, where one at the capacity writes nothing: a row
      whose index is set back forks there, and its later tokens are forgotten.
  """

  prefixes: tuple[Segment, ...]
  suffix: Segment | None
  index: jax.Array
