r"""Reads final numbers out of text: `#### 1,234`, `\boxed{\frac{3}{4}}`.

Numbers are Fractions, so 0.5, 1/2 and `\frac12` are equal, and 0.1 + 0.2 is
0.3.  Nothing is evaluated: the grammar is fixed and every size is bounded, so
hostile text costs no more than its length.
"""

import collections
import re
import string
from fractions import Fraction

# More characters than this are not an answer, and arithmetic on them is slow.
_MAX_CHARACTERS = 100
_MAX_BOX = 1000  # characters
_MAX_MARKS = 20  # only the last ones are tried

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
_AROUND_SLASH = re.compile(r'\s*/\s*')
_SCALE = re.compile(r'(degrees?) [CF]\b')
_VOWEL = re.compile('[aeiouy]')
# A box, or one around a single character that ends its formula or its line.
_BOX = re.compile(
  r'\\(?:boxed|fbox)[ \t]{0,4}'
  r'(?:\{|(\w)(?=[ \t]{0,4}(?:\$|\\[\])]|[.,]?[ \t]{0,4}(?:\n|\Z))))'
)
_FINAL_MARK = re.compile(r'[.,;]\Z')
_BRACE = re.compile(r'\\.|[{}]', re.DOTALL)
# "The answer is", "**Answer:**", "The correct option is".
_ENDING = re.compile(
  r'(?:answer|(?:correct|right|best) (?:option|choice))[*_]{0,2}\s{0,2}'
  r'(?:\bis\b|:)[\s:*_]{0,6}(?:(?:option|choice) )?(?=\S)',
  re.IGNORECASE,
)
_IN_MATH = re.compile(r'(?:\$+|\\\()(.*?)(?:\$+|\\\))')
_SENTENCE_END = re.compile(r'\.(?:\s|$)')
_MAX_ENDING = 600  # characters
# Not a word, as in "A good idea", nor one of two letters.
_LETTER = re.compile(
  r'\W*(?:(?:text|math)(?:bf|rm)?\W+)?(?![AaI] [a-z])([A-Za-z])(?![\w\'’])'
  r'(?![\s)*]*(?:[,/&]|or\b|and\b)\W*[A-Z](?!\w))'
)
_LETTER_ALONE = re.compile(r'[\s(*]*[A-Za-z]\**\s*(?:[).:]|\Z)')
# A space in LaTeX; not the one after a line break.
_SPACE = re.compile(r'\\\\|\\[ ,;:]|[~\u00a0\u2009\u202f]')
# A letter, or a word; not xy, which is a product.
_NAMED = re.compile(r'[\s$*]*(?:[A-Za-z]|[A-Za-z]{3,})\s*=(?!.*=)(.*)')
# Thousands apart, as in 1 000 and 1\,000.
_SPACED = re.compile(r'(?<![\d.,/])\d{1,3}(?:(?: |\\,)\d{3})+(?![\d,]|\s*/)')
# Two spaces: a single one could separate thousands and join the digits around.
_APART = '  '
_LATEX_TEXT = re.compile(r'\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}')

# Words after a number that change it: "2 million" is not 2.
_CHANGING_WORDS = frozenset(
  ('half', 'halve', 'third', 'quarter', 'fourth', 'fifth', 'sixth', 'seventh')
  + ('eighth', 'ninth', 'tenth', 'eleventh', 'twelfth', 'dozen', 'hundred')
  + ('thousand', 'million', 'billion', 'trillion', 'mil', 'mill', 'bil', 'tril')
  + ('squared', 'cubed', 'factorial', 'choose', 'mod', 'modulo', 'root', 'sqrt')
  + ('and', 'or', 'to', 'plus', 'minus', 'times', 'over', 'by')
  + ('sin', 'cos', 'tan', 'log', 'exp', 'pi', 'alpha', 'beta', 'gamma', 'delta')
  + ('theta', 'lambda', 'sigma', 'phi', 'omega', 'infty', 'infinity')
)
_NOT_IN_PLURAL = frozenset(('roots', 'logs'))
_PARTS = ('teenth', 'tieth', 'dredth', 'sandth', 'illionth')
# Any other single letter is a variable, or a power of ten.
_UNIT_LETTERS = frozenset('dghlmsL')
# Units of two letters, or of three without a vowel; others are products.
_SHORT_UNITS = frozenset(
  ('cc', 'cd', 'cm', 'cu', 'dl', 'ft', 'gb', 'hr', 'hz', 'in', 'kb', 'kg', 'kj')
  + ('km', 'kph', 'kw', 'kwh', 'lb', 'mb', 'mg', 'mi', 'ml', 'mm', 'mpg', 'mph')
  + ('oz', 'pt', 'qt', 'rpm', 'sq', 'tbs', 'tv', 'wpm', 'yd')
)
# Only within a unit.
_LITTLE_WORDS = frozenset(('a', 'an', 'at', 'is', 'it', 'of', 'on', 'so', 'us'))


def parse_number(text: str) -> Fraction | None:
  r"""Returns the number that the whole of `text` denotes, or None.

  Allowed around it: spaces, a sign, `$`, `%`, emphasis, a final full stop, and
  up to four words after it as a unit, unless they change the number
  (`2 million`, `3 x`, `3 xy`).  Within it: thousands commas, decimals, powers
  of ten up to two digits (`1.5e3`), `a/b`, `\frac{a}{b}`, mixed numbers
  (`1 1/2`).
  """
  text = text.strip()
  if len(text) > _MAX_CHARACTERS:
    return None
  text = text.replace('−', '-').replace('{,}', ',').replace('\\!', '')
  text = with_spaces(text)
  text = _SPACED.sub(lambda match: match[0].replace(' ', ''), text)
  for mark in ('\\$', '\\%', '$', '%'):
    text = text.replace(mark, _APART)
  text = _LATEX_TEXT.sub(r' \1', text)
  text = _FRAC.sub(lambda m: f' {m[1] or m[2]}/{m[3] or m[4]}{_APART}', text)
  text = _FINAL_MARK.sub('', text.strip(' *_`')).strip(' *_`')
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


def with_spaces(text: str) -> str:
  r"""Replaces LaTeX's spaces by plain ones, and drops them from `1\,000`.

  A line break or a partial space at the end is dropped.
  """
  text = _SPACED.sub(
    lambda match: match[0].replace('\\,', ''), text.strip().rstrip('\\ ')
  )
  return _SPACE.sub(lambda match: match[0] if match[0] == '\\\\' else ' ', text)


def is_unit(text: str) -> bool:
  """Returns True if words after a number leave it unchanged, as "miles" does.

  A lone letter is a variable unless it is d, g, h, l, m or s; consecutive
  letters of the alphabet are variables, too.  Two letters, or three without a
  vowel, are a product unless they are a known unit.  (A product such as "axy"
  is taken for a word.)
  """
  text = _AROUND_SLASH.sub('/', text.replace('.', ' '))
  words = _SCALE.sub(r'\1', text).split()
  if len(words) > 1 and all(len(word) == 1 for word in words):
    return False
  if words and _LITTLE_WORDS.issuperset(map(str.lower, words)):
    return False
  return all(_is_of_unit(part) for word in words for part in word.split('/'))


def _is_of_unit(word: str) -> bool:
  """Returns True if the word may belong to a unit."""
  if word in _UNIT_LETTERS or word.lower() in _LITTLE_WORDS:
    return True
  word = word.lower()
  one = word if word in _NOT_IN_PLURAL else word.removesuffix('s')
  if not _CHANGING_WORDS.isdisjoint((word, one)) or one.endswith(_PARTS):
    return False
  if len(word) == 2 or len(word) == 3 and not _VOWEL.search(word):
    return not _SHORT_UNITS.isdisjoint((word, one))
  return len(word) > 2 and word not in string.ascii_lowercase


def marked_text(text: str) -> str | None:
  r"""Returns the answer that `text` marks, verbatim, or None.

  The last `\boxed{…}`, and nothing if it does not end; failing that, the last
  line after `####`; failing that, the text after the last "answer is",
  "Answer:", "correct option is" or the like, within its sentence or its `$…$`.
  """
  box = last_boxed(text)
  if box is not None:
    return box or None
  for line in hash_lines(text):
    if line.strip():
      return line
  endings = collections.deque(_ENDING.finditer(text), 1)
  if not endings:
    return None
  rest = text[endings[0].end() :][:_MAX_ENDING]
  line = rest.partition('\n')[0]
  formula = _IN_MATH.match(line)
  return formula[1] if formula else _SENTENCE_END.split(line)[0]


def marked_letter(text: str) -> str | None:
  """Returns the capital letter of the choice that `text` makes, or None."""
  marked = marked_text(text)
  if marked is None and _LETTER_ALONE.match(text):
    marked = text
  match = _LETTER.match((marked or '')[:200])
  return match[1].upper() if match else None


def marked_number(text: str) -> Fraction | None:
  r"""Returns the number that `text` marks as its answer, or None.

  The last line with `####` and a number after it; failing that, the last
  `\boxed{…}`, which must end and hold only a number, with or without `x =`.
  """
  for line in hash_lines(text):
    number = _named_number(line)
    if number is not None:
      return number
  return _named_number(last_boxed(text) or '')


def _named_number(text: str) -> Fraction | None:
  named = len(text) <= 2 * _MAX_CHARACTERS and _NAMED.fullmatch(text)
  return parse_number(named[1] if named else text)


def hash_lines(text: str) -> list[str]:
  """Returns the text after `####` on its line, for the last 20, last first."""
  pieces = text.rsplit('####', _MAX_MARKS)[1:]
  return [piece.partition('\n')[0] for piece in reversed(pieces)]


def last_boxed(text: str) -> str | None:
  r"""Returns the content of the last `\boxed{…}` or `\fbox{…}`, or None.

  Empty ones do not count.  '' for one that does not end within 1000 characters:
  an answer that was cut off is not the one before it.  Only the last 20 are
  considered.
  """
  boxes = collections.deque(_BOX.finditer(text), _MAX_MARKS)
  for box in reversed(boxes):
    content = box[1] or _group(text, box.end())
    if content is None:
      return ''
    if content and not content.isspace():
      return content
  return None


def _group(text: str, start: int) -> str | None:
  """Returns the text from `start` to its closing brace; None if too long."""
  depth = 1
  for match in _BRACE.finditer(text, start, start + _MAX_BOX):
    depth += {'{': 1, '}': -1}.get(match[0], 0)
    if not depth:
      return text[start : match.start()]
  return None


def last_number(text: str) -> Fraction | None:
  """Returns the last number anywhere in `text`, or None.

  A minus counts as a sign unless it follows a letter, digit or bracket.
  """
  numbers = _IN_TEXT.findall(text.replace('−', '-'))
  return parse_number(numbers[-1]) if numbers else None


def _fraction(decimal: str) -> Fraction:
  return Fraction(decimal.replace(',', '').removesuffix('.'))
