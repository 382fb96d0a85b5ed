"""What passes tests without solving them fails; honest results pass."""

import pytest

from jaxrl_llm.rewards import sandbox
from jaxrl_llm.rewards.sandbox import Outcome

RIGHT = 'def add(a, b):\n  return a + b\n'
WRONG = 'def add(a, b):\n  return a * b\n'
TESTS = ('assert add(2, 2) == 4', 'assert abs(add(2, 3) - 5) < 1e-6, "a sum"')


def run(program, tests, **settings):
  # Long enough for a loaded machine.
  return sandbox.run(program, tests, timeout=60.0, **settings)


def test_the_tests_tell_right_from_wrong():
  for name in ('', 'add'):
    assert run(RIGHT, TESTS, entry_point=name).passed == (True, True)
    assert run(WRONG, TESTS, entry_point=name).passed == (True, False)


WRITE = """
import os
for n in range(3, 64):
  try: os.write(n, b'{}')
  except OSError: pass
os._exit(0)"""

# What asks for the tests sees the secret that comes before them.
READ = """
import os
real, seen = os.read, b''
def read(descriptor, size):
  global seen
  seen += real(descriptor, size)
  at = seen.find(bytes([0, 0, 0, 32])) + 4
  if at > 3 and len(seen) >= at + 32:
    for n in range(3, 64):
      try: os.write(n, seen[at : at + 32] + b'passed 11 \\n')
      except OSError: pass
    os._exit(0)
  return seen[-size:]
os.read = read"""

LIAR = 'class A:\n  def __init__(self, *a): pass\n'
LIAR += '  def __eq__(self, other): return True\n'
LIAR += '  def __sub__(self, other): return 0\n'

# Each would pass a sandbox that only looks at how the process ends, or at what
# it prints, or runs tests with whatever the program has left.
FORGERIES = {
  'exit': 'import os; os._exit(0)',
  'exit later': 'import os\ndef add(a, b): os._exit(0)',
  'sys.exit': 'import sys; sys.exit(0)',
  'SystemExit later': 'def add(a, b): raise SystemExit(0)',
  'exit replaced': 'import os, sys\nos._exit = sys.exit = lambda *a: None\n'
  + WRONG,
  'printed': 'print("passed 11 \\nready\\npassed\\n1.0\\nOK", flush=True)',
  'written': WRITE.format(r'passed 11 \n'),
  'written as if loaded': WRITE.format(r'loaded\npassed 11 \n'),
  'written with a guess': WRITE.format(
    r'loaded\n' + '0' * 32 + r'passed 11 \n'
  ),
  'flood': """
import os
for n in range(3, 64):
  try:
    while True: os.write(n, bytes(2**16))
  except OSError: pass""",
  'descriptors closed': 'import os\nos.closerange(3, 64)\n' + WRONG,
  'atexit': 'import atexit, os\natexit.register(os._exit, 0)\n' + WRONG,
  'builtins': 'import builtins\nbuiltins.abs = lambda x: 0\n'
  'def add(a, b): return 4',
  'exec': 'import builtins\nbuiltins.exec = lambda *a: 0\n' + WRONG,
  'exec of all': 'import os\nos.__builtins__["exec"] = lambda *a: None',
  'compile of all': 'import os\nb = os.__builtins__\nc = b["compile"]\n'
  'b["compile"] = lambda s, f, m: c("pass", f, m)',
  'no abs at all': 'import os\ndel os.__builtins__["abs"]\n'
  'def abs(x): return 0\ndef add(a, b): return 4',
  'read': READ,
  'own abs': 'def abs(x): return 0\ndef add(a, b): return 4',
  'main': 'import __main__, sys\n__main__.test = lambda *a: None\n'
  'sys.modules.clear()\n' + WRONG,
  'excepthook': 'import sys\nsys.excepthook = lambda *a: None\n' + WRONG,
  'equal to all': 'class A:\n  def __eq__(self, other): return True\n'
  '  def __sub__(self, other): return 0\ndef add(a, b): return A()',
  'equal within': 'class A(int):\n  __eq__ = lambda a, b: True\n'
  '  __sub__ = lambda a, b: 0\nadd = lambda a, b: A()',
  'by metaclass': 'class M(type):\n  __eq__ = lambda a, b: True\n'
  '  __sub__ = lambda a, b: 0\nclass A(metaclass=M): pass\n'
  'add = lambda a, b: A',
  'class': LIAR.replace('A', 'add'),
  'class that makes another': LIAR + 'class add:\n  __new__ = lambda *a: A()',
  'class of another name': LIAR + 'add = A',
  'weak proxy': LIAR + 'import weakref\nliar = A()\n'
  'add = lambda *a: weakref.proxy(liar)',
  'fork': 'import os\nif os.fork(): os._exit(0)\n' + WRONG,
  'trace': 'import sys\nsys.settrace(lambda *a: sys.exit(0))\n' + WRONG,
}


@pytest.mark.parametrize('name', FORGERIES)
def test_forged_verdicts_fail(name):
  result = run(FORGERIES[name], TESTS, entry_point='add')
  assert result.outcome is not Outcome.PASSED
  assert not all(result.passed)


@pytest.mark.parametrize(
  'program, test',
  [
    ('f = lambda: deque([A()])', 'f() == deque([4])'),
    ('f = lambda: OrderedDict(a=A()).values()', 'list(f()) == [4]'),
    ('def f(): yield A()', 'list(f()) == [4]'),
    ('f = lambda: map(A, "a")', 'next(f()) == 4'),
    ('f = lambda: ((A() for _ in "a") for _ in "a")', 'list(*f()) == [4]'),
    ('f = lambda: [(A() for _ in "a")]', 'list(*f()) == [4]'),
    (
      'def f():\n  x = Fraction(1)\n  x._numerator = A()\n  return x',
      'f() == 4',
    ),
    (
      'n = iter([4, 1] * 2 + [A(), A()] * 9)\nclass f(Fraction):\n'
      '  _numerator = property(lambda s: next(n), print)\n'
      '  _denominator = property(lambda s: 1, print)',
      'f() == 4',
    ),
    ('from unittest.mock import ANY\nf = lambda: ANY', 'f() == 4'),
    (
      'import types\nclass D(A, dict): pass\n'
      'f = lambda: types.MappingProxyType(D())',
      'f() == 4',
    ),
    (
      'def f():\n  x = UserString("")\n  x.data = A()\n  return x',
      'f() == "4"',
    ),
  ],
)
def test_liars_within_results_are_found(program, test):
  modules = 'from collections import *\nfrom fractions import Fraction\n'
  result = run(modules + LIAR + program, [f'assert {test}'], entry_point='f')
  assert result.outcome is Outcome.FAILED and 'TypeError' in result.error


@pytest.mark.parametrize(
  'program, test',
  [
    ('f = lambda: (i * i for i in range(3))', 'list(f()) == [0, 1, 4]'),
    ('f = lambda: zip("ab", [1, 2])', 'dict(f()) == {"a": 1, "b": 2}'),
    ('f = lambda: {1: 2}.items()', 'list(f()) == [(1, 2)]'),
    ('f = namedtuple("f", "x y")', 'isinstance(f(1, 2), f) and f._fields'),
    (
      'class f:\n  __new__ = lambda c: object.__new__(c)\n  x = 1',
      'f().x == 1',
    ),
    ('class f:\n  def g(self): return 3', 'f().g() == 3'),
    ('class f(list):\n  __len__ = lambda self: 3', 'len(f()) == 3'),
  ],
)
def test_honest_iterators_and_classes_pass(program, test):
  program = f'from collections import *\n{program}'
  for name in ('', 'f'):
    result = run(program, [f'assert {test}'], entry_point=name)
    assert result == (Outcome.PASSED, (True,), '', '')


def test_a_program_may_take_objects_of_its_own_classes():
  """With an entry point others are there to make its arguments."""
  program = 'class N(int):\n  def __lt__(self, other): return True\n'
  program += 'def f(n): return int(n)'
  assert run(program, ['assert f(N(4)) == 4'], entry_point='f').passed == (
    True,
  )


@pytest.mark.parametrize(
  'value, expected',
  [
    ('namedtuple("P", "x y")(1, [2])', '(1, [2])'),
    ('Counter("aab")', '{"a": 2, "b": 1}'),
    (
      '[defaultdict(list, {1: deque([Fraction(1, 2)])})]',
      '[{1: deque([0.5])}]',
    ),
    ('datetime.date(2020, 1, 1)', 'datetime.date(2020, 1, 1)'),
    ('type("S", (str,), {"shout": str.upper})("a")', '"a"'),
    ('re.match("a", "ab").span()', '(0, 1)'),
  ],
)
def test_honest_classes_are_results(value, expected):
  modules = 'import datetime, re\nfrom collections import *\n'
  modules += 'from fractions import Fraction\n'
  result = run(
    f'{modules}def f(): return {value}', [f'assert f() == {expected}']
  )
  assert result == (Outcome.PASSED, (True,), '', '')
