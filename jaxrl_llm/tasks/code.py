"""Programming problems with tests: HumanEval and MBPP."""

import pathlib
import re

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import datasets

# Task numbers of MBPP's splits (Austin et al., 2021, section 2.1).
MBPP_SPLITS = {
  'prompt': range(1, 11),
  'test': range(11, 511),
  'validation': range(511, 601),
  'train': range(601, 975),
}


def human_eval(path: str | pathlib.Path | None) -> list[dict]:
  """Reads the 164 problems of HumanEval (Chen et al., 2021).

  Args:
    path: HumanEval.jsonl or HumanEval.jsonl.gz, or the folder that holds one
      of them; None for the hub.

  Returns:
    Rows of task_id, prompt (the head of a function and its docstring), solution
    (its body), test (source that defines check(candidate)) and entry_point (the
    function's name).
  """
  files = 'HumanEval.jsonl.gz', 'HumanEval.jsonl'
  file = path and datasets.find_file(path, *files)
  names = {'solution': 'canonical_solution', 'test': 'test'}
  names |= {'entry_point': 'entry_point', 'task_id': 'task_id'}
  return [
    {'prompt': row['prompt']} | _columns(where, row, names, str)
    for where, row in datasets.read(file, 'openai/openai_humaneval', 'test')
  ]


def mbpp(
  path: str | pathlib.Path | None, split: str, shown_tests: int = 3
) -> list[dict]:
  """Reads Mostly Basic Python Problems (Austin et al., 2021).

  Args:
    path: mbpp.jsonl or the folder that holds it; None for the hub.
    split: 'train' (374 problems), 'validation' (90), 'test' (500) or 'prompt'
      (10, for few-shot prompts), by the task's number.
    shown_tests: number of a problem's tests (most have three) that its prompt
      shows; the function's name occurs nowhere else.  The paper shows all; a
      model that sees all of them can learn to answer them one by one.

  Returns:
    Rows of task_id, prompt, solution, test_list, test_setup_code and
    entry_point (the solution's function that the tests call; '' unless there is
    exactly one).  Line ends are '\\n'.
  """
  if split not in MBPP_SPLITS:
    raise UserError(f'MBPP has the splits {list(MBPP_SPLITS)}, not {split!r}.')
  if shown_tests < 1:
    raise UserError(f'MBPP: shown_tests={shown_tests} must be at least 1.')
  file = path and datasets.find_file(path, 'mbpp.jsonl')
  hub = 'google-research-datasets/mbpp'
  settings = dict(config='full', prompt_column='text')
  result = []
  for where, row in datasets.read(file, hub, split, **settings):
    _columns(where, row, {'number': 'task_id'}, int)
    if row['task_id'] in MBPP_SPLITS[split]:
      result.append(_mbpp_row(where, row, shown_tests))
  if not result:
    raise UserError(f'{file}: there are no problems of the split {split}.')
  return result


def _mbpp_row(where: str, row: dict, shown_tests: int) -> dict:
  names = {'solution': 'code', 'test_setup_code': 'test_setup_code'}
  texts = _columns(where, row, names, str)
  tests = _columns(where, row, {'tests': 'test_list'}, list)['tests']
  if not tests or not all(isinstance(test, str) for test in tests):
    raise UserError(f'{where}: test_list must hold at least one text.')
  tests = [_unix(test) for test in tests]
  shown = '\n'.join(tests[:shown_tests])
  texts = {name: _unix(text) for name, text in texts.items()}
  return {
    'task_id': row['task_id'],
    'prompt': (
      f'{_unix(row["prompt"])}\nYour code should pass these tests:\n\n{shown}\n'
    ),
    **texts,
    'test_list': tests,
    'entry_point': _entry_point(texts['solution'], tests),
  }


def _entry_point(solution: str, tests: list[str]) -> str:
  defined = set(re.findall(r'^def +(\w+)', solution, re.MULTILINE))
  called = {name for test in tests for name in re.findall(r'(\w+) *\(', test)}
  candidates = defined & called
  return candidates.pop() if len(candidates) == 1 else ''


def _columns(where: str, row: dict, names: dict, kind: type) -> dict:
  """Selects columns of a row under other names.

  Raises:
    UserError: one is missing or has another type.
  """
  for name in names.values():
    if not isinstance(row.get(name), kind):
      raise UserError(
        f'{where}: the column {name} must be of type {kind.__name__}, not '
        f'{row.get(name)!r:.60}.'
      )
  return {name: row[column] for name, column in names.items()}


def _unix(text: str) -> str:
  return text.replace('\r\n', '\n')
