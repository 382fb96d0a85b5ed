"""Extracts the program from a completion, and tests from a row."""

import ast
import functools
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError

# Texts at which a base model that continues a function has moved on: the stop
# sequences of Chen et al., 2021, and the end of a code block.
_STOP = ('\nclass ', '\ndef ', '\n#', '\nif __name__', '\nprint(', '\n```')

# Indentation, fence, language and the rest: ```python, ~~~ py, ```python:a.py.
_FENCE = re.compile(r'([ \t]*)(`{3,}|~{3,})[ \t]*([^\s:,{`]*)([^`]*)')
_PYTHON = ('python', 'python3', 'py')


class Tests(NamedTuple):
  """Tests of a program.

  Attributes:
    entry_point: the name under test, or ''.
    setup: source to run before the first test.
    tests: source of each test.
    examples: instead of tests, standard input and the output expected.
  """

  entry_point: str = ''
  setup: str = ''
  tests: tuple[str, ...] = ()
  examples: tuple[tuple[str, str], ...] = ()


def find_program(prompt: str, completion: str, entry_point: str = '') -> str:
  """Returns the program that a completion contains.

  The prompt counts as code if it is Python, complete or up to the body of its
  last function, and defines `entry_point`.  The first of these that exists:

  1. The last code block (between ``` fences, marked as Python or unmarked) that
     defines `entry_point`.  If the prompt is code, its other definitions
     (imports, helpers) go before it.
  2. If the prompt is code and the completion begins with an indented line: the
     prompt, continued by the completion up to the first of `_STOP`.
  3. The last code block, whatever it holds, after the prompt if that is code.
  4. The completion as it is, after the prompt if that is code; as in 1 if it
     defines `entry_point`.

  A Python block that is never closed extends to the end.
  """
  preamble = prompt_code(prompt, entry_point)
  blocks = _code_blocks(completion)
  whole = re.compile(rf'^(async )?def {re.escape(entry_point)}\b', re.MULTILINE)
  defining = [block for block in blocks if entry_point and whole.search(block)]
  text = (defining or blocks or [completion])[-1]
  if preamble is None:
    return text
  first = next((line for line in completion.split('\n') if line.strip()), '')
  indented = first[:1] in (' ', '\t') and not _FENCE.fullmatch(first)
  if indented and not defining:
    ends = [completion.find(text) for text in _STOP]
    return prompt + completion[: min((e for e in ends if e >= 0), default=None)]
  return _after(preamble if whole.search(text) else prompt, text)


@functools.lru_cache(maxsize=1024)
def prompt_code(prompt: str, entry_point: str) -> str | None:
  """Returns the prompt's code besides `entry_point`; None if it is not code."""
  for text in (prompt, prompt + '\n    pass'):
    try:
      tree = _tree(text, 'the prompt')
    except UserError:
      continue
    rest = [n for n in tree.body if getattr(n, 'name', None) != entry_point]
    if len(rest) < len(tree.body):
      return _source(rest)
  return None


def read_tests(index: int, prompt: str, row: Mapping[str, Any]) -> Tests:
  """Returns the tests of a row with columns of `COLUMNS` and entry_point.

  Raises:
    UserError: it has no tests, or they test nothing, or a column has the wrong
      type.
  """
  where = f'sample {index}'
  for name, kinds in COLUMNS.items():
    if row.get(name) is not None and not isinstance(row[name], kinds):
      shown = f'{type(row[name]).__name__} {row[name]!r:.60}'
      raise UserError(f'{name} of {where} is {shown}.')
  present = [name for name in _READERS if row.get(name) is not None]
  if len(present) != 1 or (present == ['test'] and not row.get('entry_point')):
    raise UserError(
      f'{where} needs either the columns test and entry_point (as in '
      'HumanEval)\nor one of the columns test_list (MBPP), input_output (APPS) '
      'and test_cases (LiveCodeBench).'
    )
  (name,) = present
  entry_point = row.get('entry_point') or ''
  return _READERS[name](row, entry_point, f'{name} of {where}', prompt)


def _read_check(row, entry_point, where, prompt) -> Tests:
  """Splits the `check(candidate)` of a HumanEval row into tests.

  Each statement of `check` that contains an assertion is a test, together with
  the preceding statements that contain none.  `assert True` does not count as
  an assertion.  Other names that the prompt defines keep the prompt's meaning,
  whatever the program does to them.
  """
  tree = _tree(row['test'], where)
  check = next((n for n in tree.body if getattr(n, 'name', None) == 'check'), 0)
  if not isinstance(check, ast.FunctionDef) or len(check.args.args) != 1:
    raise UserError(
      f'{where} has no function check(candidate).\n'
      'The column test is read as in HumanEval; test_list holds single tests.'
    )
  name, body = check.args.args[0].arg, check.body
  nodes = [node for each in body for node in ast.walk(each)]
  if not any(isinstance(n, ast.Name) and n.id == name for n in nodes):
    raise UserError(f'{where} tests nothing: check does not use {name}.')
  setup = prompt_code(prompt, entry_point) or ''
  if any(isinstance(node, _NEEDS_ITS_FUNCTION) for node in nodes):
    setup = _after(setup, ast.unparse(tree))
    return Tests(entry_point, setup, (f'check({entry_point})',))
  rest = [node for node in tree.body if node is not check]
  setup = _after(setup, f'{_source(rest)}\n{name} = {entry_point}\n')
  ends = [
    i + 1
    for i, statement in enumerate(body)
    if any(map(_is_assertion, ast.walk(statement)))
  ]
  bounds = itertools.pairwise([0, *ends[:-1], len(body)])
  return Tests(entry_point, setup, tuple(_source(body[a:b]) for a, b in bounds))


def _read_list(row, entry_point, where, prompt) -> Tests:
  """Checks the tests of an MBPP row."""
  tests = tuple(row['test_list'])
  if not tests or not all(isinstance(test, str) for test in tests):
    raise UserError(f'{where} must hold at least one test, as text.')
  for test in tests:
    nodes = list(ast.walk(_tree(test, where)))
    if not any(_is_assertion(n) or isinstance(n, ast.Call) for n in nodes):
      raise UserError(f'{where}: {test!r:.60} tests nothing.')
  return Tests(entry_point, row.get('test_setup_code') or '', tests)


def _read_pairs(row, entry_point, where, prompt) -> Tests:
  """Reads inputs and outputs, as in APPS."""
  cases = _parse(row['input_output'], where)
  cases = cases if isinstance(cases, dict) else {}
  inputs, outputs = cases.get('inputs') or (), cases.get('outputs') or ()
  if not inputs or len(inputs) != len(outputs):
    raise UserError(f'{where} must hold inputs and as many outputs.')
  name = cases.get('fn_name') or ''
  return _of_pairs(zip(inputs, outputs, strict=True), name, where)


def _read_cases(row, entry_point, where, prompt) -> Tests:
  """Reads the cases of LiveCodeBench."""
  cases = _parse(row['test_cases'], where)
  try:
    kinds = {case.get('testtype', 'stdin') for case in cases}
    pairs = [(case['input'], case['output']) for case in cases]
  except (AttributeError, KeyError, TypeError):
    pairs = kinds = ()
  if kinds == {'stdin'}:
    return _of_pairs(pairs, '', where)
  if kinds != {'functional'} or not entry_point:
    raise UserError(
      f'{where}: each needs an input, an output and the testtype stdin, or all '
      'functional and the column entry_point.'
    )
  # An argument per line, and the result.
  calls = [
    (
      [_parse(line, where) for line in given.split('\n') if line.strip()],
      _parse(result, where),
    )
    for given, result in pairs
  ]
  return _of_pairs(calls, entry_point, where)


def _of_pairs(pairs: Iterable, entry_point: str, where: str) -> Tests:
  """Returns tests of inputs and outputs.

  Args:
    pairs: standard input and output, as texts or lists of lines; with an entry
      point, a list of arguments and the result (or a list of it alone).
    entry_point: the function, perhaps a method of a class Solution.
    where: names the row in errors.
  """
  if entry_point:
    tests = [f'assert _same(_call(*{a!r}), {result!r})' for a, result in pairs]
    return Tests(entry_point, _CALLS.format(name=entry_point), tuple(tests))
  examples = tuple(tuple(map(_joined, pair)) for pair in pairs)
  if not all(isinstance(text, str) for pair in examples for text in pair):
    raise UserError(f'{where} must hold texts, or name a function.')
  return Tests(examples=examples)


# The columns that hold tests, and how to read them.
_READERS = {
  'test': _read_check,
  'test_list': _read_list,
  'input_output': _read_pairs,
  'test_cases': _read_cases,
}
# The types of columns.
COLUMNS = {
  'test': str,
  'test_list': (list, tuple),
  'test_setup_code': str,
  'input_output': (str, dict),
  'test_cases': (str, list, tuple),
  'entry_point': str,
}
# These change their meaning, or have none, outside the function.
_NEEDS_ITS_FUNCTION = (ast.Return, ast.Yield, ast.YieldFrom, ast.Await)
_NEEDS_ITS_FUNCTION += (ast.Global, ast.Nonlocal)
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


def _parse(value: Any, where: str) -> Any:
  """Returns a value, parsed if it is JSON."""
  try:
    return json.loads(value) if isinstance(value, str) else value
  except ValueError as error:
    raise UserError(f'{where} is not JSON: {error}.') from error


def _joined(text):
  return '\n'.join(map(str, text)) if isinstance(text, list) else text


def _tree(source: str, where: str) -> ast.Module:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # They are not about this program.
      return ast.parse(source)
  except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
    raise UserError(f'{where} is not Python: {error}.') from error


def _source(statements: list[ast.stmt]) -> str:
  return ast.unparse(ast.Module(statements, []))


def _is_assertion(node: ast.AST) -> bool:
  return isinstance(node, ast.Assert) and not isinstance(
    node.test, ast.Constant
  )


def _after(first: str, then: str) -> str:
  return first + ('' if not first or first.endswith('\n') else '\n') + then


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
