"""Runs a program and its tests, in the worker of `sandbox_child`.

Loaded by path in its own interpreter, by nothing else.  Code that runs here
after the program shares a process with it, so it does not rely on anything that
a program may change in passing, such as `sys.modules` or the module `builtins`.
"""

import _collections
import _weakref
import builtins
import sys

# The functions below keep these: a program can change the dictionary that the
# modules share, via `os.__builtins__`.
__builtins__ = dict(vars(builtins))

_LONGEST_ERROR = 300  # characters
_PY_TPFLAGS_HEAPTYPE = 1 << 9

# Attributes that a class may define without affecting operators.
_HARMLESS = frozenset(
  ('__module__', '__qualname__', '__doc__', '__annotations__', '__slots__')
  + ('__dict__', '__weakref__', '__init__', '__new__', '__repr__', '__str__')
  + ('__getnewargs__', '__match_args__', '__replace__', '__orig_bases__')
  + ('__static_attributes__', '__firstlineno__', '__len__', '__hash__')
  + ('__call__', '__enter__', '__exit__')
)
# Further attributes that Fraction, which is written in Python, relies on.
_OF_FRACTION = frozenset(('_numerator', '_denominator'))

# Classes of the standard library that compare by content.  Not all do:
# `unittest.mock.ANY` equals everything, a UserList whatever is put into it.
_HONEST = frozenset(
  f'{module}.{name}'
  for module, names in {
    '_io': 'BytesIO StringIO',
    'abc': 'ABC ABCMeta',
    'array': 'array',
    'collections': 'Counter OrderedDict defaultdict deque',
    'datetime': 'date datetime time timedelta timezone tzinfo',
    'decimal': 'Decimal',
    'enum': 'Enum EnumMeta EnumType Flag IntEnum IntFlag ReprEnum StrEnum',
    'fractions': 'Fraction',
    'functools': '_lru_cache_wrapper partial',
    'numbers': 'Complex Integral Number Rational Real',
    're': 'Match Pattern',
    'typing': 'Generic',
  }.items()
  for name in names.split()
)
# These answer with the object behind them.
_PROXIES = (
  *(_weakref.ProxyType, _weakref.CallableProxyType),
  type(vars(type)),
)
_VIEWS = type({}.keys()), type({}.values()), type({}.items())
_SEQUENCES = list, tuple, set, frozenset, _collections.deque, *_VIEWS


def load_program(program):
  """Runs the program.

  It becomes the module 'program', so code below `if __name__ == '__main__'`
  does not run.  It gets its own copy of the built-in functions: harness and
  tests see no change to the module `builtins`, to any module's `__builtins__`
  or to `__main__`.

  Returns:
    The module, and the exception that it raised or None.
  """
  kind = type(sys)
  copy = kind('builtins')
  copy.__dict__.update(vars(builtins))
  module = kind('program')
  module.__builtins__ = copy
  names = ('program', '__main__')
  sys.modules.update({'builtins': copy, **dict.fromkeys(names, module)})
  sys.argv = ['program.py']
  try:
    exec(compile(program, 'program.py', 'exec'), module.__dict__)
  except BaseException as error:
    return module, error
  return module, None


def test(module, entry_point, setup, tests):
  """Runs the tests in order.

  They see the program's names and the original built-in functions; with an
  entry point, even where the program defines its own `abs`.

  Results that decide comparisons, such as instances of a class that defines
  `__eq__`, are refused from the program's functions and from the class that is
  the entry point (from all classes without one).

  Returns:
    The first exception or None, and a bool per test.
  """
  space = {
    name: _guarded(value, classes=entry_point in ('', name))
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
  """Formats one line: outcome, a digit per test or -, the exception."""
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


def _guarded(value, classes=True):
  """Returns the stand-in that tests see for a value that they may call."""
  if not isinstance(value, type):
    return _checked(value) if callable(value) else value
  own_new = any(
    '__new__' in vars(base) and not _is_standard(base) for base in value.__mro__
  )
  return (
    _Class(value) if classes and (own_new or not _is_honest(value)) else value
  )


class _Class:
  """Wraps a class whose instances could deceive a test."""

  def __init__(self, kind):
    self._kind = kind

  def __call__(self, *args, **kwargs):
    return _vouched(self._kind(*args, **kwargs))

  def __instancecheck__(self, value):
    return isinstance(value, self._kind)

  def __getattr__(self, name):
    return _guarded(getattr(self._kind, name))


def _checked(function):
  """Wraps a function to refuse results that could deceive a test."""
  return lambda *args, **kwargs: _vouched(function(*args, **kwargs))


def _vouched(value):
  """Returns a checked value; for an iterator, one that checks its items."""
  _refuse_actors(value)
  return _items(value) if _is_iterator(type(value)) else value


def _items(iterator):
  for item in iterator:
    yield _vouched(item)


def _is_iterator(kind):
  """Returns True for Python's own iterators, such as a generator."""
  standard = kind.__module__ in ('builtins', 'itertools')
  return standard and hasattr(kind, '__next__')


def _refuse_actors(value):
  """Raises TypeError if `value` contains an object that decides comparisons.

  `assert f(2) == 4` asks the object that f returns; one whose class answers
  True to everything would pass every test.  So would the items of an iterator
  inside `value`, which cannot be inspected without consuming them.
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
      raise TypeError(
        f'a result of the class {kind.__name__} decides its own comparisons'
      )
    if isinstance(item, dict):
      waiting += dict.keys(item)
      waiting += dict.values(item)
    elif isinstance(item, _SEQUENCES):
      waiting += item
    elif item is not value and _is_iterator(kind):
      raise TypeError(f'a result holds a {kind.__name__}, not its items')
    elif any(base.__module__ == 'fractions' for base in kind.__mro__):
      waiting += item._numerator, item._denominator


def _is_honest(kind):
  """Returns True if operators on objects of this class are Python's own."""
  if not _is_standard(type(kind)):
    return False
  return all(
    _is_standard(base)
    or {name for name in vars(base) if name[:2] == '__' or name in _OF_FRACTION}
    <= _HARMLESS
    for base in kind.__mro__
  )


def _is_standard(kind):
  """Returns True if a class is built in, or one of `_HONEST`."""
  if not kind.__flags__ & _PY_TPFLAGS_HEAPTYPE:
    return kind not in _PROXIES
  name, part = kind.__module__, kind.__qualname__
  if name != 'itertools' and f'{name}.{part}' not in _HONEST:
    return False
  return getattr(sys.modules.get(name), part, None) is kind
