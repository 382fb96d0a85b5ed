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
    lengths: [R] int32, how many of the S tokens are real; 0 is allowed.  Or
      [R, g], g parts of the rows that share a prefix reading different
      lengths of it: branches of one response fork at different tokens.
  """

  keys: jax.Array
  values: jax.Array
  lengths: jax.Array

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
    prefixes: read-only segments in reading order.  R divides B, and row b
      reads row b // (B // R): samples of one prompt share its segment.
    suffix: the rows' own tokens, B rows, written at `index` by each call.
      Its `lengths` are not read; set them when making it a prefix.
      None is teacher forcing: the call's tokens are the whole suffix, and
      nothing is stored.
    index: int32 scalar, tokens already in the suffix.  It must stay below
      the suffix's capacity: a write past the end lands on the last tokens.
  """

  prefixes: tuple[Segment, ...]
  suffix: Segment | None
  index: jax.Array
