"""Equality of expressions according to SymPy, through math-verify."""

import dataclasses
import functools
import logging
from typing import Any

from jaxrl_llm.errors import UserError

# Numbers are compared to as many digits.
_DIGITS = 100

_log = logging.getLogger(__name__)
_in_worker = False


def enter_worker() -> None:
  """Lets `equal_or_text` ask SymPy, in a process that a time-out can end."""
  global _in_worker
  equal('x', '2y')  # Imports and warms up, which takes seconds.
  _in_worker = True


def equal_or_text(answer: str, gold: str) -> bool:
  """Compares by `equal` in a worker; elsewhere finds texts different."""
  if not _in_worker:
    _say_once()
  return _in_worker and equal(answer, gold)


@functools.cache
def _say_once() -> None:
  _log.warning(
    'math_answer compares expressions, such as 2x+2, as text in this process.'
    "\nWorkers ask SymPy: dict(name='math_answer', workers=4, timeout=2.0), "
    "after pip install 'jaxrl_llm[math]'."
  )


def equal(answer: str, gold: str) -> bool:
  r"""Returns True if math-verify finds two expressions or equations equal.

  It simplifies and evaluates: `9^{9^{9^{9}}}` may take for ever.  Its own limit
  is an alarm signal, which fails outside the main thread and hides that it
  fired; it is off, and so is its reader of plain text, which evaluates
  arithmetic as Python.  What its grammar of LaTeX does not read equals nothing.

  Raises:
    UserError: math-verify is not installed.

  References:
    https://github.com/huggingface/Math-Verify, 0.9
  """
  parsed = _parsed(gold), _parsed(answer)
  # Limits are off; numbers are rounded to 10⁻¹⁰⁰, not to its 10⁻⁶.
  found = _math_verify().verify(*parsed, _DIGITS, _DIGITS, timeout_seconds=None)
  return found and _same_size(*(each[0] for each in parsed))


def _same_size(a: Any, b: Any) -> bool:
  """Returns False for numbers that differ, and are both rounded to 0."""
  if not (getattr(a, 'is_number', False) and getattr(b, 'is_number', False)):
    return True
  ratio = (a / b).evalf(30)
  comparable = ratio.is_finite and ratio != 0
  return not comparable or bool(abs(ratio - 1) < 1e-20)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> list:
  # A gold answer is parsed once for all responses to its prompt.
  library = _math_verify()
  from sympy import I  # It comes with the library.

  reader = library.LatexExtractionConfig()
  # 2 + 3h is not 2 + 3: units are gone already.
  notation = dataclasses.replace(reader.normalization_config, units=False)
  reader = dataclasses.replace(reader, normalization_config=notation)
  boxed = f'\\boxed{{{text}}}'
  parsed = library.parse(boxed, [reader], 'no_fallback', parsing_timeout=None)
  unit = lambda x: {name: I for name in x.free_symbols if name.name == 'i'}
  return [x.xreplace(unit(x)) for x in parsed]


@functools.cache
def _math_verify():
  try:
    import math_verify
  except ImportError as error:
    raise UserError(
      'comparing expressions needs the package math-verify.\n'
      "Install it with: pip install 'jaxrl_llm[math]'"
    ) from error
  # It warns at every start that its limit is off.
  logging.getLogger('math_verify').setLevel(logging.ERROR)
  return math_verify
