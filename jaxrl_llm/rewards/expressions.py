r"""Canonical forms of LaTeX expressions: `\frac{\sqrt3}{3}` is `1/\sqrt{3}`.

An expression is read as a sum of products of rational numbers, square roots, π,
i, letters, and opaque parts (a root of a sum, `\sin x`, `2^n`, `n!`, `52_8`).
Two expressions have the same canonical form if they differ only in

* the order of terms and factors, and how numbers are written,
* square roots of numbers, as `\sqrt{12}` and `2\sqrt{3}`, and roots in
  denominators,
* brackets without letters, or with only numbers as other factors.

Other products of sums are not expanded: an answer that should be factored does
not equal the question.  Arithmetic is exact and bounded, and nothing is
evaluated: expressions beyond the bounds are not read.
"""

import re
from collections.abc import Hashable
from fractions import Fraction

from jaxrl_llm.rewards import surds

_DEEPEST = 30  # nested brackets and fractions
_MOST_CHARACTERS = 1000

_NUMBER = re.compile(r'\d+(?:\.\d*)?|\.\d+')
_MIXED = re.compile(
  r'(\d+)\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))'
)
_INDEX = re.compile(r'\s*_\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))')
_COMMAND = re.compile(r'\\([A-Za-z]+)')
_EXPONENT = re.compile(r'-?\d+')
# \sqrt13 is √1·3 in LaTeX, and rarely meant so.
_AMBIGUOUS_ROOT = re.compile(r'\s*\d\d')
_CLOSING = {'(': ')', '[': ']', '{': '}'}
_SYMBOLS = frozenset(
  ['pi', 'theta', 'alpha', 'beta', 'gamma', 'delta', 'epsilon', 'lambda', 'mu']
  + ['phi', 'varphi', 'omega', 'rho', 'sigma', 'tau', 'infty']
)
_INVERTIBLE = frozenset(['sin', 'cos', 'tan', 'cot', 'sec', 'csc'])
_FUNCTIONS = _INVERTIBLE | frozenset(
  ['arcsin', 'arccos', 'arctan', 'log', 'ln', 'exp']
)


def read_expression(text: str) -> Hashable | None:
  """Returns the canonical form of an expression: a Fraction if rational.

  None if the text is not such an expression.
  """
  try:
    return surds.canonical(_read(text))
  except surds.UnreadableError:
    return None


def read_equation(left: str, right: str) -> Hashable | None:
  """Returns the canonical form of `left = right`, or None.

  It does not change if the sides are swapped, terms move between them, or both
  are multiplied by a number.  An equation of numbers alone has none.
  """
  try:
    difference = surds.add(_read(left), _read(right), sign=-1)
  except surds.UnreadableError:
    return None
  if surds.rational(difference) is not None:
    return None
  return '=', surds.primitive(difference)[1]


def _read(text: str) -> surds.Sum:
  if len(text) > _MOST_CHARACTERS:
    raise surds.UnreadableError
  return _Reader(text).whole()


class _Reader:
  """A recursive-descent parser for one expression."""

  def __init__(self, text: str):
    self.text = text
    self.at = 0
    self.depth = 0
    self.arithmetic = surds.Arithmetic()

  def whole(self) -> surds.Sum:
    total = self.sum()
    if self.next():
      raise surds.UnreadableError
    return total

  def next(self) -> str:
    """Returns the next character that is not a space; '' at the end."""
    text = self.text
    while self.at < len(text) and text[self.at].isspace():
      self.at += 1
    return text[self.at : self.at + 1]

  def take(self, pattern: re.Pattern) -> re.Match | None:
    match = pattern.match(self.text, self.at)
    if match is not None:
      self.at = match.end()
    return match

  def deeper(self, levels: int) -> None:
    self.depth += levels
    if self.depth > _DEEPEST:
      raise surds.UnreadableError

  def sum(self) -> surds.Sum:
    total, sign = {}, self.sign() or 1
    while sign:
      total = surds.add(total, self.product(), sign)
      sign = self.sign()
    return total

  def sign(self) -> int:
    """Reads a sign, or the product of several as in 2 + -3; 0 without one."""
    sign = 0
    while (mark := self.next()) and mark in '+-':
      self.at += 1
      sign = (sign or 1) * (1 if mark == '+' else -1)
    return sign

  def product(self) -> surds.Sum:
    # Numbers are kept apart from the rest, so that order does not matter.
    parts, mark = {False: surds.number(1), True: surds.number(1)}, '*'
    while True:
      factor = self.factor()
      kind = surds.has_symbols(factor)
      join = self.arithmetic.over if mark == '/' else self.arithmetic.times
      parts[kind] = join(parts[kind], factor)
      mark = self.next()
      if mark and mark in '*/':
        self.at += 1
        if self.sign() < 0:  # as in 2*-3
          parts[False] = surds.scale(parts[False], Fraction(-1))
      elif not mark or not (mark.isalpha() or mark in '\\({['):
        return self.arithmetic.times(parts[False], parts[True])

  def factor(self) -> surds.Sum:
    value = self.base()
    while (mark := self.next()) and mark in '!^':
      self.at += 1
      if mark == '!':
        value = self.arithmetic.opaque('!', surds.canonical(value))
      else:
        value = self.arithmetic.power(value, self.exponent())
    return value

  def base(self) -> surds.Sum:
    mark = self.next()
    if mixed := self.take(_MIXED):
      whole, a, b, c, d = mixed.groups()
      return surds.number(int(whole) + _ratio(a or b, c or d))
    if digits := self.take(_NUMBER):
      index = self.index()
      if index:
        return self.arithmetic.opaque('base', digits[0], index)
      return surds.number(Fraction(digits[0]))
    if mark and mark in _CLOSING:
      return self.bracket(mark)
    if mark.isascii() and mark.isalpha():
      self.at += 1
      return self.symbol(mark)
    command = self.take(_COMMAND)
    name = command[1] if command else ''
    if name == 'frac':
      above = self.argument()
      return self.arithmetic.over(above, self.argument())
    if name == 'sqrt':
      degree = self.degree() if self.next() == '[' else 2
      if _AMBIGUOUS_ROOT.match(self.text, self.at):
        raise surds.UnreadableError
      return self.arithmetic.root(self.argument(), degree)
    if name in _FUNCTIONS:
      return self.function(name)
    if name in _SYMBOLS:
      return self.symbol(command[0])
    raise surds.UnreadableError

  def function(self, name: str) -> surds.Sum:
    r"""Reads a function of a bracket, or of a product up to the next function.

    `\sin(x)^2` equals `\sin^2 x`, and `\sin^{-1} x` equals `\arcsin x`.
    """
    exponent = surds.number(1)
    index = self.index()
    if self.next() == '^':
      self.at += 1
      exponent = self.exponent()
    if name in _INVERTIBLE and surds.rational(exponent) == -1:
      name, exponent = f'arc{name}', surds.number(1)
    self.deeper(1)
    # An exponent after round brackets applies to the function.
    argument = self.base() if self.next() in ('(', '[') else self.factor()
    bracket = self.text[self.at - 1] in ')]}'
    while not bracket and (mark := self.next()):
      command = _COMMAND.match(self.text, self.at)
      if not (mark.isalpha() or command and command[1] not in _FUNCTIONS):
        break
      argument = self.arithmetic.times(argument, self.factor())
    self.deeper(-1)
    value = self.arithmetic.opaque(name, index, surds.canonical(argument))
    return self.arithmetic.power(value, exponent)

  def bracket(self, opening: str) -> surds.Sum:
    self.at += 1
    self.deeper(1)
    value = self.sum()
    self.deeper(-1)
    if self.next() != _CLOSING[opening]:
      raise surds.UnreadableError
    self.at += 1
    return value

  def symbol(self, name: str) -> surds.Sum:
    index = self.index()
    return surds.symbol(f'{name}_{index}' if index else name)

  def index(self) -> str:
    match = self.take(_INDEX)
    return (match[1] or match[2]).strip() if match else ''

  def argument(self) -> surds.Sum:
    """Reads an argument as LaTeX does: a group or one token."""
    mark = self.next()
    if mark.isdecimal():
      self.at += 1
      return surds.number(int(mark))
    self.deeper(1)
    value = self.base()
    self.deeper(-1)
    return value

  def degree(self) -> int:
    """Reads the degree of a root, between 2 and 100."""
    value = surds.rational(self.bracket('['))
    if value is None or value.denominator > 1 or not 2 <= value <= 100:
      raise surds.UnreadableError
    return int(value)

  def exponent(self) -> surds.Sum:
    """Reads a group, one token, or a whole number: x^10 means x^{10}."""
    self.next()
    match = self.take(_EXPONENT)
    return surds.number(int(match[0])) if match else self.base()


def _ratio(a: str, b: str) -> Fraction:
  if not int(b):
    raise surds.UnreadableError
  return Fraction(int(a), int(b))
