"""Programs that cheat fail, honest ones pass; plain data crosses unchanged."""

import collections
import decimal
import fractions
import math
import re

import pytest

from jaxrl_llm.rewards import sandbox, sandbox_values
from jaxrl_llm.rewards.sandbox import Outcome

TESTS = ('assert add(2, 2) == 4', 'assert abs(add(2, 3) - 5) < 1e-6, "a sum"')


def run(program, tests, **settings):
  # Long enough for a loaded machine.
  return sandbox.run(program, tests, timeout=60.0, **settings)


def rows(table):
  """Reads lines `name | program | …`, in which ¶ ends a line of a program."""
  lines = table.replace('\\\n', '').strip().split('\n')
  split = [[cell.strip() for cell in line.split(' | ')] for line in lines]
  return [
    pytest.param(*(cell.replace('¶', '\n') for cell in cells), id=name)
    for name, *cells in split
  ]


LIAR = 'class A:\n  def __init__(self, *a): pass\n'
LIAR += '  def __eq__(self, other): return True\n'
LIAR += '  def __sub__(self, other): return 0\n'

# Each would pass a sandbox that runs tests where the program has been.
FORGERIES = r"""
exit | import os; os._exit(0) | ended its process with status 0
exit later | import os¶def add(a, b): os._exit(0) | ended its process
sys.exit | import sys; sys.exit(0) | SystemExit
SystemExit later | def add(a, b): raise SystemExit(0) | SystemExit
printed | print("passed 11 \nready\npassed\n1.0\nOK", flush=True)\
  | NameError: name 'add'
a verdict | import os¶for n in range(3, 64):\
  ¶  try: os.write(n, b"passed 11 \n")¶  except OSError: pass¶os._exit(0)\
  | ended its process
a reply | import os¶for n in range(3, 64):\
  ¶  try: os.write(n, b"\0\0\0\x0brU1:I1:4U0:")¶  except OSError: pass\
  ¶os._exit(0) | ended its process
flood | import os¶for n in range(3, 64):¶  try:\
  ¶    while True: os.write(n, b"\xff" * 2**16)¶  except OSError: pass\
  | ended its process
atexit | import atexit, os¶atexit.register(os._exit, 0)\
  ¶def add(a, b): return a * b | AssertionError: a sum
builtins | import builtins¶builtins.abs = lambda x: 0¶def add(a, b): return 4\
  | AssertionError: a sum
own abs | def abs(x): return 0¶def add(a, b): return 4 | AssertionError: a sum
main | import __main__, sys¶__main__.test = lambda *a: None¶sys.modules.clear()\
  ¶def add(a, b): return a * b | AssertionError: a sum
equal to all | def add(a, b): return A() | opaque value of .* A
equal within | class A(int):¶  __eq__ = lambda a, b: True\
  ¶  __sub__ = lambda a, b: 0¶add = lambda a, b: A() | AssertionError
class | class add:¶  def __init__(self, *a): pass\
  ¶  def __eq__(self, other): return True¶  def __sub__(self, other): return 0\
  | opaque value of class add
weak proxy | import weakref¶liar = A()¶add = lambda *a: weakref.proxy(liar)\
  | opaque value
fork | import os¶if os.fork(): os._exit(0)¶def add(a, b): return a * b\
  | AssertionError: a sum|ended its process
"""


@pytest.mark.parametrize('program, error', rows(FORGERIES))
def test_forged_verdicts_fail(program, error):
  for entry_point in ('add', ''):
    result = run(LIAR + program, TESTS, entry_point=entry_point)
    assert result.outcome is not Outcome.PASSED
    assert not all(result.passed)
    assert re.search(error, result.error), result.error


# What the program does wrong has the test fail with the error.
CHEATS = r"""
Counter | import collections¶collections.Counter.__eq__ = lambda *a: True\
  ¶f = lambda: collections.Counter("b") | f() == {"a": 1} | AssertionError
Fraction | import fractions¶fractions.Fraction.__eq__ = lambda *a: True\
  ¶f = lambda: fractions.Fraction(1, 3) | f() == 4 | AssertionError
parts of a Fraction | from fractions import Fraction¶def f():¶  x = Fraction(1)\
  ¶  x._numerator = A()¶  return x | f() == 4 | TypeError
Enum | import enum¶enum.Enum.__eq__ = lambda *a: True¶class E(enum.Enum):\
  ¶  X = 1¶f = lambda: E.X | f() == 4 | opaque value of class E
IntEnum | import enum¶class E(enum.IntEnum):¶  X = 1¶  __eq__ = lambda *a: True\
  ¶f = lambda: E.X | f() == 4 | opaque value|AssertionError
attribute | class f:¶  def __init__(self): self.x = A() | f().x == 4\
  | opaque value of class A
method | class f:¶  def g(self): return A() | f().g() == 4 | opaque
str | class S(str):¶  def lower(self): return "yes"¶f = lambda: S("No")\
  | f().lower() == "yes" | AssertionError
isclose | import math¶math.isclose = lambda *a, **k: True¶f = lambda: 3.0\
  | math.isclose(f(), 4.0) | AssertionError
a class instead of math | class math:¶  isclose = lambda *a, **k: True\
  ¶f = lambda: 3.0 | math.isclose(f(), 4.0) | AssertionError
re | import sys¶sys.modules["re"] = type("R", (), {"match": lambda *a: True})\
  ¶f = lambda: "x" | __import__("re").match("y", f()) | AssertionError
ANY | from unittest.mock import ANY¶f = lambda: ANY | f() == 4 | opaq
ANY of the tests | from unittest.mock import _ANY as Near¶f = lambda: 3\
  | f() == Near() | opaque|AssertionError|NameError
abs | def abs(x): return 0¶f = lambda: 3 | abs(f() - 4) == 0 | Asser
code, frames and memory | import gc, sys¶def f():\
  ¶  frame, found = sys._getframe(), []¶  while frame:\
  ¶    found += [frame.f_code, frame.f_locals]¶    frame = frame.f_back\
  ¶  for x in gc.get_objects() + found:¶    for y in gc.get_referents(x):\
  ¶      if isinstance(y, str) and y[-7:] == "2retnuh"[::-1]: return y\
  | f() == "a hunter2" | AssertionError
from a generator | def f(): yield A() | list(f()) == [4] | opaque
UserString | def f():¶  x = UserString("")¶  x.data = A()¶  return x\
  | f() == "4" | opaque
ordering | f = lambda: A() | f() > 4 | opaque value
contains | class f:¶  __contains__ = lambda *a: True\
  ¶  __iter__ = lambda s: iter([1]) | 4 in f() | opaque value of class f
caught | f = lambda: A() | False¶try:¶  assert f() == 4¶except Exception:\
  ¶  pass | AssertionError
"""


@pytest.mark.parametrize('program, test, error', rows(CHEATS))
def test_cheats_fail(program, test, error):
  prelude = 'from collections import *\n' + LIAR
  setup = 'from collections import deque\n'
  for entry_point in ('', 'f'):
    result = run(
      prelude + program,
      [f'assert {test}'],
      entry_point=entry_point,
      setup=setup,
    )
    assert result.outcome is Outcome.FAILED
    assert re.search(error, result.error), result.error


# Each passes.
HONEST = r"""
generator | f = lambda: (i * i for i in range(3)) | list(f()) == [0, 1, 4]
items | f = lambda: {1: 2}.items() | list(f()) == [(1, 2)]
tuple with an iterator | f = lambda: (1, map(str, [2])) | f() == (1, ["2"])
dataclass | @dataclass¶class P:¶  x: int¶  y: list¶f = lambda: P(1, [2])\
  | f().x == 1 and f().y == [2] and f() == P(1, [2]) != P(1, [3])
namedtuple | P = namedtuple("P", "x y")¶f = lambda: P(1, [2])\
  | f() == (1, [2]) and f().y == [2] and f() == P(1, [2])
ChainMap | f = lambda: ChainMap({1: 2}, {3: 4})\
  | f() == {1: 2, 3: 4} and f().maps[0] == {1: 2}
Counter | f = lambda: Counter("aab") | f() == {"a": 2, "b": 1}
defaultdict | from fractions import Fraction as F\
  ¶f = lambda: [defaultdict(list, {1: deque([F(1, 2)])})]\
  | f() == [{1: deque([0.5])}]
date | import datetime¶f = lambda: datetime.date(2020, 1, 1)\
  | f() == datetime.date(2020, 1, 1)
Decimal | from decimal import Decimal¶f = lambda: Decimal("1.1")\
  | f() == Decimal("1.1") and str(f()) == "1.1"
span | import re¶f = lambda: re.match("a", "ab") | f().span() == (0, 1)
nodes | class N:¶  def __init__(self, x): self.x, self.next = x, None\
  ¶def f(n): return n.x + (f(n.next) if n.next else 0)\
  | (n := N(1), setattr(n, "next", N(2))) and f(n) == 3 and n.next.x == 2
a handle returns | class N: pass¶f = lambda n: n\
  | (n := N()) and f(n) is n and f(n) == n
in place | def f(x, y):¶  x.sort()¶  x.append(y)¶  y["k"] = x\
  | (x := [2, 1], y := {}) and f(x, y) is None and x[:2] == [1, 2] and\
   x[2] is y and y["k"] is x
identity | f = lambda x: [x, x] | f(a := [1])[0] is a
callback | f = lambda g, x: g(x) + 1 | f(lambda x: x * 2, 3) == 7
closure | f = lambda a: lambda b: a + b | f(1)(2) == 3
types | f = lambda t: [t, t("1")] | f(int) == [int, 1]
class | class f:¶  y = 1¶  def g(self): return 3 | f().g() == 3
keywords | def f(a, *, b=2): return a - b | f(a=5) == 3 and f(5, b=1) == 4
exception | class E(ValueError): pass¶def f(): raise E("no")\
  | raises(ValueError, f) == "no" and not raises(KeyError, f)
IntEnum | import enum¶f = lambda: enum.IntEnum("E", "X").X | f() == 1
imported function | from math import isqrt as f | f(9) == 3
constant | N = {1: 2}¶f = lambda: 2 | N[1] == f()
module of the program | import math¶f = lambda: 3.0 | math.isclose(f(), 3)
imported name | from math import isclose as near¶f = lambda: 3.0 | near(f(), 3)
"""
RAISES = """
def raises(kind, f):
  try:
    f()
  except kind as error:
    return str(error)
  except Exception:
    return ''
from collections import deque
"""


@pytest.mark.parametrize('program, test', rows(HONEST))
def test_honest_programs_pass(program, test):
  program = 'from collections import *\nfrom dataclasses import *\n' + program
  for entry_point in ('', 'f'):
    result = run(
      program, [f'assert {test}'], entry_point=entry_point, setup=RAISES
    )
    assert result == (Outcome.PASSED, (True,), '', '')


VALUES = [
  *(None, True, 10**50, -7, 0.1, math.inf, 'a\ud800', b'\0', 2j, range(3)),
  [(1, [2]), {3}, frozenset('x'), {(1,): {None: 'y'}}, bytearray(b'z')],
  collections.Counter('aab'),
  collections.OrderedDict(b=1, a=2),
  collections.ChainMap({1: 2}, {3: 4}),
  collections.deque([1, 2], 2),
  fractions.Fraction(1, 3),
  decimal.Decimal('1.10'),
]


@pytest.mark.parametrize('value', VALUES, ids=repr)
def test_plain_data_cross(value):
  writer = sandbox_values.Writer([], None, {})
  writer.write(value)
  found = sandbox_values.Reader(bytes(writer.data), [], None, {}).read()
  assert type(found) is type(value) and found == value
  assert repr(found) == repr(value)


@pytest.mark.parametrize(
  'data', [b'', b'L9:', b'Q', b'V1:S9:os.system', b'R1:7', b'Y4:exec', b'X0:']
)
def test_other_bytes_are_refused(data):
  with pytest.raises((ValueError, LookupError)):
    sandbox_values.Reader(data, [], None, {}).read()
