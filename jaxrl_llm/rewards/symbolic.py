"""Equality of expressions according to SymPy, through math-verify."""

import functools
import logging

from jaxrl_llm.errors import UserError

# Digits to which numbers are compared: more than in an answer's powers.
_DIGITS = 100

_log = logging.getLogger(__name__)


def equal(answer: str, gold: str) -> bool:
  r"""Returns True if math-verify finds two expressions or equations equal.

  Call this where a time-out can kill the process: it simplifies and evaluates,
  so `9^{9^{9^{9}}}` may take for ever.  Its own limit is an alarm signal, which
  fails outside the main thread and hides that it fired; it is switched off.

  Only its grammar of LaTeX reads the texts.  Its other reader, of plain text,
  evaluates arithmetic as Python and is switched off.  What it cannot read
  equals nothing.

  Raises:
    UserError: math-verify is not installed.

  References:
    https://github.com/huggingface/Math-Verify, 0.9
  """
  return load().verify(
    _parsed(gold),
    _parsed(answer),
    float_rounding=_DIGITS,
    numeric_precision=_DIGITS,
    timeout_seconds=None,
  )


@functools.cache
def load():
  """Imports math-verify and SymPy, which takes seconds, and warms them up."""
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


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> list:
  # A gold answer is parsed once for all responses to its prompt.
  library = load()
  return library.parse(
    f'\\boxed{{{text}}}',
    [library.LatexExtractionConfig()],
    fallback_mode='no_fallback',
    parsing_timeout=None,
  )


_in_worker = False


def enter_worker() -> None:
  """Lets `equal_or_text` compare by `equal`: a time-out can end the process."""
  global _in_worker
  _in_worker = equal('x', 'y') is False


def equal_or_text(answer: str, gold: str) -> bool:
  """Compares by `equal` in a worker, and else by the text, said once."""
  if _in_worker:
    return equal(answer, gold)
  _say_once()
  return False


@functools.cache
def _say_once() -> None:
  _log.warning(
    'math_answer compares expressions, such as 2x+2, as text here.\nIts worker '
    "processes ask SymPy: dict(name='math_answer', workers=4, timeout=2.0),\n"
    "after pip install 'jaxrl_llm[math]'."
  )
