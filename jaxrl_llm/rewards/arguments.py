"""Which arguments a reward function takes, and how they are given to it."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError


class Parameters(NamedTuple):
  """What a function takes.

  Attributes:
    named: parameters that can be passed by name.
    required: those without a default; one that is not among `named` can be
      passed by position alone, that is, not at all.
    rest: whether it takes whatever else there is (`**kwargs`).
  """

  named: tuple[str, ...]
  required: tuple[str, ...]
  rest: bool


def parameters(function: Callable) -> Parameters:
  """The parameters of a function; of one without a signature, `rest` alone."""
  try:
    found = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):
    return Parameters((), (), True)
  keyword = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
  )
  single = (*keyword, inspect.Parameter.POSITIONAL_ONLY)
  return Parameters(
    named=tuple(p.name for p in found if p.kind in keyword),
    required=tuple(
      p.name for p in found if p.kind in single and p.default is p.empty
    ),
    rest=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found),
  )


def select(
  name: str, taken: Parameters, arguments: Mapping[str, Any]
) -> dict[str, Any]:
  """The arguments that the function can take.

  Args:
    name: of the function, for the message.
    taken: its parameters.
    arguments: what there is.

  Raises:
    UserError: it needs one that there is not.
  """
  for parameter in taken.required:
    if parameter not in arguments or parameter not in taken.named:
      raise UserError(
        f'reward {name!r} needs an argument {parameter!r}.\n'
        f'Arguments are passed by name; there are {sorted(arguments)}.'
      )
  if taken.rest:
    return dict(arguments)
  return {k: v for k, v in arguments.items() if k in taken.named}


def encode_each(
  name: str, arguments: Mapping[str, Sequence[Any]], count: int
) -> list[bytes]:
  """The arguments of `count` calls with one sample each, as JSON objects.

  Args:
    name: of the function, for the message.
    arguments: `count` values each.
    count: of the completions.

  Raises:
    UserError: there are more or fewer values, or one is no JSON value.
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
          f'\nWorker processes, in which {name!r} runs, are sent JSON values: '
          'text, numbers,\nbooleans, None, lists, and dictionaries with texts '
          'as keys.'
        )
  return [
    json.dumps({key: [values[i]] for key, values in arguments.items()}).encode()
    for i in range(count)
  ]


def is_json(value: Any) -> bool:
  """Whether the value comes back from JSON as it is: no tuple, no array."""
  kind = type(value)
  if kind is list:
    return all(map(is_json, value))
  if kind is dict:
    return all(type(key) is str for key in value) and all(
      map(is_json, value.values())
    )
  return value is None or kind in (str, int, float, bool)
