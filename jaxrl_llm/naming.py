"""Calls functions by name: `dict(name='grpo', clip=0.2)` → `grpo(clip=0.2)`.

Wrong keys are refused.  A name is that of a public function of the library's
module, or 'file.py:function' or 'package.module:function' for a user's own.
The standard library's functions are refused: none of them is a reward or an
estimator, and some run commands.
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from jaxrl_llm.errors import UserError

# The modules whose functions a name may mean.
Modules = ModuleType | Sequence[ModuleType]

# Callables that know the module that defined them.
_DEFINED = (BuiltinFunctionType, FunctionType, MethodType, type)


def find(modules: Modules, name: str, field: str) -> Callable:
  """Returns the function `name` of `modules`, or of a file or module it names.

  Args:
    modules: where the functions live.
    name: the function's name, 'file.py:function' or 'module:function'.
    field: the configuration field, for the message.

  Raises:
    UserError: it does not exist; suggests the nearest name.
  """
  if not isinstance(name, str):
    raise UserError(f'{field}: the name is {name!r}, not a text')
  if ':' in name:
    return _load(name, field)
  if isinstance(modules, ModuleType):
    modules = (modules,)
  functions = {
    key: value
    for module in modules
    for key, value in vars(module).items()
    if inspect.isfunction(value)
    and not key.startswith('_')
    and value.__module__ == module.__name__
  }
  if name in functions:
    return functions[name]
  raise UserError(
    f'{field}: no {name!r} in {modules[0].__name__}\n'
    f'{_hint(name, functions)}choose one of {", ".join(sorted(functions))}'
  )


def _hint(name: str, names: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, names, 1)
  return f'did you mean {near[0]!r}? ' if near else ''


def call(
  modules: Modules,
  spec: Mapping[str, Any],
  field: str,
  parts: Modules = (),
  **extra: Any,
) -> Any:
  """Calls the function that `spec['name']` names with the other entries.

  Args:
    modules: where the functions live.
    spec: name and keyword arguments.
    field: the configuration field, for the message.
    parts: modules with the functions that an argument may name; it is then the
      function's result, as in `dict(name='ppo', kl=dict(name='adaptive_kl',
      …))`.  Without them an argument is passed as it is.
    **extra: arguments that do not come from a configuration; passed only to a
      function that has a parameter of that name.

  Raises:
    UserError: the function does not exist, or does not take the arguments.
  """
  arguments = dict(spec)
  name = arguments.pop('name', None)
  if name is None:
    raise UserError(f"{field} has no 'name'")
  function = find(modules, name, field)
  parameters = inspect.signature(function).parameters
  for key in arguments:
    if key not in parameters:
      raise UserError(
        f'{field}: {name} has no parameter {key!r}\n'
        f'{_hint(key, parameters)}it takes {", ".join(parameters) or "none"}'
      )
  if parts:
    arguments = {
      key: call(parts, value, f'{field}.{key}', parts)
      if isinstance(value, Mapping)
      else value
      for key, value in arguments.items()
    }
  arguments |= {k: v for k, v in extra.items() if k in parameters}
  missing = [
    key
    for key, parameter in parameters.items()
    if parameter.default is parameter.empty
    and key not in arguments
    and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
  ]
  if missing:
    raise UserError(f'{field}: {name} needs {", ".join(missing)}')
  positional = [
    value
    for key, parameter in parameters.items()
    if parameter.kind is parameter.VAR_POSITIONAL
    for value in arguments.pop(key, ())
  ]
  return function(*positional, **arguments)


def argument(modules: Modules, spec: Mapping[str, Any], parameter: str) -> Any:
  """Returns what `call` would pass for `parameter`: given, default, or None."""
  if parameter in spec:
    return spec[parameter]
  parameters = inspect.signature(find(modules, spec['name'], 'name')).parameters
  return parameters[parameter].default if parameter in parameters else None


def file_of(name: str) -> str | None:
  """Returns the user's file that a name means; None for a library function.

  For a module it is the source; the packages around it are imported.  A name
  that cannot be found is returned unchanged: loading it reports the error.
  """
  path = name.rpartition(':')[0]
  if not path or path.endswith('.py'):
    return path or None
  module_spec = None
  with contextlib.suppress(ImportError, ValueError):
    module_spec = importlib.util.find_spec(path)
  is_file = module_spec is not None and module_spec.has_location
  return module_spec.origin if is_file else path


def _load(name: str, field: str) -> Callable:
  """Loads 'file.py:function' or 'module:function'."""
  path, _, attribute = name.rpartition(':')
  _refuse_standard('' if path.endswith('.py') else path, name, field)
  try:
    module = _module(path, field)
  except UserError:
    raise
  except Exception as error:
    reason = ' '.join(str(error).split())
    raise UserError(
      f'{field}: {path} does not load\n{type(error).__name__}: {reason}'
    ) from error
  function = getattr(module, attribute, None)
  if not callable(function):
    functions = [
      key
      for key, value in vars(module).items()
      if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    raise UserError(
      f'{field}: no function {attribute!r} in {path}\n'
      f'it has {", ".join(functions) or "none"}'
    )
  # Modules re-export what they import, as `from os import system` does.
  if isinstance(function, _DEFINED):
    _refuse_standard(function.__module__ or '', name, field)
  return function


def _refuse_standard(module: str, name: str, field: str) -> None:
  if module.partition('.')[0] in sys.stdlib_module_names:
    raise UserError(
      f'{field}: {name} is a function of the standard library\n'
      "name one of your own: 'file.py:function' or 'module:function' of an "
      'installed package'
    )


def _module(path: str, field: str) -> ModuleType:
  """Executes a file ending in .py, or imports a module."""
  file = pathlib.Path(path)
  if file.suffix == '.py' and file.is_file():
    # Pickle and dataclasses find the module again by this name.
    spec = importlib.util.spec_from_file_location(f'user_{file.stem}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
  names = path.split('.')
  if file.suffix != '.py' and all(name.isidentifier() for name in names):
    try:
      return importlib.import_module(path)
    except ModuleNotFoundError as error:
      # An import of the module itself may be missing: that is another mistake.
      if not f'{path}.'.startswith(f'{error.name}.'):
        raise
  raise UserError(
    f'{field}: no such Python file: {path}\n'
    f"it is looked for at {file.absolute()}; write 'file.py:function' or "
    "'module:function'"
  )
