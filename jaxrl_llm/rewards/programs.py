"""Extracts the program from a completion, and single tests from a row."""

import ast
import functools
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError

# Texts at which a base model that continues a function has moved on: the stop
# sequences of Chen et al., 2021, and the end of a code block.
STOP = ('\nclass ', '\ndef ', '\n#', '\nif __name__', '\nprint(', '\n```')

# Indentation, fence, language and the rest: ```python, ~~~ py, ```python:a.py.
_FENCE = re.compile(r'([ \t]*)(`{3,}|~{3,})[ \t]*([^\s:,{`]*)([^`]*)')
_PYTHON = ('python', 'python3', 'py')


class Tests(NamedTuple):
  """Tests of a program.

  Attributes:
    setup: source to run before the first test.
    tests: source of each test.
    examples: instead of tests, standard input and the output expected.
  """

  setup: str = ''
  tests: tuple[str, ...] = ()
  examples: tuple[tuple[str, str], ...] = ()


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


def tests_of_check(
  test: str, entry_point: str, prompt: str, where: str = 'test'
) -> Tests:
  """Splits the `check(candidate)` of a HumanEval row into tests.

  Each statement of `check` that contains an assertion is a test, together with
  the preceding statements that contain none.  `assert True` does not count as
  an assertion.  Other names that the prompt defines keep the prompt's meaning,
  whatever the program does to them.

  Raises:
    UserError: `test` is not Python, or has no `check` of one argument, or that
      tests nothing.
  """
  tree = _tree(test, where)
  check = next((n for n in tree.body if getattr(n, 'name', None) == 'check'), 0)
  if not isinstance(check, ast.FunctionDef) or len(check.args.args) != 1:
    raise UserError(
      f'{where} has no function check(candidate).\n'
      'The column test is read as in HumanEval; test_list holds single tests.'
    )
  name = check.args.args[0].arg
  nodes = [node for each in check.body for node in ast.walk(each)]
  if not any(isinstance(n, ast.Name) and n.id == name for n in nodes):
    raise UserError(f'{where} tests nothing: check does not use {name}.')
  setup = prompt_code(prompt, entry_point) or ''
  rest = [node for node in tree.body if node is not check]
  if _needs_its_function(check):
    setup = _after(setup, ast.unparse(tree))
    return Tests(setup, (f'check({entry_point})',))
  setup = _after(setup, ast.unparse(ast.Module(rest, [])))
  setup += f'\n{name} = {entry_point}\n'
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


def tests_of_list(tests: tuple[str, ...], setup: str, where: str) -> Tests:
  """Checks the tests of an MBPP row.

  Raises:
    UserError: there are none, or one is not Python or tests nothing.
  """
  if not tests or not all(isinstance(test, str) for test in tests):
    raise UserError(f'{where} must hold at least one test, as text.')
  for test in tests:
    nodes = list(ast.walk(_tree(test, where)))
    if not any(_is_assertion(n) or isinstance(n, ast.Call) for n in nodes):
      raise UserError(f'{where}: {test!r:.60} tests nothing.')
  return Tests(setup, tests)


def tests_of_pairs(pairs: Sequence, entry_point: str, where: str) -> Tests:
  """Returns tests of a row with inputs and outputs, as in APPS.

  Args:
    pairs: standard input and output, as texts or lists of lines; with an entry
      point, a list of arguments and the result (or a list of it alone).
    entry_point: the function, perhaps a method of a class Solution.
    where: names the row in errors.
  """
  if entry_point:
    tests = [f'assert _same(_call(*{a!r}), {result!r})' for a, result in pairs]
    return Tests(_CALLS.format(name=entry_point), tuple(tests))
  examples = tuple(tuple(map(_joined, pair)) for pair in pairs)
  if not all(isinstance(text, str) for pair in examples for text in pair):
    raise UserError(f'{where} must hold texts, or name a function.')
  return Tests(examples=examples)


# Results are compared as JSON, in which tuples are lists.
_CALLS = """
import json
try:
  _call = Solution().{name}
except NameError:
  _call = {name}
def _same(result, expected):
  result, expected = json.loads(json.dumps([result, expected]))
  return result == expected or [result] == expected
"""


def parse(value: Any, where: str) -> Any:
  """Returns a value, parsed if it is JSON."""
  try:
    return json.loads(value) if isinstance(value, str) else value
  except ValueError as error:
    raise UserError(f'{where} is not JSON: {error}.') from error


def arguments(given: str, result: str, where: str) -> tuple[list, Any]:
  """Parses a call of LiveCodeBench: an argument per line, and the result."""
  lines = [line for line in given.split('\n') if line.strip()]
  return [parse(line, where) for line in lines], parse(result, where)


def _joined(text):
  return '\n'.join(map(str, text)) if isinstance(text, list) else text


def _tree(source: str, where: str) -> ast.Module:
  try:
    return _parse(source)
  except (SyntaxError, ValueError) as error:
    raise UserError(f'{where} is not Python: {error}.') from error


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
  blocks, mark, language, indent, lines = [], '', '', '', []
  for line in text.split('\n'):
    fence = _FENCE.fullmatch(line.rstrip())
    closes = fence and fence[2].startswith(mark) and not (fence[3] or fence[4])
    if fence is None or (mark and not closes and fence[2][0] != mark[0]):
      lines.append(line.removeprefix(indent))
    elif mark and closes:
      blocks.append((language, lines))
      mark, indent, lines = '', '', []
    else:
      indent, mark, language, lines = fence[1], fence[2], fence[3].lower(), []
  if mark and language in _PYTHON:
    blocks.append((language, lines))
  return [
    '\n'.join(lines).rstrip('\n') + '\n'
    for language, lines in blocks
    if language in ('', *_PYTHON) and any(line.strip() for line in lines)
  ]
