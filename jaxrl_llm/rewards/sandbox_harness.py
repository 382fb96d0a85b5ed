"""Runs a program and its tests: what the worker of `sandbox_child` does.

Loaded by its path in an interpreter of its own, by nothing else.  What runs
here after the program shares a process with it, so it does not rely on what a
program may change in passing, such as `sys.modules` or the module `builtins`.
"""

import builtins
import sys

# The functions below keep these: a program can change the dictionary that the
# modules share, as `os.__builtins__`.
__builtins__ = dict(vars(builtins))

_LONGEST_ERROR = 300  # characters
_PY_TPFLAGS_HEAPTYPE = 1 << 9

# What a class may define and still leave operators alone.
_HARMLESS = frozenset(
  ('__module__', '__qualname__', '__doc__', '__annotations__', '__slots__')
  + ('__dict__', '__weakref__', '__init__', '__new__', '__repr__', '__str__')
  + ('__getnewargs__', '__match_args__', '__replace__')
  + ('__static_attributes__', '__firstlineno__')
)


def load(program):
  """Runs the program.

  It is the module 'program': what stands below `if __name__ == '__main__'` is
  not run.  Its built-in functions are its own copies: whatever it does to the
  module `builtins`, to `__builtins__` of any module or to `__main__`, harness
  and tests do not see it.

  Returns:
    The module, and the exception that it raised or None.
  """
  kind = type(sys)
  own = kind('builtins')
  own.__dict__.update(vars(builtins))
  module = kind('program')
  module.__builtins__ = own
  names = ('program', '__main__')
  sys.modules.update({'builtins': own, **dict.fromkeys(names, module)})
  sys.argv = ['program.py']
  try:
    exec(compile(program, 'program.py', 'exec'), module.__dict__)
  except BaseException as error:
    return module, error
  return module, None


def test(module, entry_point, setup, tests):
  """Runs the tests, one after the other.

  They see the program's names, and the built-in functions as they were: with
  an entry point, even where the program defines an `abs` of its own.

  Returns:
    The first exception or None, and a bool per test.
  """
  space = {
    name: _checked(value) if _is_function(value) else value
    for name, value in module.__dict__.items()
    if not entry_point or name == entry_point or name not in __builtins__
  }
  space |= {'__name__': 'tests', '__builtins__': dict(__builtins__)}
  failure, passed = None, []
  try:
    exec(compile(setup, 'setup.py', 'exec'), space)
  except BaseException as error:
    return error, [False] * len(tests)
  for source in tests:
    try:
      exec(compile(source, 'tests.py', 'exec'), space)
    except BaseException as error:
      failure = error if failure is None else failure
      passed.append(False)
    else:
      passed.append(True)
  return failure, passed


def verdict(failure, passed):
  """One line: outcome, a digit per test or -, the exception."""
  digits = ''.join('01'[p] for p in passed) or '-'
  if failure is None:
    return f'passed {digits} \n'
  outcome = 'out_of_memory' if isinstance(failure, MemoryError) else 'failed'
  try:
    text = ' '.join(str(failure).split())
  except BaseException:
    text = ''
  text = type(failure).__name__ + (': ' + text if text else '')
  text = text[:_LONGEST_ERROR].encode('utf-8', 'replace').decode()
  return f'{outcome} {digits} {text}\n'


def _is_function(value):
  return callable(value) and not isinstance(value, type)


def _checked(function):
  """The function, refusing to return what could lie to a test."""

  def call(*args, **kwargs):
    value = function(*args, **kwargs)
    _refuse_actors(value)
    return value

  return call


def _refuse_actors(value):
  """Raises TypeError if `value` holds an object that decides comparisons.

  `assert f(2) == 4` asks the object that f returns; one whose class answers
  True to everything would pass every test.
  """
  plain = (int, str, float, bool, type(None))
  waiting, seen = [value], set()
  while waiting:
    item = waiting.pop()
    kind = type(item)
    if kind in plain or id(item) in seen:
      continue
    seen.add(id(item))
    if not _is_honest(kind):
      raise TypeError(f'a result of the class {kind.__name__} judges itself')
    if isinstance(item, dict):
      waiting += dict.keys(item)
      waiting += dict.values(item)
    elif isinstance(item, (list, tuple, set, frozenset)):
      waiting += item


def _is_honest(kind):
  """Whether operators on objects of this class are Python's own."""
  if not _is_standard(type(kind)):
    return False
  return all(
    _is_standard(base)
    or {name for name in vars(base) if name[:2] == '__'} <= _HARMLESS
    for base in kind.__mro__
  )


def _is_standard(kind):
  """Whether a class is built in, or one that the standard library defines."""
  if not kind.__flags__ & _PY_TPFLAGS_HEAPTYPE:
    return True
  name = kind.__module__
  if name.partition('.')[0] not in sys.stdlib_module_names:
    return False
  found = sys.modules.get(name)
  for part in kind.__qualname__.split('.'):
    found = getattr(found, part, None)
  return found is kind
