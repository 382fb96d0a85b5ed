"""Loads reward functions, selects their arguments and converts their results.

Worker processes import it, and start without NumPy.
"""

import functools
import inspect
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_llm import naming
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import code, functions, learned, step_scores

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
    settings: arguments of the factory, or keyword-only ones of a function,
      which have defaults.
    field: prefix of the messages, which are UserErrors.
    killable: True if a time-out can end the process, as it can a worker's.
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
    parts = () if ':' in name else step_scores
    return naming.call(_MODULES, {**settings, 'name': name}, field, parts)
  defaults = {p.name: p.default for p in taken if p.kind is p.KEYWORD_ONLY}
  for key, value in settings.items():
    default = defaults.get(key, inspect.Parameter.empty)
    if default is inspect.Parameter.empty:
      raise UserError(f'{field}: {name} has no setting {key!r}')
    kinds = (int, float) if type(default) is float else (type(default),)
    if default is not None and type(value) not in kinds:
      raise UserError(
        f'{field}: {key} is {value!r}, not of the type of {default!r}'
      )
  return functools.partial(function, **settings) if settings else function


class Parameters(NamedTuple):
  """Parameters of a function.

  Attributes:
    named: those that can be passed by name.
    required: those without a default; positional-only ones cannot be passed.
    rest: True if it takes any other argument (`**kwargs`).
  """

  named: Sequence[str]
  required: Sequence[str]
  rest: bool


def parameters(function: Callable) -> Parameters:
  """Returns a function's parameters; `rest` alone if it has no signature."""
  try:
    entries = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    return Parameters((), (), True)
  named = [
    p.name
    for p in entries
    if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
  ]
  rest = [p for p in entries if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
  required = [p.name for p in entries if p.default is p.empty and p not in rest]
  return Parameters(named, required, any(p.kind is p.VAR_KEYWORD for p in rest))


def select_arguments(
  name: str, taken: Parameters, arguments: Mapping[str, Any]
) -> dict[str, Any]:
  """Selects the arguments that the function called `name` can take.

  Raises:
    UserError: a required argument is not available, or an argument does not
      have an entry per completion.
  """
  count = len(arguments['completions'])
  for column, values in arguments.items():
    if len(values) != count:
      raise UserError(
        f'there are {count} completions to score but {len(values)} entries in '
        f'{column!r}.'
      )
  for parameter in taken.required:
    if parameter not in arguments or parameter not in taken.named:
      raise UserError(
        f'reward {name!r} needs an argument {parameter!r}.\n'
        f'Arguments are passed by name; available are {sorted(arguments)}.'
      )
  if taken.rest:
    return dict(arguments)
  return {k: v for k, v in arguments.items() if k in taken.named}


def encode_each(name: str, arguments: Mapping[str, Sequence]) -> list[bytes]:
  """Encodes the arguments of one call per sample as JSON objects.

  Raises:
    UserError: an entry is not a JSON value.
  """
  for column, values in arguments.items():
    for i, value in enumerate(values):
      if not is_json(value):
        raise UserError(
          f'the column {column!r} holds a {type(value).__name__} at sample {i}.'
          f'\n{name!r} runs in worker processes, which take JSON values: text, '
          'numbers,\nbooleans, None, lists, and dictionaries with string keys.'
        )
  return [
    json.dumps({k: [x] for k, x in zip(arguments, row, strict=True)}).encode()
    for row in zip(*arguments.values(), strict=True)
  ]


def is_json(value: Any) -> bool:
  """Returns True if JSON preserves the value: not a tuple, not an array."""
  if type(value) is dict:
    return all(type(key) is str and is_json(value[key]) for key in value)
  if type(value) is list:
    return all(map(is_json, value))
  return value is None or type(value) in (str, int, float, bool)


# The largest float32: the device computes in float32.
LARGEST = 3.4028234663852886e38


def as_floats(
  name: str, result: Any, completions: Sequence[str]
) -> list[float]:
  """Converts the result of the function `name` to a float per completion.

  It may be a list, tuple or array of real numbers within ±`LARGEST`.  None and
  an array's masked elements become NaN.

  Raises:
    UserError: it is anything else.
  """
  values = list(result) if isinstance(result, (list, tuple)) else None
  if hasattr(result, '__array__'):
    import numpy as np  # Late: worker processes start faster without it.

    array = np.asanyarray(result)  # Keeps a mask.
    values = array.tolist() if array.ndim == 1 else None
  count = len(completions)
  if values is None or len(values) != count:
    size = '' if values is None else f'{len(values)} values: '
    raise UserError(
      f'reward {name!r} returned {size}{type(result).__name__} '
      f'{shortened(repr(result))}.\n'
      f'It must return a list of {count} numbers, one per completion.'
    )
  scores = list(map(_as_float, values))
  if None in scores:
    i = scores.index(None)
    raise UserError(
      f'reward {name!r} returned {shortened(repr(values[i]))} for sample {i}, '
      f'completion {shortened(completions[i])!r}.\n'
      'A score must be a finite float32, or None for no score.'
    )
  return scores


def _as_float(value: Any) -> float | None:
  """Returns a score, NaN for None; None if it is not one."""
  if getattr(value, 'shape', None) == () and hasattr(value, 'tolist'):
    value = value.tolist()  # A scalar of NumPy or JAX; None if it is masked.
  if value is None:
    return math.nan
  try:
    number = float(value) if isinstance(value, numbers.Real) else math.nan
  except OverflowError:
    number = math.inf
  # The comparison is False for NaN, too.
  return number if abs(number) <= LARGEST else None


def shortened(text: str, length: int = 60) -> str:
  """Returns the text as a line cut to `length` characters and an ellipsis."""
  line = ' '.join(text.split())
  return line if len(line) <= length else line[:length] + '…'
