"""Stateless orders over a data set, from which steps take their prompts."""

import datetime
import decimal
import fractions
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.prompts import EncodedPrompts, PromptBatch, gather, sha256

# Types whose `repr` shows the value and nothing else.
_EXACT = (
  *(bytes, complex, decimal.Decimal, fractions.Fraction),
  *(datetime.date, datetime.time, datetime.timedelta),
)


class PromptSource:
  """An endless, seeded order over a data set that keeps no state.

  Batch i is a pure function of (seed, i): a run that resumes at step i needs
  nothing but the number.  Every epoch visits every row once, in a permutation
  given by (seed, epoch); batches run across the ends of epochs, so nothing is
  dropped or repeated within an epoch.
  """

  def __init__(
    self,
    encoded: EncodedPrompts,
    prompts_per_step: int,
    seed: int,
  ):
    """Takes P = prompts_per_step rows at a time; P may exceed their number.

    Args:
      encoded: at least one row.
      prompts_per_step: P.
      seed: of the permutations, not negative.
    """
    for name, value, least in (
      ('number of rows', len(encoded.rows), 1),
      ('number of prompts per step', prompts_per_step, 1),
      ('seed', seed, 0),
    ):
      if value < least:
        raise UserError(f'the {name} must be at least {least}, not {value}.')
    self._encoded = encoded
    self._prompts_per_step = prompts_per_step
    self._seed = seed

  def indices(self, step: int) -> list[int]:
    """Returns the positions of batch `step` among the encoded prompts."""
    n, size = len(self._encoded.rows), self._prompts_per_step
    first, last = step * size, (step + 1) * size - 1
    orders = {e: self._order(e) for e in range(first // n, last // n + 1)}
    return [int(orders[p // n][p % n]) for p in range(first, last + 1)]

  def batch(self, step: int) -> PromptBatch:
    """Returns batch `step`, counted from 0."""
    return gather(self._encoded, self.indices(step))

  def fingerprint(self) -> dict[str, Any]:
    """Returns the facts that give a stored step number its prompts.

    Raises:
      UserError: a row holds a value whose form differs between processes.
    """
    digest = hashlib.sha256()
    for ids in self._encoded.tokens:
      digest.update(len(ids).to_bytes(8, 'little'))
      digest.update(np.ascontiguousarray(ids, '<i4').tobytes())
    return {
      'seed': self._seed,
      'rows': len(self._encoded.rows),
      'prompts_per_step': self._prompts_per_step,
      'tokens_sha256': digest.hexdigest(),
      'rows_sha256': sha256(_canonical(self._encoded.rows)),
      'tokenizer_sha256': self._encoded.tokenizer_hash,
      'template_sha256': self._encoded.template_hash,
    }

  def _order(self, epoch: int) -> np.ndarray:
    # Sorts raw bits: NumPy guarantees the streams of its bit generators, but
    # not the results of Generator.permutation.
    bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
    return np.argsort(bits.random_raw(len(self._encoded.rows)), kind='stable')


def _canonical(rows: Sequence[dict]) -> str:
  """Writes rows as JSON, with tuples and arrays as lists.

  Raises:
    UserError: a value has no such form; names row and column.
  """
  try:
    return json.dumps(rows, sort_keys=True, default=_plain)
  except (TypeError, ValueError, RecursionError):
    for i, row in enumerate(rows):
      for column, value in row.items():
        try:
          json.dumps({column: value}, sort_keys=True, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
          raise UserError(
            f'row {i} has in its column {column!r:.40} a value that JSON '
            f'cannot express: {" ".join(str(error).split()):.80}\n'
            'a resumed run could not recognise it: use numbers, strings, lists '
            'and\ndictionaries (a sorted list for a set)'
          ) from error
    raise


def _plain(value: Any) -> Any:
  """Returns a JSON form of a value that JSON lacks.

  The `repr` of other objects contains their address, and that of a set an order
  that differs between processes.
  """
  if isinstance(value, _EXACT):
    return repr(value)
  if hasattr(value, 'tolist'):  # arrays and scalars of NumPy and the like
    return value.tolist()
  raise TypeError(f'a {type(value).__name__}')


def derive_seed(seed: int, name: str) -> int:
  """Derives a seed for a separate stream, identified by its name."""
  return int(sha256(f'{seed} {name}')[:8], 16)
