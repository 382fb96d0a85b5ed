r"""Right and wrong answers made of gold ones, by rules of their own.

Numbers are recognised by plain patterns and written in other ways; other
answers are rewritten as text.  Wrong ones are other numbers, gold answers with
a digit or a sign changed, and answers to other problems.
"""

import collections
import random
import re
from fractions import Fraction

_DECIMAL = re.compile(r'-?\d+|-?\d*\.\d+')
_FRACTION = re.compile(r'(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}')
_THOUSANDS = re.compile(r'\d\s*(?:,|\\!|\{,\})+\s*(?:\\!)?\s*\d{3}')


def sentence(answer: str) -> str:
  return f'So the answer is 7, no: $\\boxed{{{answer}}}$, as was to be shown.'


def number(gold: str) -> Fraction | None:
  """The number that a gold answer plainly is."""
  if _DECIMAL.fullmatch(gold):
    return Fraction(gold)
  match = _FRACTION.fullmatch(gold)
  return Fraction(int(match[1] + match[2]), int(match[3])) if match else None


def written(value: Fraction) -> list[str]:
  """A number in at least eight ways."""
  n, d = value.numerator, value.denominator
  sign, a = '-' if n < 0 else '', abs(n)
  if d == 1:
    return [
      *(f'{n:,}', f'{n}.0', f'{n}.', f'${n}$', f'{n}\\text{{ units}}'),
      *(f'x = {n}', f'{n} miles', f's_0=\\frac{{{2 * n}}}{{2}}', f'{{{n}}}'),
      *(f'\\displaystyle {n}', f'\\left({n}\\right)', f'{n}^\\circ'),
      f'{n:,}.00'.replace(',', '{,}'),
    ]
  forms = [
    *(f'{sign}\\frac{{{a}}}{{{d}}}', f'{sign}\\dfrac{{{a}}}{{{d}}}'),
    *(f'\\frac{{{n}}}{{{d}}}', f'{n}/{d}', f'$\\tfrac{{{n}}}{{{d}}}$'),
    *(f'{sign}\\frac{{{3 * a}}}{{{3 * d}}}', f'{n}/{d}\\text{{ cm}}'),
    f'x={sign}\\frac{{{a}}}{{{d}}}',
  ]
  if a < 10 and d < 10:
    forms.append(f'{sign}\\frac{a}{d}')
  if a > d:
    forms.append(f'{sign}{a // d}\\frac{{{a % d}}}{{{d}}}')
  decimal = Fraction(f'{float(value):.6f}')
  return [*forms, f'{float(value):.6f}'] if decimal == value else forms


def other_numbers(value: Fraction, rng: random.Random) -> list[str]:
  """Numbers that are near, or look alike."""
  digits, d = str(abs(value.numerator)), value.denominator
  near = [value + 1, value - 1, 10 * value, -value, value + Fraction(1, 100)]
  if value:
    near.append(1 / value)
  swaps = [i for i in range(len(digits) - 1) if digits[i] != digits[i + 1]]
  if swaps:
    i = rng.choice(swaps)
    swapped = digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]
    near.append(Fraction(int(swapped), d))
  return [
    str(n) if n.denominator == 1 else f'\\frac{{{n.numerator}}}{{{d}}}'
    for n in near
    if n != value
    for d in [n.denominator]
  ]


def rewritten(gold: str) -> list[str]:
  """The same answer that is no plain number, in LaTeX of other habits."""
  forms = [f'${gold}$', f'{gold}.', gold.replace('\\frac', '\\dfrac')]
  if _THOUSANDS.search(gold):
    return forms[:2]
  if '\\left' in gold:
    forms.append(gold.replace('\\left', '').replace('\\right', ''))
  else:
    wide = re.sub(r'(?<!\\)([(\[])', r'\\left\1', gold)
    forms.append(re.sub(r'(?<!\\)([)\]])', r'\\right\1', wide))
  forms += [
    re.sub(r'([-+=(]|(?<!\\),)', r' \1 ', gold),
    re.sub(r'\^(\w)', r'^{\1}', gold),
    re.sub(r'\\sqrt\{(\d)\}(?!\d)', r'\\sqrt\1', gold),
    re.sub(r'\\frac\{(\d)\}\{(\d)\}(?!\d)', r'\\frac\1\2', gold),
    re.sub(r'\\text\{([^{}]*)\}$', r'\\mbox{\1}', gold),
    gold.replace('^\\circ', '^{\\circ}'),
    gold.replace('^\\circ', ''),
    gold.replace('pmatrix', 'bmatrix'),
    re.sub(r'^[a-zA-Z] ?= ?', '', gold),
  ]
  words = re.fullmatch(r'\\text\{([^{}]*)\}', gold)
  if words:
    forms += [words[1], f'\\textbf{{{words[1]}}}']
  elif not re.search(r'[=<>,&]|\\(?:text|mbox|le|leq|in|approx)\b', gold):
    forms.append(f'y = {gold}')
  if not re.search(r'[(\[]|\\text|\\mbox|begin|\\\{', gold):
    forms.append(', '.join(part.strip() for part in _pieces(gold, ',')[::-1]))
  if re.fullmatch(r'[-+0-9a-zA-Z^{} ]+|.*\\sqrt.*', gold):
    forms.append(_terms_reversed(gold))
  return [form for form in dict.fromkeys(forms) if form != gold]


def changed(gold: str, rng: random.Random) -> list[str]:
  """One digit or one sign of it another; units' exponents stay."""
  core, forms = re.sub(r'\\(?:text|mbox)\s*\{.*|\\phantom.*', '', gold), []
  digits = [match.start() for match in re.finditer(r'\d', core)]
  if digits:
    i = rng.choice(digits)
    forms.append(gold[:i] + str((int(gold[i]) + 1) % 10) + gold[i + 1 :])
  signs = [match.start() for match in re.finditer(r'[-+]', core)]
  if signs:
    i = rng.choice(signs)
    forms.append(gold[:i] + ('-' if gold[i] == '+' else '+') + gold[i + 1 :])
  return forms


def cases(golds: list[str], seed: int) -> list[tuple[str, str, bool]]:
  """(gold answer, answer, whether it is right) for all gold answers."""
  rng = random.Random(seed)
  alike = collections.defaultdict(list)
  for gold in golds:
    alike[_shape(gold)].append(gold)
  found = []
  for gold in golds:
    value = number(gold)
    if value is not None:
      right, wrong = written(value), other_numbers(value, rng)
    else:
      right, wrong = rewritten(gold), changed(gold, rng)
      others = rng.choice(alike[_shape(gold)]), rng.choice(golds)
      wrong += [x for x in others if _bare(x) != _bare(gold)]
    found += [(gold, answer, True) for answer in [gold, *right]]
    found += [(gold, answer, False) for answer in wrong]
  return found


def _shape(gold: str) -> str:
  return re.sub(r'\d+', '#', gold.replace(' ', ''))


def _bare(gold: str) -> str:
  """What is left of an answer without what does not count."""
  bare = re.sub(r'\\(?:text|mbox)\s*\{\(?(\w)\)?\}', r'\1', gold)
  return re.sub(r'\s|\^\\circ|\\d?frac|[{}]', '', bare)


def _pieces(text: str, marks: str) -> list[str]:
  """The text cut at marks outside braces; a sign stays with its term."""
  pieces, depth, piece = [], 0, ''
  for character in text:
    depth += (character in '([{') - (character in ')]}')
    if not depth and character in marks:
      pieces.append(piece)
      piece = '' if character == ',' else character
    else:
      piece += character
  return [*pieces, piece]


def _terms_reversed(gold: str) -> str:
  terms = [term.strip() for term in _pieces(gold, '+-') if term.strip()]
  if len(terms) < 2 or re.search(r'text|mbox|[(\[,=&/]|pm|\\frac', gold):
    return gold
  signed = [term if term[0] in '+-' else f'+{term}' for term in terms]
  return ' '.join(signed[::-1]).removeprefix('+')
