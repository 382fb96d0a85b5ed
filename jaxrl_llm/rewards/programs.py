"""Finds the program in a completion, and single tests in a data set's row."""

import ast
import functools
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.errors import UserError

# Where a base model that continues a function has gone on to something else:
# the stop sequences of Chen et al., 2021, and the end of a code block.
STOP = ('\nclass ', '\ndef ', '\n#', '\nif __name__', '\nprint(', '\n```')

_FENCE = re.compile(r'([ \t]*)```([^`]*)')
_PYTHON = ('python', 'python3', 'py')


class Tests(NamedTuple):
  """Tests of a program.

  Attributes:
    setup: source to run before the first.
    tests: source of each.
  """

  setup: str
  tests: tuple[str, ...]


def find_program(
  prompt: str,
  completion: str,
  entry_point: str = '',
  stop: Sequence[str] = STOP,
) -> str:
  """The program that a completion stands for.

  The prompt is code if it is Python, complete or up to the body of its last
  function, and defines `entry_point`.  In this order:

  1. The last code block (between ``` fences, of Python or of no language) that
     defines `entry_point`.  What a prompt that is code brings besides that
     function (imports, helpers) goes before it.
  2. Where the prompt is code and the completion begins with an indented line,
     it continues the prompt: cut before the first of `stop`, put behind it.
  3. The last code block, whatever it holds, and
  4. the completion as it is: behind a prompt that is code, by itself if it
     defines `entry_point` (as in 1).

  A block of Python that is never closed reaches to the end.
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
  """What a prompt defines besides `entry_point`; None if it is no code."""
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
  """The tests in a HumanEval row, whose `check(candidate)` holds many.

  Each statement of `check` with an assertion is a test, together with the
  statements before it that have none.  `assert True` is no assertion.  Names
  that the prompt defines besides the entry point mean what they mean there,
  whatever the program makes of them.

  Raises:
    UserError: `test` is no Python, or has no `check` of one argument.
  """
  try:
    tree = _parse(test)
  except (SyntaxError, ValueError) as error:
    message = f'the tests of {entry_point} are no Python: {error}.'
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
  """What a source means, without what Python would rather have it say."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return ast.parse(source)


def _needs_its_function(check: ast.FunctionDef) -> bool:
  """Whether the statements of a function mean something else outside it."""
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
  """Contents of fenced blocks, without the indentation of their fences."""
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
