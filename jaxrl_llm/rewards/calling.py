"""Loads reward functions, selects their arguments and converts their results.

Worker processes import it, and start without NumPy.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxrl_llm import naming
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import code, functions, learned, test_scores

# Modules whose functions can be named without a prefix.
_MODULES = (functions, code, learned)

# Functions that may never return on some responses.
_ENDLESS = ('math_verify_answer',)

# Parameters that distinguish a reward function from a factory.
_RESPONSES = frozenset({'prompts', 'completions', 'completion_ids'})


def load_reward(
  name: str, settings: Mapping[str, Any], field: str, killable: bool = False
) -> Callable:
  """Returns the reward function called `name`.

  Args:
    name: a function or factory of `jaxrl_llm.rewards`, 'file.py:function', or
      'module:function'.  A function that takes neither `**kwargs` nor responses
      is a factory: it is called and returns the reward function.
    settings: arguments of the factory; empty for a function.
    field: prefix of the messages.
    killable: True if a time-out can end the process, as it can a worker's.

  Raises:
    UserError: the function does not exist, does not take the settings, or may
      never end where nothing could end it.
  """
  if name in _ENDLESS and not killable:
    raise UserError(
      f'{field}: {name} evaluates text that the model wrote and may never end\n'
      f'set workers, as in dict(name={name!r}, workers=4, timeout=2.0)'
    )
  function = naming.find(_MODULES, name, field)
  taken = inspect.signature(function).parameters.values()
  if not any(
    parameter.kind is parameter.VAR_KEYWORD or parameter.name in _RESPONSES
    for parameter in taken
  ):
    # Only a user's own function knows what a mapping means to it.
    parts = () if ':' in name else test_scores
    return naming.call(_MODULES, {**settings, 'name': name}, field, parts)
  if settings:
    raise UserError(f'{field}: {name} has no setting {next(iter(settings))!r}')
  return function


class Parameters(NamedTuple):
  """The parameters of a function.

  Attributes:
    named: parameters that can be passed by name.
    required: those without a default.  One that is not in `named` is
      positional-only and cannot be passed at all.
    rest: True if it takes any other argument (`**kwargs`).
  """

  named: tuple[str, ...]
  required: tuple[str, ...]
  rest: bool


def parameters(function: Callable) -> Parameters:
  """Returns a function's parameters; `rest` alone if it has no signature."""
  try:
    entries = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    return Parameters((), (), True)
  keyword = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
  )
  single = (*keyword, inspect.Parameter.POSITIONAL_ONLY)
  return Parameters(
    named=tuple(p.name for p in entries if p.kind in keyword),
    required=tuple(
      p.name for p in entries if p.kind in single and p.default is p.empty
    ),
    rest=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in entries),
  )


def select_arguments(
  name: str, taken: Parameters, arguments: Mapping[str, Any]
) -> dict[str, Any]:
  """Selects the arguments that the function can take.

  Args:
    name: the function's name, for the message.
    taken: its parameters.
    arguments: those available, by name.

  Raises:
    UserError: a required argument is not available.
  """
  for parameter in taken.required:
    if parameter not in arguments or parameter not in taken.named:
      raise UserError(
        f'reward {name!r} needs an argument {parameter!r}.\n'
        f'Arguments are passed by name; available are {sorted(arguments)}.'
      )
  if taken.rest:
    return dict(arguments)
  return {k: v for k, v in arguments.items() if k in taken.named}


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
