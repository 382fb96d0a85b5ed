r"""Reads final numbers out of text: `#### 1,234`, `\boxed{\frac{3}{4}}`.

Numbers are Fractions, so 0.5, 1/2 and `\frac12` are one number, and 0.1 + 0.2
is 0.3.  Nothing is evaluated: the grammar is fixed and every size is bounded,
so that hostile text costs no more than its length.
"""

import re
from fractions import Fraction

# More characters than this are no answer, and arithmetic on them would be slow.
_MAX_CHARACTERS = 100
_MAX_BOX = 1000  # characters
_MAX_MARKS = 20  # the last so many are tried

_DIGITS = r'(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)'
_DECIMAL = rf'(?:{_DIGITS}(?:\.\d*)?|\.\d+)'
_ARGUMENT = r'\s*(?:\{([^{}]*)\}|(\d))'
_FRAC = re.compile(rf'\\[dt]?frac{_ARGUMENT}{_ARGUMENT}')
_NUMBER = re.compile(
  rf'([+-]?)\s*(?:(\d+)\s+(?=\d+\s*/))?'
  rf'({_DECIMAL})(?:[eE]([+-]?\d{{1,2}}))?'
  rf'(?:\s*/\s*({_DECIMAL}))?((?:\s+[A-Za-z]+){{0,4}})'
)
_IN_TEXT = re.compile(
  r'(?:(?<![\w)\]])-)?\$?(?:\d+ (?=\d+/\d))?'
  rf'(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:/\d+)?'
)
_BRACE = re.compile(r'\\.|[{}]', re.DOTALL)
_LATEX_TEXT = re.compile(r'\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}')

# Words after a number that change it: "2 million" is not 2.
_CHANGING_WORDS = frozenset(
  ('half', 'dozen', 'hundred', 'thousand', 'million', 'billion', 'trillion')
  + ('k', 'pi', 'squared', 'cubed', 'and', 'or', 'to', 'plus', 'minus')
  + ('times', 'over', 'by')
)
# Of all other letters one alone is a variable.
_UNIT_LETTERS = frozenset('dghlms')


def parse_number(text: str) -> Fraction | None:
  r"""The number that the whole of `text` is, or None.

  Allowed around it: spaces, a sign, `$`, `%`, emphasis, a final full stop, and
  up to four words after it as a unit, unless one of them changes the number
  (`2 million`, `3 x`).  Within it: thousands commas, decimals, powers of ten
  up to two digits (`1.5e3`), `a/b`, `\frac{a}{b}`, mixed numbers (`1 1/2`).
  """
  text = text.strip()
  if len(text) > _MAX_CHARACTERS:
    return None
  text = text.replace('−', '-').replace('{,}', ',')
  for mark in ('\\!', '\\,', '\\$', '\\%', '$', '%'):
    text = text.replace(mark, '')
  text = _LATEX_TEXT.sub(r' \1', text)
  text = _FRAC.sub(lambda m: f' {m[1] or m[2]}/{m[3] or m[4]}', text)
  text = text.strip(' *_`').removesuffix('.').strip(' *_`')
  match = _NUMBER.fullmatch(text)
  if match is None:
    return None
  sign, whole, numerator, exponent, denominator, unit = match.groups()
  if unit and not is_unit(unit):
    return None
  value = _fraction(numerator) * Fraction(10) ** int(exponent or 0)
  if denominator is not None:
    divisor = _fraction(denominator)
    if not divisor:
      return None
    value = value / divisor + int(whole or 0)
  return -value if sign == '-' else value


def is_unit(text: str) -> bool:
  """Whether words behind a number leave it what it is, as "miles" do.

  A lone letter is a variable rather than a unit, but for d, g, h, l, m, s.
  """
  words = text.lower().split()
  if len(words) == 1 and len(words[0]) == 1:
    return words[0] in _UNIT_LETTERS
  return not _CHANGING_WORDS & set(words)


def marked_number(text: str) -> Fraction | None:
  r"""The number that `text` gives as its answer, or None.

  The last line that has `####` and a number after it; failing that, the last
  `\boxed{…}`, which must hold a number and nothing else.
  """
  for line in hash_lines(text):
    number = parse_number(line)
    if number is not None:
      return number
  content = last_boxed(text)
  return None if content is None else parse_number(content)


def hash_lines(text: str) -> list[str]:
  """What follows `####` in its line, the last 20 times, the last first."""
  pieces = text.rsplit('####', _MAX_MARKS)[1:]
  return [piece.partition('\n')[0] for piece in reversed(pieces)]


def last_boxed(text: str) -> str | None:
  r"""What stands between the braces of the last closed `\boxed{…}`, or None.

  Closed is one that ends within 1000 characters; the last 20 are looked at.
  """
  end = len(text)
  for _ in range(_MAX_MARKS):
    end = text.rfind('\\boxed{', 0, end)
    if end < 0:
      return None
    start, depth = end + len('\\boxed{'), 1
    for match in _BRACE.finditer(text, start, start + _MAX_BOX):
      depth += {'{': 1, '}': -1}.get(match[0], 0)
      if not depth:
        return text[start : match.start()]
  return None


def last_number(text: str) -> Fraction | None:
  """The last number anywhere in `text`, or None.

  A minus counts as a sign unless it follows a letter, digit or bracket.
  """
  found = _IN_TEXT.findall(text.replace('−', '-'))
  return parse_number(found[-1]) if found else None


def _fraction(decimal: str) -> Fraction:
  return Fraction(decimal.replace(',', '').removesuffix('.'))
