"""Exact arithmetic with sums of products of numbers, roots and symbols.

A sum is a dictionary,

  {(radicand, ((atom, exponent), …)): coefficient}

mapping terms to Fractions: `2√3 x²` is {(3, (('x', 2),)): 2}.  The radicand has
no factor n² for n = 2 … 1000; atoms are sorted by their repr; 'i' occurs only
with the exponent 1.  An atom is the name of a symbol, or a tuple for an opaque
part: a root of a sum, a factorial, a sum in brackets.

Every number is bounded, and so is the work of one `Arithmetic`: exceeding a
bound raises `UnreadableError`.
"""

import functools
import math
from collections.abc import Hashable
from fractions import Fraction

Term = tuple[int, tuple[tuple[Hashable, int], ...]]
Sum = dict[Term, Fraction]

_UNIT: Term = (1, ())
_HALF = Fraction(1, 2)
_MOST_BITS = 400  # of a numerator or denominator
_MOST_WORK = 200  # products of two terms; roots and the like count as more
_LARGEST_DIVISOR = 1000  # whose square is looked for in a radicand


class UnreadableError(Exception):
  """The expression is not of the kind above, or it is too large."""


def number(value: Fraction | int) -> Sum:
  return {_UNIT: _bounded(Fraction(value))} if value else {}


def symbol(name: Hashable) -> Sum:
  return {(1, ((name, 1),)): Fraction(1)}


def rational(a: Sum) -> Fraction | None:
  """Returns a sum's value if it is rational, else None."""
  if not a:
    return Fraction(0)
  return a[_UNIT] if a.keys() == {_UNIT} else None


def has_symbols(a: Sum) -> bool:
  """Returns True if it has more than numbers, their square roots, π and i."""
  return any(atom not in ('i', '\\pi') for _, powers in a for atom, _ in powers)


def canonical(a: Sum) -> Hashable:
  """Returns a form that is equal for equal sums; a Fraction if rational."""
  value = rational(a)
  return ('sum', _terms(a)) if value is None else value


def primitive(a: Sum) -> tuple[Fraction, tuple]:
  """Splits a nonzero sum into (signed common factor, primitive terms)."""
  terms = _terms(a)
  content = Fraction(
    math.gcd(*(c.numerator for _, c in terms)),
    math.lcm(*(c.denominator for _, c in terms)),
  )
  if terms[0][1] < 0:
    content = -content
  return content, tuple((term, c / content) for term, c in terms)


def add(a: Sum, b: Sum, sign: int = 1) -> Sum:
  total = dict(a)
  for term, c in b.items():
    value = total.get(term, 0) + sign * c
    if value:
      total[term] = _bounded(value)
    else:
      total.pop(term, None)
  return total


def scale(a: Sum, factor: Fraction) -> Sum:
  return {t: _bounded(c * factor) for t, c in a.items()} if factor else {}


class Arithmetic:
  """Products, quotients, powers and roots, with a bound on their total work."""

  def __init__(self):
    self._work = _MOST_WORK

  def opaque(self, *parts: Hashable) -> Sum:
    """Returns an opaque atom; `parts` name its kind and its content."""
    self._spend(25)  # keeps nesting shallow
    return symbol(parts)

  def times(self, a: Sum, b: Sum) -> Sum:
    """Multiplies; keeps the brackets of two sums with symbols."""
    if has_symbols(a) and has_symbols(b):
      (f, *one), (g, *other) = _single(a), _single(b)
      return _without_bracket(self._multiply(*one, *other), f * g)
    total = {}
    for term, c in a.items():
      for other, d in b.items():
        total = add(total, self._multiply(term, c, other, d))
    return total

  def over(self, a: Sum, b: Sum) -> Sum:
    """Divides; clears roots and i from denominators of up to two terms."""
    if not b:
      raise UnreadableError
    if len(b) == 2 and not has_symbols(b):
      # (u + v)(u − v) is rational where u and v are numbers times roots or i.
      (u, c), (v, d) = b.items()
      conjugate = {u: c, v: -d}
      norm = rational(self.times(b, conjugate))
      if norm:
        return scale(self.times(a, conjugate), 1 / norm)
    factor, term, c = _single(b)
    ((inverse, d),) = self._inverse(term, c * factor).items()
    if len(b) > 1:
      return self.times(a, {inverse: d})
    total = {}
    for term, c in a.items():
      total = add(total, self._multiply(term, c, inverse, d))
    return total

  def power(self, base: Sum, exponent: Sum) -> Sum:
    n = rational(exponent)
    if n is None:
      return self.opaque('^', canonical(base), canonical(exponent))
    if n.denominator > 1:
      root = self.root(base, n.denominator)
      return self.power(root, number(n.numerator))
    n = int(n)
    if not base:
      raise UnreadableError
    if n == 0:
      return number(1)
    if len(base) > 1 and 0 < n <= 8 and not has_symbols(base):
      return functools.reduce(self.times, [base] * n)
    factor, (radicand, powers), c = _single(base)
    size = max(_bits(c * factor), radicand.bit_length())
    if size > 1 and size * abs(n) > _MOST_BITS:
      return self.opaque('^', canonical(base), exponent[_UNIT])
    powers = tuple((atom, e * n) for atom, e in powers)
    c = (c * factor) ** n * Fraction(radicand) ** (n // 2)
    term = radicand if n % 2 else 1, powers
    return self._multiply(_UNIT, Fraction(1), term, c)

  def root(self, base: Sum, degree: int) -> Sum:
    """Takes the root as far as possible; the rest becomes opaque."""
    value = rational(base)
    if value is not None:
      exact = _exact_root(value, degree)
      if exact is not None:
        return number(exact)
    if degree != 2:
      return self.opaque('^', canonical(base), Fraction(1, degree))
    if value is not None:
      return self._square_root(value)
    content, terms = primitive(base)
    rest = scale(dict(terms), Fraction(-1 if content < 0 else 1))
    factor = self._square_root(abs(content))
    return self.times(factor, self.opaque('^', canonical(rest), _HALF))

  def _square_root(self, value: Fraction) -> Sum:
    """Computes √(a/b) = √(ab)/b, times i if a is negative."""
    self._spend(10)
    factor, radicand = _square_factor(abs(value.numerator) * value.denominator)
    powers = (('i', 1),) if value < 0 else ()
    return {(radicand, powers): Fraction(factor, value.denominator)}

  def _multiply(self, one: Term, c: Fraction, other: Term, d: Fraction) -> Sum:
    """Multiplies two terms and their coefficients."""
    self._spend(1)
    common = math.gcd(one[0], other[0])
    powers = dict(one[1])
    for atom, exponent in other[1]:
      powers[atom] = powers.get(atom, 0) + exponent
    turns = powers.pop('i', 0) % 4
    if turns % 2:
      powers['i'] = 1
    kept = sorted(((a, e) for a, e in powers.items() if e), key=repr)
    radicand = one[0] * other[0] // common**2
    value = c * d * (-common if turns > 1 else common)
    return {(radicand, tuple(kept)): _bounded(value)}

  def _inverse(self, term: Term, c: Fraction) -> Sum:
    """Inverts a term: 1/√r = √r/r; exponents change sign."""
    flipped = tuple((atom, -exponent) for atom, exponent in term[1])
    inverse = (term[0], flipped), _bounded(1 / (c * term[0]))
    return self._multiply(_UNIT, Fraction(1), *inverse)

  def _spend(self, work: int) -> None:
    self._work -= work
    if self._work < 0:
      raise UnreadableError


def _terms(a: Sum) -> tuple:
  return tuple(sorted(a.items(), key=repr))


def _bounded(value: Fraction) -> Fraction:
  if _bits(value) > _MOST_BITS:
    raise UnreadableError
  return value


def _bits(value: Fraction) -> int:
  return max(value.numerator.bit_length(), value.denominator.bit_length())


def _single(a: Sum) -> tuple[Fraction, Term, Fraction]:
  """Returns (number, term, coefficient); a longer sum becomes a bracket."""
  if len(a) == 1:
    ((term, c),) = a.items()
    return Fraction(1), term, c
  content, terms = primitive(a)
  return content, (1, ((('sum', terms), 1),)), Fraction(1)


def _without_bracket(product: Sum, factor: Fraction) -> Sum:
  """Multiplies a term by a number; opens a bracket that is its only factor."""
  (((radicand, powers), c),) = product.items()
  if radicand == 1 and len(powers) == 1:
    ((atom, exponent),) = powers
    if exponent == 1 and atom[0] == 'sum':
      return scale(dict(atom[1]), c * factor)
  return scale(product, factor)


@functools.lru_cache(maxsize=4096)
def _square_factor(n: int) -> tuple[int, int]:
  """Returns (f, r), n = f² r; r is not a square and has none up to 1000²."""
  factor, d = 1, 2
  while d * d <= n and d <= _LARGEST_DIVISOR:
    while n % (d * d) == 0:
      n, factor = n // (d * d), factor * d
    d += 1
  whole = math.isqrt(n)
  return (factor * whole, 1) if whole * whole == n else (factor, n)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
  """Returns the real rational root of a number, or None."""
  if value < 0:
    root = _exact_root(-value, degree) if degree % 2 else None
    return None if root is None else -root
  roots = []
  for n in (value.numerator, value.denominator):
    root = round(n ** (1 / degree)) if n.bit_length() <= 50 else 0
    if root**degree != n:
      return None
    roots.append(root)
  return Fraction(*roots)
