"""Loads a reward function by its name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_llm import naming
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import code, functions, learned, test_scores

# Modules whose functions can be named without a prefix.
_MODULES = (functions, code, learned)

# Functions that may never return on some responses.
_ENDLESS = ('math_verify_answer',)

# Parameters that distinguish a reward function from a factory.
_RESPONSES = frozenset({'prompts', 'completions', 'completion_ids'})


def load(
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
