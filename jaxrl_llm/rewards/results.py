"""What a reward function returned, as numbers or not at all."""

import math
import numbers
from typing import Any

from jaxrl_llm.errors import UserError


def as_list(name: str, result: Any, count: int) -> list:
  """A function's result as a list of `count` values.

  Args:
    name: of the function, for the message.
    result: what it returned; lists, tuples and arrays [count] will do.  What
      an array masks is None.
    count: of the completions.

  Raises:
    UserError: it is something else, or of another length.
  """
  if hasattr(result, '__array__'):
    import numpy as np  # Late: worker processes start faster without it.

    result = np.asanyarray(result)  # A mask stays.
    kind = f'an array of shape {result.shape}'
    values = result.tolist() if result.ndim == 1 else None
  else:
    kind = f'{type(result).__name__} {shortened(repr(result))}'
    values = list(result) if isinstance(result, (list, tuple)) else None
  if values is None:
    raise UserError(
      f'reward {name!r} returned {kind}.\n'
      f'It must return a list of {count} numbers, one per completion.'
    )
  if len(values) != count:
    raise UserError(
      f'reward {name!r} returned {len(values)} values for {count} completions.'
      '\nIt must return one per completion.'
    )
  return values


# The device computes in float32, of which this is the largest number.
LARGEST = 3.4028234663852886e38


def as_float(value: Any) -> float:
  """One value as a float that float32 holds, NaN for None.

  Raises:
    ValueError: it is no real number, or neither finite nor at most `LARGEST`.
  """
  if getattr(value, 'shape', None) == () and hasattr(value, 'tolist'):
    value = value.tolist()  # A scalar of NumPy or JAX; None if it is masked.
  if value is None:
    return math.nan
  number = math.nan
  if isinstance(value, numbers.Real):
    try:
      number = float(value)
    except OverflowError:
      number = math.inf
  # False of NaN, too.
  if not abs(number) <= LARGEST:
    raise ValueError(f'{shortened(repr(value))} is no finite float32')
  return number


def shortened(text: str, length: int = 60) -> str:
  """One line of at most `length` characters and an ellipsis."""
  line = ' '.join(text.split())
  return line if len(line) <= length else line[:length] + '…'
