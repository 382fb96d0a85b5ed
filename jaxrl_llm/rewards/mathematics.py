r"""Canonical forms of mathematical answers: numbers, lists, intervals, words.

  `0.5` is `\frac{1}{2}`          `5` is `x = 5`        `(E)` is `\text{E}`
  `2, 1` is `\{1, 2\}`            `1 \pm \sqrt2` is `1-\sqrt2, 1+\sqrt2`
  `(3,\pi/2]` is `\left( 3, \frac\pi2 \right]`          `x^2+1` is `1+x^2`

Forms can be compared and hashed, so that majorities can be counted.  Sets, and
lists without brackets, are unordered; tuples are ordered.  Units, degree and
per-cent signs are ignored, as is the text after the letter of a choice, as in
`\textbf{(C)}\ 5`.  Other text is compared without its spaces.  Nothing is
evaluated and every size is bounded, as in `expressions`.
"""

import re
from collections.abc import Hashable

from jaxrl_llm.rewards import expressions
from jaxrl_llm.tasks import answers

_MAX_CHARACTERS = 300
_DEEPEST = 6  # nested brackets of tuples, sets and matrices
_MOST_PARTS = 32  # of a list; longer ones are text

# One character per command; commands that only affect layout are dropped.
_MEANINGS = {
  **dict.fromkeys(['dfrac', 'tfrac', 'cfrac'], '\\frac'),
  **dict.fromkeys(['left', 'right', 'big', 'Big', 'displaystyle'], ''),
  **dict.fromkeys(['boldsymbol', 'bm', 'bf', 'rm', 'underline'], ' '),
  **dict.fromkeys(['quad', 'qquad'], ' '),
  **dict.fromkeys(['le', 'leq', 'leqslant'], '≤'),
  **dict.fromkeys(['ge', 'geq', 'geqslant'], '≥'),
  **dict.fromkeys(['ne', 'neq'], '≠'),
  **dict.fromkeys(['cdot', 'times'], '*'),
  **dict.fromkeys(['circ', 'degree'], '°'),
  **dict.fromkeys(['emptyset', 'varnothing'], '∅'),
  **dict(langle='(', rangle=')'),
  **dict(div='/', lt='<', gt='>', cup='∪', pm='±', approx='≈'),
  **{'in': '∈', 'lbrace': '⦃', 'rbrace': '⦄', '{': '⦃', '}': '⦄', '\\': '⏎'},
}
_CHARACTERS = str.maketrans(
  {'−': '-', '–': '-', '×': '*', '·': '*', '÷': '/'}
  | {'π': '\\pi ', '∞': '\\infty ', '√': '\\sqrt '}
)
_COMMAND = re.compile(r'\\([A-Za-z]+|.)', re.DOTALL)
_WORDS_IN_LATEX = re.compile(
  r'\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it)|operatorname)\s*'
  r'\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?'
)
_MATRIX = re.compile(
  r'\\(begin|end)\s*\{(?:[pb]?matrix|array)\}(?:(?<=y\})\s*\{[clr|\s]*\})?'
)
_LAYOUT = re.compile(
  r'\s*\\!\s*|\\phantom\s*(?:\{[^{}]*\}|.)|\\(?:text)?color\s*\{\w*\}'
  r'|(?<=\\\\)\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]'
)
# Replaced by spaces, which keep the digits around it apart.
_MONEY = re.compile(r'\\?[$%]')
_DEGREE = re.compile(r'(?:\^\s*\{?\s*°\s*\}?|°)(\s*\d)?')
# \textbf{(C)}\ 5, whose letter is the answer.
_CHOICE = re.compile(
  r'\\(?:text(?:bf|rm)?|math(?:rm|bf))\s*\{\s*\(([A-E])\)\s*\}'
  r'(?:[-\w{}^./ ]|\\(?:[dt]?frac|sqrt|pi)\b)*\d[\w{}^./ ]*'
)
_PLAIN_COMMAND = re.compile(r'(?<![\\A-Za-z])(pi|sqrt|infty)(?![A-Za-z])')
_CONJUNCTION = re.compile(r'\b(?:and|or)\b')
_THOUSANDS = re.compile(r'(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])')
# Not xy, which is a product.
_WORDS = re.compile(r'(?=.*(?:[A-Za-z]{3}|[A-Z]{2}))[A-Za-z]+(?: +[A-Za-z]+)*')
_UNIT = re.compile(
  r'(?<=[\w})\]])((?:\s+[A-Za-z]{2,}\.?){1,4})'
  r'(?:\s*\^\s*\{?\d\}?)?$'
)
# Allowed before "=" without being part of the answer: a letter, a word, f(x),
# (x,y); not xy, which is a product.
_NAME = re.compile(
  r'(?:\\[A-Za-z]+|[A-Za-z]|[A-Z]{2}|[A-Za-z]{3,})(?:_\{?\w+\}?)?\'*'
  r'|[A-Za-z]?\([A-Za-z](?:,[A-Za-z])*\)|'
)
_IN_MATH = re.compile(r'(?:\$+|\\\()(.*?)(?:\$+|\\\))')
_SENTENCE_END = re.compile(r'\.(?:\s|$)')
_CLOSING = dict(zip('([{⦃⟦', ')]}⦄⟧', strict=True))
_RELATIONS = '=<>≤≥≠∈≈'
_REVERSED = {'>': '<', '≥': '≤'}


def read_answer(text: str) -> Hashable | None:
  """Returns the canonical form of an answer without its mark.

  A Fraction for a rational number.  None for an empty text and beyond 300
  characters.
  """
  text = text.strip()
  if len(text) > _MAX_CHARACTERS:
    return None
  number = answers.parse_number(text)
  return _read_list(_cleaned(text), 0) if number is None else number


def marked_answer(text: str) -> Hashable | None:
  """Returns the canonical form of `marked_text`, or None."""
  marked = marked_text(text)
  return None if marked is None else read_answer(marked)


def marked_text(text: str) -> str | None:
  r"""Returns the answer that `text` marks, verbatim, or None.

  The last `\boxed{…}`; failing that, the last line after `####`; failing that,
  the text after the last "answer is", within its sentence or its `$…$`.
  """
  content = answers.last_boxed(text)
  if content is not None:
    return content
  for line in answers.hash_lines(text):
    if line.strip():
      return line
  start = max(text.rfind('answer is'), text.rfind('Answer is'))
  if start < 0:
    return None
  rest = text[start + len('answer is') :][: 2 * _MAX_CHARACTERS]
  line = rest.lstrip(' :').partition('\n')[0]
  formula = _IN_MATH.match(line)
  return formula[1] if formula else _SENTENCE_END.split(line)[0]


def _cleaned(text: str) -> str:
  """Returns the text with one notation for each meaning."""
  text = answers.with_spaces(text).translate(_CHARACTERS)
  text = _MONEY.sub('  ', _LAYOUT.sub('', text)).strip()
  text = _CHOICE.sub(r'\1', text) if _CHOICE.fullmatch(text) else text
  text = _MATRIX.sub(lambda m: '⟦' if m[1] == 'begin' else '⟧', text)
  text = _WORDS_IN_LATEX.sub(_words, text)
  text = _COMMAND.sub(_meaning, text)
  text = _DEGREE.sub(lambda m: '°' + m[1] if m[1] else '', text)
  text = _CONJUNCTION.sub(',', text)
  text = _PLAIN_COMMAND.sub(r'\\\1', text)
  if not any(mark in text for mark in '([⦃⟦'):
    text = _THOUSANDS.sub(lambda m: m[0].replace(',', ''), text)
  return text.strip(' \t\n*`:;,').rstrip('.;, ')


def _words(match: re.Match) -> str:
  r"""Replaces `\text{…}` by its words, or by nothing if it is a unit."""
  words, before = match[1].strip(), match.string[: match.start()].rstrip()
  after_value = before[-1:].isalnum() or before[-1:] in tuple('})]')
  if after_value and re.fullmatch(r'[A-Za-z/. ]+|\([A-Za-z/. ]+\)', words):
    words = words.strip('()')
    clock = words.lower().replace('.', '') in ('am', 'pm')
    if answers.is_unit(words) and not clock:
      return ' '
  return f' {words} {match[2] or ""}'


def _meaning(match: re.Match) -> str:
  name = match[1]
  if name in _MEANINGS:
    return _MEANINGS[name]
  return match[0] if name.isalpha() else ''


def _read_list(text: str, depth: int) -> Hashable | None:
  """Reads one value, or several in any order; None for an empty text."""
  pieces = _split(text, ',;')
  if not pieces or depth > _DEEPEST or len(pieces) > 2 * _MOST_PARTS:
    return 'text', _compact(text)
  elements = [
    element
    for piece in pieces[::2]
    if piece.strip()
    for element in _read_element(piece, depth)
  ]
  # x = 1, x = 2 are two numbers; a = 1, b = 2 are not.
  several = len({name for name, _ in elements} - {''}) > 1
  values = [
    ('=', name, value) if several else value for name, value in elements
  ]
  if len(values) < 2:
    return values[0] if values else None
  return 'in any order', tuple(sorted(values, key=repr))


def _read_element(text: str, depth: int) -> list[tuple[str, Hashable]]:
  """Returns [(name, value)] for `name = value`; two of them for a ±."""
  sides = _split(text, _RELATIONS)
  sides, signs = sides[::2], sides[1::2]
  name = ''.join(sides[0].split())
  if len(sides) == 2 and signs[0] in '=∈≈' and _NAME.fullmatch(name):
    return [(name, value) for value in _read_values(sides[1], depth)]
  if not signs:
    return [('', value) for value in _read_values(text, depth)]
  if signs == ['=']:
    equation = expressions.read_equation(*sides)
    if equation is not None:
      return [('', equation)]
  values = [_read_value(side, depth) for side in sides]
  if all(sign in _REVERSED for sign in signs):
    signs = [_REVERSED[sign] for sign in reversed(signs)]
    values.reverse()
  return [('', ('relation', tuple(signs), tuple(values)))]


def _read_values(text: str, depth: int) -> list[Hashable]:
  if text.count('±') != 1 or text.strip()[0] == '⦃':
    return [_read_value(text, depth)]
  return [_read_value(text.replace('±', sign), depth) for sign in '+-']


def _read_value(text: str, depth: int) -> Hashable:
  """Reads a union, tuple, interval, set, matrix, or a value without parts."""
  text = text.strip()
  parts = _split(text, '∪')[::2]
  if len(parts) > 1:
    values = [_read_value(part, depth) for part in parts]
    return '∪', tuple(sorted(_flat(values), key=repr))
  if not _in_one_bracket(text):
    return _read_leaf(text)
  kind, inner = text[0] + text[-1], text[1:-1]
  read = lambda part: _read_list(part, depth + 1)
  if kind == '⟦⟧':
    rows = [row for row in _split(inner, '⏎')[::2] if row.strip()]
    cells = [tuple(map(read, _split(row, '&')[::2])) for row in rows]
    return 'matrix', tuple(cells)
  if kind == '⦃⦄':
    value = read(inner)
    return ('text', '∅') if value is None else value
  if kind == '{}':
    return read(inner)
  parts = _split(inner, ',;')[::2]
  if len(parts) > 1:
    return kind, tuple(map(read, parts))
  alone = kind == '()' or inner.strip().startswith('⟦')
  return read(inner) if alone else _read_leaf(text)


def _flat(values: list[Hashable]) -> list[Hashable]:
  """Returns a union's members, including those of nested unions."""
  return [
    member
    for value in values
    for member in (
      value[1] if isinstance(value, tuple) and value[0] == '∪' else (value,)
    )
  ]


def _read_leaf(text: str) -> Hashable:
  """Reads a number, words, an expression, or text."""
  number = answers.parse_number(text)
  if number is not None:
    return number
  if _WORDS.fullmatch(text):
    return 'words', ' '.join(text.casefold().split())
  unit = _UNIT.search(text)
  if unit and answers.is_unit(unit[1]):
    text = text[: unit.start()]
  expression = expressions.read_expression(text)
  return ('text', _compact(text)) if expression is None else expression


def _compact(text: str) -> str:
  return re.sub(r'\{(.)\}', r'\1', ''.join(text.split()))


def _split(text: str, separators: str) -> list[str] | None:
  """Splits outside brackets: [piece, separator, …]; None if unbalanced."""
  parts, depth, start = [], 0, 0
  for i, character in enumerate(text):
    if character in _CLOSING:
      depth += 1
    elif character in ')]}⦄⟧':
      depth -= 1
      if depth < 0:
        return None
    elif not depth and character in separators:
      parts += [text[start:i], character]
      start = i + 1
  return None if depth else [*parts, text[start:]]


def _in_one_bracket(text: str) -> bool:
  """Returns True if the first bracket closes at the end."""
  if text[:1] not in tuple(_CLOSING):
    return False
  depth = 0
  for i, character in enumerate(text):
    depth += (character in _CLOSING) - (character in ')]}⦄⟧')
    if not depth:
      return i == len(text) - 1
  return False
