r"""Canonical forms of mathematical answers, and the equality that they decide.

  `0.5` is `\frac{1}{2}`           `5` is `x = 5`        `(E)` is `\text{E}`
  `2, 1` is `\{1, 2\}`             `2^{10}` is `1024`    `3 : 1` is `3:1`
  `(3,\pi/2]` is `\left( 3, \pi/2 \right]`      `1 \pm x` is `1-x, 1+x`

A form consists of exact numbers, words, and expressions, in lists, tuples, sets,
intervals, matrices and relations.  Forms can be compared and hashed, so that
majorities can be counted.  Sets, and lists without brackets, are unordered;
tuples are ordered.  Units, degree and per-cent signs are ignored, as is the text
after the letter of a choice, as in `\textbf{(C)}\ 5`.  Expressions, such as
`2\sqrt3`, are normalised text, whose equality `equal` leaves to another judge.
Every size is bounded, and hostile text costs no more than its length.
"""

import ast
import functools
import itertools
import operator
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
_ENDING = re.compile(
  r'(?:answer|(?:correct|right|best) (?:option|choice))[*_]{0,2}\s{0,2}'
  r'(?:\bis\b|:)[\s:*_]{0,6}(?:(?:option|choice) )?(?=\S)',
  re.IGNORECASE,
)
_IN_MATH = re.compile(r'(?:\$+|\\\()(.*?)(?:\$+|\\\))')
_SENTENCE_END = re.compile(r'\.(?:\s|$)')
_CLOSING = dict(zip('([{⦃⟦', ')]}⦄⟧', strict=True))
_RELATIONS = '=<>≤≥≠∈≈'
_REVERSED = {'>': '<', '≥': '≤'}

_DEEPEST_SUM = 40  # nested operations of arithmetic
_MOST_BITS = 2000  # of a numerator or denominator
_DECIMAL = re.compile(r'(?<![\d.])\d*\.\d+(?![\d.])')
_DOTS = re.compile(r'\\[lc]?dots\b|\.\.+|…')
# A number in a base, a ratio, dots, and words within a formula: SymPy does not
# know them, and would read them as other things.
_LITERAL = re.compile(
  r'\d_|:|…|(?<![\\A-Za-z])[A-Za-z]{4}|\b(?:mod|choose)\b'
)
_GROUP = r'\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}'
# Arguments without braces get them; x^10 means x^{10}, as nobody writes x^1 0.
_ARGUMENTS = (
  (re.compile(r'\^\s*(-?\d+)'), r'^{\1}'),
  (re.compile(r'(\\sqrt|[\^_])\s*([^\W_]|\\pi\b)'), r'\1{\2}'),
  (re.compile(r'\\frac\s*([^\W_]|\\pi\b)'), r'\\frac{\1}'),
  (re.compile(rf'(\\frac\s*{_GROUP})\s*([^\W_]|\\pi\b)'), r'\1{\2}'),
  (re.compile(r'(?<![}\w\]^_])\{(\w)\}'), r'\1'),
  # A space only where a letter follows a command; 5 * x is 5x.
  (re.compile(r'(\\[A-Za-z]+)\s+(?=[A-Za-z])'), '\\1\0'),
  (re.compile(r'\s|\*(?=\s*(?:[A-Za-z(]|\\(?!frac)))'), ''),
  (re.compile('\0'), ' '),
)
_OPERATIONS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}
_ARITHMETIC = re.compile(r'(?:\\frac|[-+*/^(){}\d])+')
_MIXED = re.compile(r'(?<![\d.)}])(\d+)\\frac\{(\d+)\}\{(\d+)\}')
_INNERMOST = re.compile(r'\\frac\{([^{}]*)\}\{([^{}]*)\}|\^\{([^{}]*)\}')


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
  """Returns the canonical form of `marked_text`, or None."""
  marked = marked_text(text)
  return None if marked is None else read_answer(marked)


def marked_text(text: str) -> str | None:
  r"""Returns the answer that `text` marks, verbatim, or None.

  The last `\boxed{…}`; failing that, the last line after `####`; failing that,
  the text after the last "answer is", within its sentence or its `$…$`.
  """
  box = answers.last_boxed(text)
  if box is not None:
    return box or None
  for line in answers.hash_lines(text):
    if line.strip():
      return line
  ending = None
  for ending in _ENDING.finditer(text):  # noqa: B007
    pass
  if ending is None:
    return None
  line = text[ending.end() :][: 2 * _MAX_CHARACTERS].partition('\n')[0]
  formula = _IN_MATH.match(line)
  return formula[1] if formula else _SENTENCE_END.split(line)[0]


def value_of_choice(text: str) -> str | None:
  """Returns what follows a choice's letter, as 5 in `(C) 5`, or None."""
  choice = _CHOICE.fullmatch(_spaced(text))
  return choice[3] if choice else None


def equal(answer: str, gold: str, same: Callable[[str, str], bool]) -> bool:
  """Returns True if two answers, that `read_answer` reads, are equal.

  Args:
    answer, gold: the texts.
    same: compares two expressions, a number and an expression, or two equations
      whose normalised LaTeX differs.  All else is decided here.
  """
  forms = read_answer(answer), read_answer(gold)
  if any(_kind(form) == 'relation' and form[1] == ('=',) for form in forms):
    # y = 2x + 3 is an equation for another one, and else its right side.
    texts = _cleaned(answer), _cleaned(gold)
    if forms[0] != forms[1] and all(text.count('=') == 1 for text in texts):
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
  left = []
  for part in parts:
    if part in others:
      others.remove(part)
    else:
      left.append(part)
  for part in left:
    match = [i for i, x in enumerate(others) if _equal(part, x, same)][:1]
    if not match:
      return False
    del others[match[0]]
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
  letter = form[0] == 'words' and len(form[1]) == 1
  return form[1] if letter or form[0] == 'expression' else None


def _spaced(text: str) -> str:
  """Returns the text without layout, signs of money and percent."""
  text = answers.with_spaces(text).translate(_CHARACTERS)
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
    return '∪', tuple(sorted(_flat(values), key=repr))
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
  """Reads a number, words, a text to compare as such, or an expression."""
  number = answers.parse_number(text)
  if number is not None:
    return number
  if _WORDS.fullmatch(text):
    return 'words', ' '.join(text.casefold().split())
  unit = _UNIT.search(text)
  if unit and answers.is_unit(unit[1]):
    text = text[: unit.start()]
  literal = _LITERAL.search(_DOTS.sub('…', text))
  text = _normalised(text)
  number = _arithmetic(text)
  if number is not None:
    return number
  if len(text) == 1 and text.isalpha():
    return 'words', text
  return 'literal' if literal else 'expression', text


def _normalised(text: str) -> str:
  """Returns LaTeX with fractions for decimals, one way to write arguments."""
  text = _DECIMAL.sub(_as_fraction, _DOTS.sub('…', text))
  for pattern, replacement in _ARGUMENTS:
    text = pattern.sub(replacement, text)
  return text


def _as_fraction(match: re.Match) -> str:
  return _latex(Fraction(match[0])) or ''


def _arithmetic(text: str) -> Fraction | None:
  """Computes sums, products and whole powers of numbers, within bounds."""
  if not _ARITHMETIC.fullmatch(text):
    return None
  text = _MIXED.sub(r'(\1+\2/\3)', text)
  while _INNERMOST.search(text):
    text = _INNERMOST.sub(
      lambda m: f'**({m[3]})' if m[3] else f'(({m[1]})/({m[2]}))', text
    )
  text = re.sub(r'([\d)])\(', r'\1*(', text.replace('{', '(').replace('}', ')'))
  try:
    # A syntax tree: nothing is executed.
    return _value(ast.parse(text, mode='eval').body, 0)
  except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
    return None


def _value(node: ast.expr, depth: int) -> Fraction:
  """Computes a syntax tree; ValueError for what is not arithmetic or too big."""
  if isinstance(node, ast.Constant):
    return _bounded(Fraction(node.value))
  if depth > _DEEPEST_SUM:
    raise ValueError
  if isinstance(node, ast.UnaryOp):
    value = _value(node.operand, depth + 1)
    return -value if isinstance(node.op, ast.USub) else value
  if not isinstance(node, ast.BinOp):
    raise ValueError
  a, b = _value(node.left, depth + 1), _value(node.right, depth + 1)
  if isinstance(node.op, ast.Pow):
    if b.denominator > 1 or abs(b) * _bits(a) > _MOST_BITS or not a and b <= 0:
      raise ValueError
    return a ** int(b)
  return _bounded(_OPERATIONS[type(node.op)](a, b))


def _bits(value: Fraction) -> int:
  return max(abs(part).bit_length() - 1 for part in value.as_integer_ratio())


def _bounded(value: Fraction) -> Fraction:
  if _bits(value) > _MOST_BITS:
    raise ValueError
  return value


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
