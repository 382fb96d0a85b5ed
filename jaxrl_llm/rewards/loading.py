"""From the name of a reward function to the function."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_llm import naming
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import code, functions, learned, test_scores

# Modules with the functions that may be named by themselves.
_MODULES = (functions, code, learned)

# What they do with a response may never end.
_ENDLESS = ('math_verify_answer',)

# Parameters that tell a reward function from a factory of one.
_RESPONSES = frozenset({'prompts', 'completions', 'completion_ids'})


def load(
  name: str, settings: Mapping[str, Any], field: str, killable: bool = False
) -> Callable:
  """The reward function that `name` stands for.

  Args:
    name: of a function or a factory of `jaxrl_llm.rewards`, or
      'file.py:function', or 'module:function'.  What takes neither `**kwargs`
      nor responses is a factory: it is called, and gives the function.
    settings: arguments of the factory; of a function there are none.
    field: what the messages begin with.
    killable: whether a time-out can end the process, as it can a worker's.

  Raises:
    UserError: no such function, or settings that it does not take, or one that
      may never end where nothing could end it.
  """
  if name in _ENDLESS and not killable:
    raise UserError(
      f'{field}: {name} evaluates what the model writes, which may never end\n'
      f'set workers, as in dict(name={name!r}, workers=4, timeout=2.0)'
    )
  function = naming.find(_MODULES, name, field)
  taken = inspect.signature(function).parameters.values()
  if not any(
    parameter.kind is parameter.VAR_KEYWORD or parameter.name in _RESPONSES
    for parameter in taken
  ):
    # What a mapping means to a user's own function is the user's affair.
    parts = () if ':' in name else test_scores
    return naming.call(_MODULES, {**settings, 'name': name}, field, parts)
  if settings:
    raise UserError(f'{field}: {name} has no setting {next(iter(settings))!r}')
  return function
