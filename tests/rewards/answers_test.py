"""Numbers are read exactly or not at all, whatever stands around them."""

import random
import time
from fractions import Fraction

import pytest

from jaxrl_llm.tasks import answers


@pytest.mark.parametrize(
  'text,value',
  [
    ('18', 18),
    (' +18. ', 18),
    ('-3', -3),
    ('\u22123', -3),  # a Unicode minus
    ('- 3', -3),
    ('1,234,567', 1234567),
    ('1,234.50', '1234.5'),
    ('.5', '1/2'),
    ('18.00', 18),
    ('1.5e3', 1500),
    ('2e-2', '1/50'),
    ('$18', 18),
    ('-$18', -18),
    ('$-18$', -18),
    ('\\$32,\\!348', 32348),
    ('10{,}080', 10080),
    ('50%', 50),
    ('50\\%', 50),
    ('3/4', '3/4'),
    ('-3 / 4', '-3/4'),
    ('1.5/2', '3/4'),
    ('1 1/2', '3/2'),
    ('-1 1/2', '-3/2'),
    ('\\frac{3}{4}', '3/4'),
    ('-\\dfrac{3}{4}', '-3/4'),
    ('\\frac{-3}{4}', '-3/4'),
    ('\\frac34', '3/4'),
    ('\\frac 9{19}', '9/19'),
    ('1\\frac{4}{5}', '9/5'),
    ('**18**', 18),
    ('18 dollars.', 18),
    ('5 miles per hour', 5),
    ('5.4\\text{ cents}', '5.4'),
    ('5 m', 5),
    ('1 000', 1000),
    ('1~000 000', 1000000),
    ('1\\,000.5', '1000.5'),
    ('5\\', 5),
    ('5\\\\', 5),
    ('5\\ \\text{ m}', 5),
    ('5,', 5),
    ('\\frac{1}{2}\\text{ cm}', '1/2'),
    ('5 miles a day', 5),
    ('5 L', 5),
    ('5 cm', 5),
    ('5 lbs', 5),
    ('60 MPH', 60),
    ('5 sq ft', 5),
    ('5 US dollars', 5),
    ('5 slices of pizza', 5),
    ('2 roots', 2),
    ('7 months', 7),
    ('9 gas stations', 9),
    ('9 logs', 9),
    ('3 CDs', 3),
    ('90 degrees F', 90),
  ],
)
def test_numbers(text, value):
  assert answers.parse_number(text) == Fraction(value)


@pytest.mark.parametrize(
  'text',
  ['', '-', '.', '18 19', '12,34', '1/0', '\\frac{1}{0}', '10:30', '1e999']
  + ['2 million', '3 dozen', '2\\pi', '2 pi', '2^{10}', '\\sqrt{2}', 'x=5']
  + [
    '3 or 4',
    '1/2/3',
    '1_000',
    '0x10',
    '5 x',
    '5 i',
    'inf',
    'nan',
    '$5$6',
    '5%6',
    '$5$600',
    '5%600',
    '5\\,6',
    '1234 567',
    '1 00',
    '\\frac{1}{2}3',
    '5...',
    '5,,',
    '5 xy',
    '2 ab',
    '4 x y',
    '4 m s',
    '2 abc',
    '2 xyz',
    '2 pqr units',
    '2 millions',
    '2 bn',
    '2 M',
    '2\\text{M}',
    '2 K',
    '2 mln dollars',
    '10\\text{ dozens}',
    '3 halves',
    '3\\text{ quarters}',
    '4 fifths',
    '5\\text{ thousandths}',
    '5 sixteenths of a mile',
    '5\\text{ factorial}',
    '5 theta',
    '5 of',
    '--7',
    '1 1.5/2',
    '5x',
  ]
  + ['9' * 101, '1' + ',000' * 50, 'eighteen', '(3,4)', '1\\frac{-1}{2}'],
)
def test_what_is_no_single_number(text):
  assert answers.parse_number(text) is None


def test_every_fraction_is_read_back():
  rng = random.Random(0)
  for _ in range(500):
    n = rng.randint(-(10 ** rng.randint(0, 40)), 10 ** rng.randint(0, 40))
    d = rng.randint(1, 10 ** rng.randint(0, 6))
    value = Fraction(n, d)
    assert answers.parse_number(str(value)) == value
    assert answers.parse_number(f'{n}/{d}') == value
    assert answers.parse_number(f'\\frac{{{n}}}{{{d}}}') == value
    assert answers.parse_number(f'${n:,}.') == n


@pytest.mark.parametrize(
  'text,value',
  [
    ('so\n#### 18', 18),
    ('#### 18\nQuestion: 19', 18),
    ('#### Step 1\ntwo\n#### $1,800.00\n', 1800),
    ('#### 5\n#### 6', 6),
    ('#### 5\n\\boxed{6}', 5),
    ('\\boxed{5} and \\boxed{\\frac{1}{2}}', '1/2'),
    ('\\boxed{{{7}}', None),  # never closed
    ('\\boxed{5} then \\boxed{6', 5),
    ('\\boxed {5}', 5),
    ('so $\\boxed 5$.', 5),
    ('\\boxed 5.', 5),
    ('\\boxed 56', None),
    ('$\\boxed 5.6$', None),
    ('$\\boxed 5^2$', None),
    ('\\fbox{5}', 5),
    ('\\boxed{5}, no more \\boxed{ } \\boxed{}', 5),
    ('#### 5,', 5),
    ('#### x=5', 5),
    ('#### $Total = 5$', 5),
    ('#### xy=5', None),
    ('#### 2x=5', None),
    ('#### x=5=6', None),
    ('#### x=5' + ' ' * 200 + '6', None),
    ('\\boxed{5} in {braces} and \\{6\\}', 5),
    ('} \\boxed{\\boxed{5}}', 5),
    ('\\boxed{\\text{six} 6}', None),
    ('####', None),
    ('the answer is 18', None),
    ('#### 18 or 19', None),
  ],
)
def test_marked_numbers(text, value):
  expected = None if value is None else Fraction(value)
  assert answers.marked_number(text) == expected


@pytest.mark.parametrize(
  'text,value',
  [
    ('the answer is $1,234.50.', '1234.5'),
    ('7-5', 5),
    ('7 - 5 = -2', -2),
    ('(3)-4', 4),
    ('2,3', 3),
    ('1 1/2 cups', '3/2'),
    ('3. ', 3),
    ('10/2=5', 5),
    ('none', None),
    ('1/0', None),
    ('9' * 5000, None),
  ],
)
def test_last_numbers(text, value):
  expected = None if value is None else Fraction(value)
  assert answers.last_number(text) == expected


@pytest.mark.parametrize(
  'text',
  [
    '\\boxed{' * 20_000,
    '\\boxed ' * 20_000,
    '\\boxed{}' * 20_000,
    '#### ' * 20_000,
    '1,' * 50_000,
    '1 ' * 50_000,
    '1/' * 50_000,
    '9' * 100_000,
    '#### ' + '\\frac{1}{' * 20_000,
    '\\boxed{9^{9^{9^{9}}}}',
    '#### 1e99999999',
  ],
)
def test_hostile_text_is_cheap(text):
  start = time.perf_counter()
  answers.marked_number(text)
  answers.last_number(text)
  assert time.perf_counter() - start < 2
