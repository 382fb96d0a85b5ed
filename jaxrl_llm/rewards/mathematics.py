r"""Canonical forms of mathematical answers, and the equality that they decide.

  `0.5` is `\frac{1}{2}`           `5` is `x = 5`        `(E)` is `\text{E}`
  `2, 1` is `\{1, 2\}`             `2^{10}` is `1024`    `3 : 1` is `3:1`
  `(3,\pi/2]` is `\left( 3, \pi/2 \right]`      `1 \pm x` is `1-x, 1+x`

A form consists of exact numbers, words, and expressions, in lists, tuples,
sets, intervals, matrices and relations.  Forms can be compared and hashed, so
that majorities can be counted.  Sets, and lists without brackets, are
unordered; tuples are ordered.  Units, degree and per-cent signs are ignored, as
is the text after the letter of a choice, as in `\textbf{(C)}\ 5`.  Expressions,
such as `2\sqrt3`, are text in one notation; `equal` leaves them to another
judge.  Nothing is evaluated, and every size is bounded.
"""

import functools
import itertools
import re
from collections.abc import Callable, Hashable
from fractions import Fraction

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
# \textbf{(C)}\ 5, (C) 5, C) 5 and C. 5; not (A) - 5 nor (A) and (B).
_CHOICE = re.compile(
  r'(?:\\(?:text(?:bf|rm)?|math(?:rm|bf))\s*\{\s*\(([A-J])\)\s*\}\s*'
  r'|\(?([A-J])[).]\s+)(?!(?:\\text\s*\{\s*)?(?:and|or)\b)'
  r'((?:-?[\d.]|[A-Za-z]|\\(?:[dt]?frac|sqrt|text|pi)).*)'
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
_CLOSING = dict(zip('([{⦃⟦', ')]}⦄⟧', strict=True))
_RELATIONS = '=<>≤≥≠∈≈'
_REVERSED = {'>': '<', '≥': '≤'}

_MOST_BITS = 2000  # of a power
_DECIMAL = re.compile(r'(?<![\d.])\d*\.\d+(?![\d.])')
_DOTS = re.compile(r'\\[lc]?dots\b|\.{3,}')
# A number in a base, a ratio, dots, and words within a formula: SymPy does not
# know them, and would read them as other things.
_LITERAL = re.compile(r'\d_|[:…∅]|(?<![\\A-Za-z])[A-Za-z]{4}|\bmod\b')
_GROUP = r'\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}'
# Arguments without braces get them; x^10 means x^{10}, as nobody writes x^1 0.
_ARGUMENTS = (
  (re.compile(r'\^\s*(-?\d+)'), r'^{\1}'),
  (re.compile(r'\\sqrt\s*\(([^()]*)\)'), r'\\sqrt{\1}'),
  (re.compile(r'(\\sqrt|[\^_])\s*([^\W_]|\\pi\b)'), r'\1{\2}'),
  (re.compile(r'\\frac\s*([^\W_]|\\pi\b)'), r'\\frac{\1}'),
  (re.compile(rf'(\\frac\s*{_GROUP})\s*([^\W_]|\\pi\b)'), r'\1{\2}'),
  (re.compile(r'(?<![}\w\]^_])\{(\w)\}'), r'\1'),
  # A space only between digits, and a command and a letter; 5 * x is 5x.
  (re.compile(r'(\\[A-Za-z]+(?=\s+[A-Za-z])|\d(?=\s+\d))\s+'), '\\1\0'),
  (re.compile(r'\s|\*(?=\s*(?:[A-Za-z(]|\\(?!frac)))'), ''),
  (re.compile('\0'), ' '),
)
# A term over a number; \sin x/2 is left as it is.
_SLASH = re.compile(r'\A((?:[^/{}\\]|\\(?:sqrt|pi))+(?:\{[^{}]*\})?)/(\d+)\Z')
_POWER = re.compile(r'(-?)(?:(\d+)\*)?(\d+)(?:\^\{(-?\d+)\})?')
_PART = r'((?:[^{}/]|\{[^{}]*\})*)'
_QUOTIENT = re.compile(
  rf'(-?)(?:\\frac\{{{_PART}\}}\{{{_PART}\}}|{_PART}/{_PART})'
)


def read_answer(text: str) -> Hashable | None:
  """Returns the canonical form of an answer without its mark.

  A Fraction for a rational number.  None for an empty text and beyond 300
  characters.  Forms of one value may differ if they hold expressions.
  """
  text = text.strip()
  if len(text) > _MAX_CHARACTERS:
    return None
  number = answers.parse_number(text)
  return _read_list(_cleaned(text), 0) if number is None else number


def marked_answer(text: str) -> Hashable | None:
  """Returns the canonical form of `answers.marked_text`, or None."""
  marked = answers.marked_text(text)
  return None if marked is None else read_answer(marked)


def equal(answer: str, gold: str, same: Callable[[str, str], bool]) -> bool:
  """Returns True if two answers, that `read_answer` reads, are equal.

  Args:
    answer, gold: the texts.
      "(A) 5" is A where the gold answer is a letter, and else 5.
    same: compares two expressions, a number and an expression, or two equations
      whose normalised LaTeX differs.  All else is decided here.
  """
  truth = read_answer(gold)
  choice = _CHOICE.fullmatch(_spaced(answer))
  if choice and not (_kind(truth) == 'words' and len(truth[1]) == 1):
    answer = choice[3]
  forms = read_answer(answer), truth
  if forms[0] == forms[1] or not any(map(_is_open, forms)):
    return forms[0] == forms[1]
  if any(_kind(form) == 'relation' and form[1] == ('=',) for form in forms):
    # y = 2x + 3 is an equation for another one, and else its right side.
    texts = _cleaned(answer), _cleaned(gold)
    if all(t.count('=') == 1 and not _LITERAL.search(t) for t in texts):
      return same(*map(_normalised, texts))
  return _equal(*forms, same)


def _equal(answer: Hashable, gold: Hashable, same: Callable) -> bool:
  if answer == gold:
    return True
  if not (_is_open(answer) or _is_open(gold)):
    return False
  latex = _latex(answer), _latex(gold)
  if None not in latex:
    return same(*latex)
  if None in map(_kind, (answer, gold)) or answer[:-1] != gold[:-1]:
    return False
  parts, others = answer[-1], list(gold[-1])
  if isinstance(gold[-1], str) or len(parts) != len(others):
    return False
  if answer[0] not in ('in any order', '∪'):
    return all(map(functools.partial(_equal, same=same), parts, others))
  # Identical parts first, so that few are asked about.
  for part in sorted(parts, key=lambda part: part not in others):
    alike = (x for x in others if _equal(part, x, same))
    match = part if part in others else next(alike, None)
    if match is None:
      return False
    others.remove(match)
  return True


def _kind(form: Hashable) -> str | None:
  """Returns a form's kind: a number's is None."""
  return form[0] if isinstance(form, tuple) else None


def _is_open(form: Hashable) -> bool:
  """Returns True if a form holds an expression."""
  kind = _kind(form)
  if kind in (None, 'words', 'literal'):
    return False
  return kind == 'expression' or any(map(_is_open, form[-1]))


def _latex(form: Hashable) -> str | None:
  """Returns a number, a letter or an expression in LaTeX."""
  if isinstance(form, Fraction):
    n, d = form.as_integer_ratio()
    return str(n) if d == 1 else f'\\frac{{{n}}}{{{d}}}'
  letter = _kind(form) == 'words' and len(form[1]) == 1
  return form[1] if letter or _kind(form) == 'expression' else None


def _spaced(text: str) -> str:
  """Returns the text without layout, signs of money and percent."""
  text = _DOTS.sub('…', answers.with_spaces(text)).translate(_CHARACTERS)
  return _MONEY.sub('  ', _LAYOUT.sub('', text)).strip(' \t\n*`')


def _cleaned(text: str) -> str:
  """Returns the text with one notation for each meaning."""
  text = _spaced(text)
  choice = _CHOICE.fullmatch(text)
  text = choice[1] or choice[2] if choice else text
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
    return 'literal', _normalised(text)
  elements = [
    element
    for piece in pieces[::2]
    if piece.strip()
    for element in _read_element(piece, depth)
  ]
  # x = 1, x = 2 are two numbers; a = 1, b = 2 are not.
  several = len({name for name, _ in elements} - {''}) > 1
  values = [
    ('=', name, (value,)) if several else value for name, value in elements
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
  values = [_read_value(side, depth) for side in sides]
  if signs == ['=']:
    values.sort(key=repr)
  elif all(sign in _REVERSED for sign in signs):
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
    flat = [v[1] if _kind(v) == '∪' else (v,) for v in values]
    return '∪', tuple(sorted(itertools.chain(*flat), key=repr))
  if not _in_one_bracket(text):
    return _read_leaf(text)
  kind, inner = text[0] + text[-1], text[1:-1]
  read = lambda part: _read_list(part, depth + 1)
  if kind == '⟦⟧':
    rows = [row for row in _split(inner, '⏎')[::2] if row.strip()]
    cells = [[read(cell) for cell in _split(row, '&')[::2]] for row in rows]
    shape = tuple(map(len, cells))
    return 'matrix', shape, tuple(itertools.chain(*cells))
  if kind == '⦃⦄':
    value = read(inner)
    return ('literal', '∅') if value is None else value
  if kind == '{}':
    return read(inner)
  parts = _split(inner, ',;')[::2]
  if len(parts) > 1:
    return kind, tuple(map(read, parts))
  alone = kind == '()' or inner.strip().startswith('⟦')
  return read(inner) if alone else _read_leaf(text)


def _read_leaf(text: str) -> Hashable:
  """Reads a number, words, a text to compare as such, or an expression."""
  number = answers.parse_number(text)
  if number is not None:
    return number
  if _WORDS.fullmatch(text):
    return 'words', ' '.join(text.casefold().split())
  unit = _UNIT.search(text)
  if unit and answers.is_unit(unit[1]):
    text = text[: unit.start()]
  literal = _LITERAL.search(text)
  text = _normalised(text)
  number = _exact(text)
  if number is not None:
    return number
  if len(text) == 1 and text.isalpha():
    return 'words', text
  apart = re.search(r'\d \d', text)
  return 'literal' if literal or apart else 'expression', text


def _normalised(text: str) -> str:
  """Returns LaTeX in one notation for decimals, arguments, order of terms."""
  text = _DECIMAL.sub(lambda m: _latex(Fraction(m[0])), text)
  for pattern, replacement in _ARGUMENTS:
    text = pattern.sub(replacement, text)
  signed = text if text[:1] in tuple('+-') else f'+{text}'
  first, *rest = _split(signed, '+-') or [text]
  terms = [_SLASH.sub(r'\\frac{\1}{\2}', term) for term in rest[1::2]]
  if first or not all(terms) or '|' in text or '=' in text:
    return text
  ordered = sorted(zip(terms, rest[::2], strict=True))
  return ''.join(sign + term for term, sign in ordered).removeprefix('+')


def _exact(text: str) -> Fraction | None:
  """Computes a whole power of a whole number, or a quotient of two."""
  quotient = _QUOTIENT.fullmatch(text)
  if not quotient:
    return _power(text)
  sign, *parts = quotient.groups()
  a, b = (_power(part) for part in parts if part is not None)
  if a is None or not b:
    return None
  return -a / b if sign else a / b


def _power(text: str) -> Fraction | None:
  match = _POWER.fullmatch(text)
  if match is None:
    return None
  sign, factor, base, exponent = match.groups()
  a, n = int(base), int(exponent or 1)
  if abs(n) * a.bit_length() > _MOST_BITS or not a and n < 1:
    return None
  return Fraction(a) ** n * int(factor or 1) * (-1 if sign else 1)


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
  ends = len(text) > 1 and text[0] in _CLOSING and text[-1] in _CLOSING.values()
  return ends and _split(text[1:-1], '') is not None
