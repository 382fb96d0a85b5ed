"""Numbers are read exactly or not at all, whatever stands around them."""

import random
import time
from fractions import Fraction

import pytest

from jaxrl_llm.tasks import answers

# Texts and the number that each denotes, one per `;;`.
NUMBERS = r"""
18 => 18 ;; +18.  => 18 ;; -3 => -3 ;; −3 => -3 ;; - 3 => -3 ;; .5 => 1/2
1,234,567 => 1234567 ;; 1,234.50 => 1234.5 ;; 18.00 => 18 ;; 1.5e3 => 1500
2e-2 => 1/50 ;; $18 => 18 ;; -$18 => -18 ;; $-18$ => -18 ;; 10{,}080 => 10080
\$32,\!348 => 32348 ;; 50% => 50 ;; 50\% => 50 ;; 3/4 => 3/4 ;; -3 / 4 => -3/4
1.5/2 => 3/4 ;; 1 1/2 => 3/2 ;; -1 1/2 => -3/2 ;; \frac{3}{4} => 3/4
-\dfrac{3}{4} => -3/4 ;; \frac{-3}{4} => -3/4 ;; \frac34 => 3/4 ;; **18** => 18
\frac 9{19} => 9/19 ;; 1\frac{4}{5} => 9/5 ;; 18 dollars. => 18 ;; 5 m => 5
5 miles per hour => 5 ;; 5.4\text{ cents} => 5.4 ;; 1 000 => 1000 ;; 5\ => 5
1~000 000 => 1000000 ;; 1\,000.5 => 1000.5 ;; 5\\ => 5 ;; 5\ \text{ m} => 5
5, => 5 ;; \frac{1}{2}\text{ cm} => 1/2 ;; 5 miles a day => 5 ;; 5 L => 5
5 cm => 5 ;; 5 lbs => 5 ;; 60 MPH => 60 ;; 5 sq ft => 5 ;; 5 US dollars => 5
5 slices of pizza => 5 ;; 2 roots => 2 ;; 7 months => 7 ;; 9 gas stations => 9
9 logs => 9 ;; 3 CDs => 3 ;; 90 degrees F => 90
"""
NO_NUMBERS = r"""
- ;; . ;; 18 19 ;; 12,34 ;; 1/0 ;; \frac{1}{0} ;; 10:30 ;; 1e999 ;; 2 million
3 dozen ;; 2\pi ;; 2 pi ;; 2^{10} ;; \sqrt{2} ;; x=5 ;; 3 or 4 ;; 1/2/3 ;; 1_000
0x10 ;; 5 x ;; 5 i ;; inf ;; nan ;; $5$6 ;; 5%6 ;; $5$600 ;; 5%600 ;; 5\,6
1234 567 ;; 1 00 ;; \frac{1}{2}3 ;; 5... ;; 5,, ;; 5 xy ;; 2 ab ;; 4 x y
4 m s ;; 2 abc ;; 2 xyz ;; 2 pqr units ;; 2 millions ;; 2 bn ;; 2 M ;; 2\text{M}
2 K ;; 2 mln dollars ;; 10\text{ dozens} ;; 3 halves ;; 3\text{ quarters}
4 fifths ;; 5\text{ thousandths} ;; 5 sixteenths of a mile ;; 5\text{ factorial}
5 theta ;; 5 of ;; --7 ;; 1 1.5/2 ;; 5x ;; eighteen ;; (3,4) ;; 1\frac{-1}{2}
"""
# Texts with line ends as ¶.
MARKED = r"""
so¶#### 18 => 18 ;; #### 18¶Question: 19 => 18 ;; #### 5¶#### 6 => 6
#### Step 1¶two¶#### $1,800.00¶ => 1800 ;; #### 5¶\boxed{6} => 5
\boxed{5} and \boxed{\frac{1}{2}} => 1/2 ;; \boxed{{{7}} => ;; \boxed {5} => 5
\boxed{5} then \boxed{6 => ;; so $\boxed 5$. => 5 ;; \boxed 5. => 5
#### 5, => 5 ;; \boxed 56 => ;; $\boxed 5.6$ => ;; $\boxed 5^2$ =>
\fbox{5} => 5 ;; #### x=5 => 5 ;; \boxed{5}, no more \boxed{ } \boxed{} => 5
#### $Total = 5$ => 5 ;; #### xy=5 => ;; #### 2x=5 => ;; #### x=5=6 =>
\boxed{5} in {braces} and \{6\} => 5 ;; #### => ;; } \boxed{\boxed{5}} => 5
\boxed{\text{six} 6} => ;; the answer is 18 => ;; #### 18 or 19 =>
#### 3¶\boxed{4 => 3
"""
LAST = r"""
the answer is $1,234.50. => 1234.5 ;; 7-5 => 5 ;; 7 - 5 = -2 => -2 ;; (3)-4 => 4
2,3 => 3 ;; 1 1/2 cups => 3/2 ;; 3.  => 3 ;; 10/2=5 => 5 ;; none => ;; 1/0 =>
"""
LETTERS = r"""
A => A ;; (b) => B ;; C. 7 => C ;; B) 5 => B ;; **B** => B ;; Answer: D) 5 => D
\boxed{\text{C}} => C ;; $\boxed{\textbf{(C)}\ 5}$ => C
The answer is (e). => E ;; the correct option is C. => C
Answer: B because => B ;; I think => ;; A car => ;; The answer is A or B =>
Answer: A, B => ;; The answer is not B => ;; 7 => ;; =>
The answer is A good one => ;; (B) x => B ;; A, a cat =>
(A) and (B) => ;; Answer: (A) or (B) => ;; Answer: B's =>
\boxed{A} \boxed{B =>
"""


def rows(table):
  pieces = [p for line in table.split('\n') for p in line.split(';;')]
  pairs = [p.replace('¶', '\n').split('=>') for p in pieces if p.strip()]
  return [(text, value.strip() or None) for text, value in pairs]


def number(value):
  return None if value is None else Fraction(value)


@pytest.mark.parametrize('text, value', rows(NUMBERS))
def test_numbers(text, value):
  assert answers.parse_number(text) == Fraction(value)


@pytest.mark.parametrize(
  'text',
  [*NO_NUMBERS.replace('\n', ' ;; ').split(' ;; ')]
  + ['9' * 101, '1' + ',000' * 50],
)
def test_what_is_no_single_number(text):
  assert answers.parse_number(text) is None


def test_every_fraction_is_read_back():
  rng = random.Random(0)
  for _ in range(500):
    n = rng.randint(-(10 ** rng.randint(0, 40)), 10 ** rng.randint(0, 40))
    d = rng.randint(1, 10 ** rng.randint(0, 6))
    value = Fraction(n, d)
    for text in (str(value), f'{n}/{d}', f'\\frac{{{n}}}{{{d}}}'):
      assert answers.parse_number(text) == value
    assert answers.parse_number(f'${n:,}.') == n


@pytest.mark.parametrize('text, value', rows(MARKED))
def test_marked_numbers(text, value):
  assert answers.marked_number(text) == number(value)


@pytest.mark.parametrize('text, value', rows(LAST))
def test_last_numbers(text, value):
  assert answers.last_number(text) == number(value)


@pytest.mark.parametrize('text, letter', rows(LETTERS))
def test_letters_of_choices(text, letter):
  assert answers.marked_letter(text) == letter


@pytest.mark.parametrize(
  'text',
  ['\\boxed{' * 20_000, '\\boxed ' * 20_000, '\\boxed{}' * 20_000]
  + ['#### ' * 20_000, '#### ' + '\\frac{1}{' * 20_000, '#### 1e99999999']
  + ['1,' * 50_000, '1 ' * 50_000, '1/' * 50_000, '9' * 100_000]
  + ['\\boxed{9^{9^{9^{9}}}}', '#### x=5' + ' ' * 200 + '6', '(' * 100_000],
)
def test_hostile_text_is_cheap(text):
  start = time.perf_counter()
  assert answers.marked_number(text) is None
  answers.last_number(text)
  answers.marked_letter(text)
  assert time.perf_counter() - start < 2
