"""Docstrings open with a verb or a noun phrase, not with a question word."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = 'jaxrl_llm', 'experiments', 'examples', 'benchmarks'
FILES = sorted(
  path.relative_to(ROOT).as_posix()
  for folder in FOLDERS
  for path in (ROOT / folder).rglob('*.py')
)
QUESTION = r'what|how|whether|which|where'
# Matches the first word of a docstring, or its first two.
FORBIDDEN = re.compile(
  rf'({QUESTION}|of|(tells|says|gives|describes)\s+({QUESTION}))\b', re.I
)
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def refused(source: str) -> list[tuple[int, str]]:
  """(line, first line) of each docstring that opens in a forbidden way."""
  nodes = [x for x in ast.walk(ast.parse(source)) if isinstance(x, DOCUMENTED)]
  texts = ((x, ast.get_docstring(x)) for x in nodes)
  return [
    (node.body[0].lineno, text.partition('\n')[0])
    for node, text in texts
    if text and FORBIDDEN.match(text.lstrip())
  ]


def test_there_are_files_in_each_folder():
  assert {path.partition('/')[0] for path in FILES} == set(FOLDERS)


@pytest.mark.parametrize('path', FILES)
def test_docstrings_open_with_a_verb_or_a_noun(path):
  assert refused((ROOT / path).read_text(encoding='utf-8')) == []


def test_openings():
  for text, is_refused in (
    ('What a run has.', True),
    ('Of each token: its place.', True),
    ('Gives\n  what was kept.', True),
    ('Gives every row a number.', False),
    ('Whatever.', False),
    ('Offers a row.', False),
  ):
    inner = f'class A:\n  async def _f(self):\n    """{text}"""\n'
    for source in (f'"""{text}"""\n', inner):
      assert bool(refused(source)) == is_refused
