r"""Canonical forms against values: random expressions are computed in Python.

An expression is drawn as a tree, with its value at fixed complex numbers for
the letters, and written in LaTeX in random ways.
"""

import cmath
import math
import random
from fractions import Fraction

import pytest

from jaxrl_llm.rewards.expressions import read_equation, read_expression

# Values that satisfy no equation between small numbers.
LETTERS = {'x': 0.7312 + 0.218j, 'y': -1.1307 + 0.41j, 'n': 2.2361 - 0.177j}


@pytest.mark.parametrize(
  'one, other',
  [
    (r'\frac{\sqrt3}{3}', r'1/\sqrt{3}'),
    (r'\sqrt{12}', r'2\sqrt3'),
    (r'\sqrt{\frac{3}{4}}', r'\frac{\sqrt3}{2}'),
    (r'3\sqrt2*\sqrt{2}', '6'),
    (r'\frac{1}{1+\sqrt2}', r'\sqrt2-1'),
    (r'\frac{2}{3+4i}', r'\frac{6-8i}{25}'),
    (r'\sqrt{-4}', '2i'),
    ('i^3', '-i'),
    (r'(1+\sqrt5)^2', r'6+2\sqrt5'),
    (r'\sqrt[3]{8}', '2'),
    ('8^{2/3}', '4'),
    ('2^{10}', '1024'),
    (r'12^{1/7}', r'\sqrt[7]{12}'),
    ('2^{2005}', '2^{2005}+0'),
    ('(x+1)^2', '(1+x)(x+1)'),
    (r'x^{1/2}', r'\sqrt{x}'),
    (r'\sqrt{4x+4}', r'2\sqrt{1+x}'),
    ('x^{10}', 'x^10'),
    ('x^{-1}', r'\frac1x'),
    (r'\frac{1}{1-x}', r'\frac{-1}{x-1}'),
    (r'\frac{11+9a}{20}', r'\frac{9a}{20}+0.55'),
    ('2(x+1)', '2x+2'),
    (r'\pi(r+2)', r'2\pi+\pi r'),
    ('-(ab+ac)', '-ca-ba'),
    ('(a+5)(b+2)', '(2+b)(5+a)'),
    ('1\\frac{1}{2}+x', 'x+1.5'),
    ('2*-3', '-6'),
    ('52_8', '52_{8}'),
    ('x_1+x_{12}', 'x_{12}+x_{1}'),
    (r'\sin 3x', r'\sin(3x)'),
    (r'2 \sin b \cos a', r'2\cos(a)\sin{b}'),
    (r'\tan \frac{x}{2}', r'\tan(x/2)'),
    (r'\sin^2 t', r'(\sin t)^{2}'),
    (r'\sin(x)^2', r'\sin^2 x'),
    (r'3\cos(2x)^2 \sin x', r'3\sin x\cos^2(2x)'),
    (r'\sin(x)!', r'(\sin x)!'),
    (r'\tan^{-1}x', r'\arctan x'),
    (r'\sin^{-1}(x)^2', r'(\arcsin x)^2'),
    (r'\frac{1}{2004!}', '1/2004!'),
  ],
)
def test_equal(one, other):
  assert read_expression(one) is not None
  assert read_expression(one) == read_expression(other)


@pytest.mark.parametrize(
  'one, other',
  [
    ('x^2-1', '(x-1)(x+1)'),
    ('52_8', '52'),
    ('52_8', '52_9'),
    ('ab', 'a+b'),
    (r'\sqrt2', r'\sqrt3'),
    (r'\sqrt[3]{2}', r'\sqrt{2}'),
    ('x', 'X'),
    ('(x+1)^2', '(x+1)^3'),
    ('2^n', 'n^2'),
    ('2^{2005}', '2^{2006}'),
    (r'\sin x', r'\cos x'),
    (r'\sin x^2', r'\sin^2 x'),
    (r'\sin(x)^2', r'\sin(x^2)'),
    (r'\tan^{-1}x', r'\frac{1}{\tan x}'),
    ('4!', '5!'),
    ('2i', '2'),
    ('x_1', 'x_2'),
  ],
)
def test_different(one, other):
  assert read_expression(one) is not None
  assert read_expression(one) != read_expression(other)


@pytest.mark.parametrize(
  'text',
  ['', '+', '(', '()', 'x)', '2 3', 'x2', r'\sqrt13', r'\frac{1}{0}', '1/0']
  + ['0^0', '0^{-1}', 'x^{}', r'\frac1', r'\unknown x', 'a,b', '3:1', 'x=5']
  + ['|x|', r'\sqrt[1]{2}', '(' * 40 + '1' + ')' * 40, '9' * 200]
  + [r'\frac{1}{' * 40 + '2' + '}' * 40, '5' + '!' * 100, '(a+b)' * 300],
)
def test_what_is_not_read(text):
  assert read_expression(text) is None


def test_equations():
  form = read_equation('2x-y', '3')
  assert form is not None
  for sides in (('3', '2x-y'), ('4x-2y', '6'), ('0', 'y-2x+3'), ('y', '2x-3')):
    assert read_equation(*sides) == form
  for sides in (('2x-y', '4'), ('2x+y', '3'), ('x-y', '3'), ('2x', '3')):
    assert read_equation(*sides) != form
  assert read_equation('1', '2') is None and read_equation('x', 'x') is None
  assert read_equation('x', ')') is None


def draw(rng, depth, leaves, denominators):
  """A random tree: a text and its value, or a kind and its parts."""
  kind = rng.choice(['sum', 'product', 'fraction', 'power', 'leaf', 'leaf'])
  if not depth or kind == 'leaf':
    return rng.choice(leaves)
  below = lambda: draw(rng, depth - 1, leaves, denominators)
  if kind == 'fraction':
    return kind, below(), rng.choice(denominators)
  if kind == 'power':
    return kind, below(), rng.choice([2, 3])
  return kind, *(below() for _ in range(rng.choice([2, 3])))


def value(tree):
  kind, *parts = tree
  if kind == 'sum':
    return sum(map(value, parts))
  if kind == 'product':
    return math.prod(map(value, parts))
  if kind == 'fraction':
    return value(parts[0]) / value(parts[1])
  if kind == 'power':
    return value(parts[0]) ** parts[1]
  return parts[0]


def write(rng, tree):
  """The tree in LaTeX, its terms and factors in a random order."""
  kind, *parts = tree
  parts = rng.sample(parts, len(parts)) if kind in ('sum', 'product') else parts
  if kind == 'sum':
    return ' + '.join(write(rng, part) for part in parts)
  if kind == 'product':
    text = ''
    for part in parts:
      factor = write(rng, part)
      if part[0] in ('sum', 'power') or factor[0] == '-':
        factor = f'({factor})'
      # A digit behind a factor is none, and 2\frac12 a mixed number.
      mixed = text[-1:].isdigit() and factor.startswith('\\frac')
      joined = mixed or factor[0].isdigit()
      join = '*' if joined else rng.choice(['*', ' '])
      text += (join if text else '') + factor
    return text
  if kind == 'fraction':
    above, below = (write(rng, part) for part in parts)
    forms = f'\\frac{{{above}}}{{{below}}}', f'{{({above})/({below})}}'
    return rng.choice(forms)
  if kind == 'power':
    return f'({write(rng, parts[0])})^{{{parts[1]}}}'
  return rng.choice(kind.split('|'))


ROOTS = [
  (f'\\sqrt{{{n}}}|\\sqrt {{{4 * n}}}/2', math.sqrt(n)) for n in (2, 3, 6, 8)
]
NUMBERS = [
  ('2|2.0|\\frac{4}{2}', 2),
  ('-1', -1),
  ('3', 3),
  ('0.5|\\frac12|1/2', 0.5),
]
CONSTANTS = [*NUMBERS, *ROOTS, ('i', 1j)]
SYMBOLS = [(name, z) for name, z in LETTERS.items()]


def test_the_order_of_terms_and_factors_does_not_matter():
  rng = random.Random(0)
  leaves = [*CONSTANTS, *SYMBOLS, ('\\pi', math.pi)]
  read = 0
  for _ in range(300):
    tree = draw(rng, 3, leaves, leaves)
    texts = [write(rng, tree) for _ in range(3)]
    forms = [read_expression(text) for text in texts]
    assert forms[0] == forms[1] == forms[2], texts
    read += forms[0] is not None
  assert read > 250


def test_equal_forms_have_equal_values():
  rng = random.Random(1)
  leaves = [*NUMBERS[:3], ROOTS[0], *SYMBOLS[:2]]
  values, shared = {}, 0
  for _ in range(1500):
    tree = draw(rng, 2, leaves, [*leaves, ('sum', leaves[2], leaves[-1])])
    text = write(rng, tree)
    form = read_expression(text)
    if form is None:
      continue
    first, expected = values.setdefault(form, (text, value(tree)))
    assert cmath.isclose(value(tree), expected, rel_tol=1e-9), (text, first)
    shared += text != first
  assert shared > 200  # else nothing was compared


def test_constants_of_equal_value_have_equal_forms():
  rng = random.Random(2)
  forms, shared = {}, 0
  for _ in range(800):
    tree = draw(rng, 2, CONSTANTS, [*NUMBERS, *ROOTS])
    text, z = write(rng, tree), value(tree)
    form = read_expression(text)
    if isinstance(form, Fraction):
      assert cmath.isclose(form, z, rel_tol=1e-9, abs_tol=1e-9), text
    key = round(z.real, 7) + 0.0, round(z.imag, 7) + 0.0
    first, expected = forms.setdefault(key, (text, form))
    assert form is not None and form == expected, (text, first)
    shared += text != first
  assert shared > 200


def test_what_is_too_long_is_not_read():
  """Python refuses to convert so many digits."""
  for text in ('9' * 5000, '0.' + '9' * 5000, 'x^{' + '9' * 5000 + '}'):
    assert read_expression(text) is None
    assert read_equation(text, 'x') is None
