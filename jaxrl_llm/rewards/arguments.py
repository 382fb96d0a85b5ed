"""Selection and encoding of a reward function's arguments."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError


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


def select(
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


def encode_each(
  name: str, arguments: Mapping[str, Sequence[Any]], count: int
) -> list[bytes]:
  """Encodes the arguments of `count` calls, one sample each, as JSON objects.

  Args:
    name: the function's name, for the message.
    arguments: `count` values each.
    count: number of completions.

  Raises:
    UserError: the number of values is not `count`, or one is not a JSON value.
  """
  for column, values in arguments.items():
    if len(values) != count:
      raise UserError(
        f'there are {count} completions to score but {len(values)} entries in '
        f'{column!r}.'
      )
    for i, value in enumerate(values):
      if not is_json(value):
        raise UserError(
          f'the column {column!r} holds a {type(value).__name__} at sample {i}.'
          f'\n{name!r} runs in worker processes, which take JSON values: text, '
          'numbers,\nbooleans, None, lists, and dictionaries with string keys.'
        )
  return [
    json.dumps({key: [values[i]] for key, values in arguments.items()}).encode()
    for i in range(count)
  ]


def is_json(value: Any) -> bool:
  """Returns True if JSON preserves the value: not a tuple, not an array."""
  kind = type(value)
  if kind is list:
    return all(map(is_json, value))
  if kind is dict:
    return all(type(key) is str for key in value) and all(
      map(is_json, value.values())
    )
  return value is None or kind in (str, int, float, bool)
