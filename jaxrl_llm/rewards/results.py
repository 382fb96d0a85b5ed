"""Conversion of a reward function's result to numbers."""

import math
import numbers
from typing import Any

from jaxrl_llm.errors import UserError


def as_list(name: str, result: Any, count: int) -> list:
  """Converts a function's result to a list of `count` values.

  Args:
    name: the function's name, for the message.
    result: a list, tuple or array [count]; an array's masked elements become
      None.
    count: number of completions.

  Raises:
    UserError: it has another type or length.
  """
  if hasattr(result, '__array__'):
    import numpy as np  # Late: worker processes start faster without it.

    result = np.asanyarray(result)  # Keeps a mask.
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


# The largest float32: the device computes in float32.
LARGEST = 3.4028234663852886e38


def as_float(value: Any) -> float:
  """Converts a value to a float within float32's range; None becomes NaN.

  Raises:
    ValueError: it is not a real number within ±`LARGEST`.
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
  # The comparison is False for NaN, too.
  if not abs(number) <= LARGEST:
    raise ValueError(f'{shortened(repr(value))} is not a finite float32')
  return number


def shortened(text: str, length: int = 60) -> str:
  """Returns the text as a line cut to `length` characters and an ellipsis."""
  line = ' '.join(text.split())
  return line if len(line) <= length else line[:length] + '…'
