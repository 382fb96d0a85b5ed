"""Prints --help: a script's flags and the fields of configurations."""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments.configs import base


def text(config: ConfigDict | None, title: str) -> str:
  """Returns the text of --help.

  Args:
    config: its fields are shown; None for a script without configurations.
    title: introduces the fields.
  """
  modules = [
    module
    for module, defined in flags.FLAGS.flags_by_module_dict().items()
    if defined and (module == sys.argv[0] or module.startswith('experiments.'))
  ]
  # The first two lines name the module.
  shown = [
    flags.FLAGS.module_help(module).split('\n', 2)[2] for module in modules
  ]
  parts = [sys.modules['__main__'].__doc__ or '', 'flags:', *shown]
  if config is not None:
    notes = comments()
    parts += [f'\n{title}; --config.FIELD=VALUE sets one:']
    for name, value in fields(config):
      note = notes.get(name)
      if not isinstance(value, ConfigDict):
        parts.append(f'  {name} = {value!r}')
      elif note:
        parts.append(f'  {name}')
      if note:
        parts.append(textwrap.indent(textwrap.fill(note, 74), ' ' * 6))
  return '\n'.join(parts)


def values(config: ConfigDict) -> list[str]:
  """Returns a line for every field, without comments."""
  return [
    f'{name} = {value!r}'
    for name, value in fields(config)
    if not isinstance(value, ConfigDict)
  ]


def fields(config: ConfigDict) -> list[tuple[str, Any]]:
  """Returns (dotted name, value) of sections and fields, in `base`'s order."""
  order = list(comments())

  def rank(item: tuple[str, Any]) -> int:
    name = item[0]
    while name and name not in order:
      name = name.rpartition('.')[0]  # behind its section
    return order.index(name) if name else len(order)

  return sorted(_fields(config, ''), key=rank)


def _fields(config: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    yield prefix + key, value
    if isinstance(value, ConfigDict):
      yield from _fields(value, f'{prefix}{key}.')


@functools.cache
def comments() -> dict[str, str]:
  """Returns the comments in `configs.base` by dotted name; '' for none."""
  source = inspect.getsource(base)
  functions = {
    node.name: node
    for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef)
  }
  lines, notes, outermost = source.splitlines(), {}, {}
  beside = [line.partition('# ')[2] for line in lines]
  for name, line in _assigned(functions['get_config'], functions, ''):
    above = line - 1
    while lines[above - 1].lstrip().startswith('#'):
      above -= 1
    # The outermost of several fields of a line comes first, and takes them.
    key = name.rpartition('.')[2]
    shown = outermost.setdefault(line, key) == key
    notes[name] = ' '.join(filter(None, beside[above:line] if shown else []))
  return notes


def _assigned(node, functions, prefix: str) -> Iterator[tuple[str, int]]:
  """Yields (dotted name, line) of every field that an expression makes."""
  if isinstance(node, ast.FunctionDef):
    node = next(n.value for n in node.body if isinstance(n, ast.Return))
  if isinstance(node, ast.BinOp):
    node = node.left
  if not isinstance(node, ast.Call):
    return
  if node.func.id in functions:
    yield from _assigned(functions[node.func.id], functions, prefix)
    return
  for argument in node.args:
    yield from _assigned(argument, functions, prefix)
  for keyword in node.keywords:
    yield prefix + keyword.arg, keyword.lineno
    yield from _assigned(keyword.value, functions, f'{prefix}{keyword.arg}.')
