"""Generated arithmetic of adjustable difficulty, with its steps worked out.

One datum:

  {'prompt':     '3+5*2-4=',
   'solution':   '3+10-4=13-4=9',
   'answer':     '9',
   'operations': 3}

The solution rewrites the whole expression once per operation, so every step can
be read off the one before: first the products, then sums and differences, each
from the left.  Only the first number of an expression can be negative.  All
characters are in `ALPHABET`; prompt and solution are separate strings and the
end token is the tokenizer's.

More operations, larger operands, `*` and no modulus make it harder.
Characters per solution grow with operations² · digits.
"""

import functools
import operator
import random
from collections.abc import Callable, Sequence

from jaxrl_llm.errors import UserError

ALPHABET = '0123456789+-*='

_OPERATORS = {'+': operator.add, '-': operator.sub, '*': operator.mul}

# Draws in a row without a new prompt after which the space counts as exhausted.
_MAX_FRUITLESS_DRAWS = 10_000


def generate(
  count: int,
  seed: int,
  *,
  operations: tuple[int, int] = (2, 3),
  operands: tuple[int, int] = (1, 9),
  operators: str = '+-*',
  modulus: int | None = None,
  largest: int | None = None,
  careless: float = 0.0,
  careless_per: str = 'solution',
) -> list[dict]:
  """Returns `count` rows with distinct prompts, a function of its arguments.

  Args:
    count: number of rows.
    seed: of Python's generator; the same seed gives the same rows.
    operations: least and greatest number of operators in an expression.
    operands: least and greatest operand, neither negative; (1, 9) is one digit,
      (10, 99) two.
    operators: which of '+-*' occur, each equally often.
    modulus: applied to every intermediate result, which bounds the digits and
      leaves no negative numbers; None for ordinary integers.  The prompt does
      not show it: it is a property of the data set.
    largest: bound on the absolute value of intermediate results; None for no
      limit.
    careless: share of solutions that work from left to right as if products
      did not come first, a pupil's mistake.  Their last number may be wrong;
      `answer` is always right.
    careless_per: 'step' applies `careless` to each operation for itself, so
      that a solution may hold several mistakes; 'solution' to all together.

  Raises:
    UserError: a range is impossible, or there are too few such prompts.
  """
  _check(count, operations, operands, operators, modulus, largest, careless)
  if careless_per not in ('solution', 'step'):
    raise UserError(
      f'arithmetic.generate: careless_per={careless_per!r}\n'
      "it is 'solution' or 'step'"
    )
  rng = random.Random(seed)
  lengths = range(operations[0], operations[1] + 1)
  values = range(operands[0], operands[1] + 1)
  seen = set()
  rows, fruitless = [], 0
  while len(rows) < count:
    length = rng.choice(lengths)
    numbers = [rng.choice(values) for _ in range(length + 1)]
    signs = [rng.choice(operators) for _ in range(length)]
    prompt = ''.join(_parts(numbers, signs)) + '='
    lines = None if prompt in seen else _work(numbers, signs, modulus, largest)
    shown = lines
    if careless and lines:
      slips = lambda: rng.random() < careless
      if careless_per == 'solution':
        slips = functools.cache(slips)
      shown = _work(numbers, signs, modulus, largest, slips)
    if shown is None:
      fruitless += 1
      if fruitless > _MAX_FRUITLESS_DRAWS:
        raise UserError(
          f'only {len(rows)} of {count} distinct arithmetic prompts were found '
          f'with operations={operations}, operands={operands}.\n'
          'Ask for fewer rows, or widen operations, operands or largest.'
        )
      continue
    fruitless = 0
    seen.add(prompt)
    rows.append(
      {
        'prompt': prompt,
        'solution': '='.join(shown),
        'answer': lines[-1],
        'operations': length,
      }
    )
  return rows


def _check(count, operations, operands, operators, modulus, largest, careless):
  """Raises UserError for settings that no expression can satisfy."""
  is_range = lambda pair, least: least <= pair[0] <= pair[1]
  is_none_or = lambda value, least: value is None or value >= least
  rule = 'must be (least, greatest) with least >='
  conditions = {
    f'count={count} must be at least 1': count >= 1,
    f'operations={operations} {rule} 1': is_range(operations, 1),
    f'operands={operands} {rule} 0': is_range(operands, 0),
    f"operators={operators!r} must be some of '+-*'": (
      operators and set(operators) <= set(_OPERATORS)
    ),
    f'modulus={modulus} must be at least 2 or None': is_none_or(modulus, 2),
    f'largest={largest} must be at least 1 or None': is_none_or(largest, 1),
    f'careless={careless} must be in [0, 1]': 0 <= careless <= 1,
  }
  for message, holds in conditions.items():
    if not holds:
      raise UserError(f'arithmetic.generate: {message}.')


def _work(
  numbers: Sequence[int],
  signs: Sequence[str],
  modulus: int | None,
  largest: int | None,
  slips: Callable[[], bool] = lambda: False,
) -> list[str] | None:
  """Returns the expression after each operation, or None beyond `largest`."""
  parts = _parts(numbers, signs)
  lines = []
  while len(parts) > 1:
    i = parts.index('*') if not slips() and '*' in parts else 1
    left, right = int(parts[i - 1]), int(parts[i + 1])
    value = _OPERATORS[parts[i]](left, right)
    if modulus is not None:
      value %= modulus
    if largest is not None and abs(value) > largest:
      return None
    parts[i - 1 : i + 2] = [str(value)]
    lines.append(''.join(parts))
  return lines


def _parts(numbers: Sequence[int], signs: Sequence[str]) -> list[str]:
  """Alternates numbers and signs."""
  parts = [''] * (2 * len(numbers) - 1)
  parts[::2] = map(str, numbers)
  parts[1::2] = signs
  return parts
