"""Runs a program and its tests: what the worker of `sandbox_child` does.

Loaded by its path in an interpreter of its own, by nothing else.  What runs
here after the program shares a process with it, so it does not rely on what a
program may change in passing, such as `sys.modules` or the module `builtins`.
"""

import _collections
import _weakref
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
  + ('__getnewargs__', '__match_args__', '__replace__', '__orig_bases__')
  + ('__static_attributes__', '__firstlineno__', '__len__', '__hash__')
  + ('__call__', '__enter__', '__exit__')
)
# On what a Fraction, which is written in Python, relies besides.
_OF_FRACTION = frozenset(('_numerator', '_denominator'))

# Classes of the standard library that compare by what they hold.  Not all do:
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
# They answer with what stands behind them.
_PROXIES = (
  *(_weakref.ProxyType, _weakref.CallableProxyType),
  type(vars(type)),
)
_VIEWS = type({}.keys()), type({}.values()), type({}.items())
_SEQUENCES = list, tuple, set, frozenset, _collections.deque, *_VIEWS


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

  What they call of the program's functions, and of its classes the entry point
  (all without one), may give nothing that decides comparisons: neither may a
  class that defines `__eq__` be what is tested.

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


def _guarded(value, classes=True):
  """What tests see of the program in place of a value that they may call."""
  if not isinstance(value, type):
    return _checked(value) if callable(value) else value
  own_new = any(
    '__new__' in vars(base) and not _is_standard(base) for base in value.__mro__
  )
  return (
    _Class(value) if classes and (own_new or not _is_honest(value)) else value
  )


class _Class:
  """A class of which a call may give what could lie to a test."""

  def __init__(self, kind):
    self._kind = kind

  def __call__(self, *args, **kwargs):
    return _vouched(self._kind(*args, **kwargs))

  def __instancecheck__(self, value):
    return isinstance(value, self._kind)

  def __getattr__(self, name):
    return _guarded(getattr(self._kind, name))


def _checked(function):
  """The function, refusing to return what could lie to a test."""
  return lambda *args, **kwargs: _vouched(function(*args, **kwargs))


def _vouched(value):
  """The value once it is checked; an iterator, whose items will be."""
  _refuse_actors(value)
  return _items(value) if _is_iterator(type(value)) else value


def _items(iterator):
  for item in iterator:
    yield _vouched(item)


def _is_iterator(kind):
  """Whether it is Python's own, such as a generator."""
  own = kind.__module__ in ('builtins', 'itertools')
  return own and hasattr(kind, '__next__')


def _refuse_actors(value):
  """Raises TypeError if `value` holds an object that decides comparisons.

  `assert f(2) == 4` asks the object that f returns; one whose class answers
  True to everything would pass every test.  So would the items of an iterator
  within `value`, which cannot be looked at without using them up.
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
    elif isinstance(item, _SEQUENCES):
      waiting += item
    elif item is not value and _is_iterator(kind):
      raise TypeError(f'a result holds a {kind.__name__}, not its items')
    elif any(base.__module__ == 'fractions' for base in kind.__mro__):
      waiting += item._numerator, item._denominator


def _is_honest(kind):
  """Whether operators on objects of this class are Python's own."""
  if not _is_standard(type(kind)):
    return False
  return all(
    _is_standard(base)
    or {name for name in vars(base) if name[:2] == '__' or name in _OF_FRACTION}
    <= _HARMLESS
    for base in kind.__mro__
  )


def _is_standard(kind):
  """Whether a class is built in, or one of `_HONEST`."""
  if not kind.__flags__ & _PY_TPFLAGS_HEAPTYPE:
    return kind not in _PROXIES
  name, part = kind.__module__, kind.__qualname__
  if name != 'itertools' and f'{name}.{part}' not in _HONEST:
    return False
  return getattr(sys.modules.get(name), part, None) is kind
