"""Extracts the program from a completion, and single tests from a row."""

import ast
import functools
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.errors import UserError

# Texts at which a base model that continues a function has moved on: the stop
# sequences of Chen et al., 2021, and the end of a code block.
STOP = ('\nclass ', '\ndef ', '\n#', '\nif __name__', '\nprint(', '\n```')

_FENCE = re.compile(r'([ \t]*)```([^`]*)')
_PYTHON = ('python', 'python3', 'py')


class Tests(NamedTuple):
  """Tests of a program.

  Attributes:
    setup: source to run before the first test.
    tests: source of each test.
  """

  setup: str
  tests: tuple[str, ...]


def find_program(
  prompt: str,
  completion: str,
  entry_point: str = '',
  stop: Sequence[str] = STOP,
) -> str:
  """Returns the program that a completion contains.

  The prompt counts as code if it is Python, complete or up to the body of its
  last function, and defines `entry_point`.  The first of these that exists:

  1. The last code block (between ``` fences, marked as Python or unmarked) that
     defines `entry_point`.  If the prompt is code, its other definitions
     (imports, helpers) go before it.
  2. If the prompt is code and the completion begins with an indented line: the
     prompt, continued by the completion up to the first of `stop`.
  3. The last code block, whatever it holds, after the prompt if that is code.
  4. The completion as it is, after the prompt if that is code; as in 1 if it
     defines `entry_point`.

  A Python block that is never closed extends to the end.
  """
  preamble = prompt_code(prompt, entry_point)
  blocks = _code_blocks(completion)
  whole = re.compile(rf'^(async )?def {re.escape(entry_point)}\b', re.MULTILINE)
  defining = [block for block in blocks if entry_point and whole.search(block)]
  if defining:
    return _after(preamble, defining[-1])
  if preamble is None:
    return blocks[-1] if blocks else completion
  first = next((line for line in completion.split('\n') if line.strip()), '')
  if first[:1] in (' ', '\t') and not _FENCE.fullmatch(first):
    ends = [completion.find(text) for text in stop]
    return prompt + completion[: min((e for e in ends if e >= 0), default=None)]
  if blocks:
    return _after(prompt, blocks[-1])
  return _after(preamble if whole.search(completion) else prompt, completion)


@functools.lru_cache(maxsize=1024)
def prompt_code(prompt: str, entry_point: str) -> str | None:
  """Returns the prompt's code besides `entry_point`; None if it is not code."""
  for text in (prompt, prompt + '\n    pass'):
    try:
      tree = _parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
      continue
    rest = [n for n in tree.body if getattr(n, 'name', None) != entry_point]
    if len(rest) < len(tree.body):
      return ast.unparse(ast.Module(rest, []))
  return None


@functools.lru_cache(maxsize=1024)
def tests_of_check(test: str, entry_point: str, prompt: str) -> Tests:
  """Splits the `check(candidate)` of a HumanEval row into tests.

  Each statement of `check` that contains an assertion is a test, together with
  the preceding statements that contain none.  `assert True` does not count as
  an assertion.  Other names that the prompt defines keep the prompt's meaning,
  whatever the program does to them.

  Raises:
    UserError: `test` is not Python, or has no `check` of one argument.
  """
  try:
    tree = _parse(test)
  except (SyntaxError, ValueError) as error:
    message = f'the tests of {entry_point} are not Python: {error}.'
    raise UserError(message) from error
  check = next((n for n in tree.body if getattr(n, 'name', None) == 'check'), 0)
  if not isinstance(check, ast.FunctionDef) or len(check.args.args) != 1:
    raise UserError(
      f'the tests of {entry_point} have no function check(candidate).\n'
      'The column test is read as in HumanEval; test_list holds single tests.'
    )
  setup = prompt_code(prompt, entry_point) or ''
  rest = [node for node in tree.body if node is not check]
  if _needs_its_function(check):
    setup = _after(setup, ast.unparse(tree))
    return Tests(setup, (f'check({entry_point})',))
  setup = _after(setup, ast.unparse(ast.Module(rest, [])))
  setup += f'\n{check.args.args[0].arg} = {entry_point}\n'
  chunks = [[]]
  for statement in check.body:
    chunks[-1].append(statement)
    if any(_is_assertion(node) for node in ast.walk(statement)):
      chunks.append([])
  last = chunks.pop()
  if chunks:
    chunks[-1] += last
  else:
    chunks = [last]
  return Tests(
    setup, tuple(ast.unparse(ast.Module(chunk, [])) for chunk in chunks)
  )


def _parse(source: str) -> ast.Module:
  """Parses source without showing Python's warnings."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return ast.parse(source)


def _needs_its_function(check: ast.FunctionDef) -> bool:
  """Returns True if the statements change meaning outside the function."""
  bound = (ast.Return, ast.Yield, ast.YieldFrom, ast.Await)
  bound += (ast.Global, ast.Nonlocal)
  return any(isinstance(node, bound) for node in ast.walk(check))


def _is_assertion(node: ast.AST) -> bool:
  return isinstance(node, ast.Assert) and not isinstance(
    node.test, ast.Constant
  )


def _after(first: str | None, then: str) -> str:
  if not first:
    return then
  return first + ('' if first.endswith('\n') else '\n') + then


def _code_blocks(text: str) -> list[str]:
  """Returns the contents of fenced blocks, less their fences' indentation."""
  blocks, language, indent, lines = [], None, '', []
  for line in text.split('\n'):
    fence = _FENCE.fullmatch(line.rstrip())
    if fence is None:
      lines.append(line.removeprefix(indent))
    elif language is None or fence[2].strip():
      indent, language, lines = fence[1], fence[2].strip().lower(), []
    else:
      blocks.append((language, lines))
      indent, language, lines = '', None, []
  if language in _PYTHON:
    blocks.append((language, lines))
  return [
    '\n'.join(lines).rstrip('\n') + '\n'
    for language, lines in blocks
    if language in ('', *_PYTHON) and any(line.strip() for line in lines)
  ]
