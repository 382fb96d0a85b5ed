"""Programs are found, run and graded; plain `exec` is the oracle."""

import inspect
import json
import time

import mistakes
import pytest

from experiments import build
from experiments.configs import base
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import (
  RewardPart,
  code,
  sandbox,
  score,
  step_scores,
)
from jaxrl_llm.tasks import code as tasks

COLUMNS = ('test', 'entry_point', 'test_list', 'test_setup_code')
COLUMNS += ('input_output', 'test_cases')


def rewards(rows, completions, **settings):
  columns = {name: [row.get(name) for row in rows] for name in COLUMNS}
  # Long enough for a loaded machine.
  function = code.code_tests(**dict(timeout=60.0) | settings)
  prompts = [row['prompt'] for row in rows]
  return function(prompts=prompts, completions=completions, **columns)


def fenced(program):
  return f'Here it is:\n```python\n{program}\n```\nIt adds.'


# HumanEval ------------------------------------------------------------------


@pytest.fixture(scope='module')
def human_eval(shared):
  return tasks.human_eval(shared / 'data' / 'human_eval')


SPOIL = """
def _spoil(value):
  if isinstance(value, bool): return not value
  if isinstance(value, (int, float)): return value + 1
  if isinstance(value, (str, list, tuple)):
    return value[1:] if value else type(value)('x')
  return 0

_right = {name}
def {name}(*args):
  return _spoil(_right(*args))
"""


def passes(row, program):
  """The oracle: what the tests of HumanEval say in this very process."""
  space = {}
  exec(program + '\n' + row['test'], space)
  try:
    space['check'](space[row['entry_point']])
  except Exception:
    return False
  return True


def sabotage(human_eval):
  """20 problems spread over all, each with a program that returns otherwise."""
  rows = human_eval[::8][:20]
  spoilt = [SPOIL.format(name=row['entry_point']) for row in rows]
  programs = [
    row['prompt'] + row['solution'] + end
    for row, end in zip(rows, spoilt, strict=True)
  ]
  return rows, programs


def test_human_eval(human_eval):
  # 32, 38 and 50 have helpers in the prompt, 53 and 64 lie on either side of
  # a change in how tests are written.
  rows = [human_eval[i] for i in (0, 32, 38, 50, 53, 64, 163)]
  assert rewards(rows, [row['solution'] for row in rows]) == [1.0] * 7
  whole = [fenced(row['prompt'] + row['solution']) for row in rows]
  assert rewards(rows, whole) == [1.0] * 7
  wrong, programs = sabotage(human_eval)
  found = rewards(wrong[:6], [fenced(program) for program in programs[:6]])
  assert found == [0.0] * 6


@pytest.mark.slow
def test_all_of_human_eval(human_eval):
  assert len(human_eval) == 164
  start = time.monotonic()
  found = rewards(human_eval, [row['solution'] for row in human_eval])
  seconds = time.monotonic() - start
  assert found == [1.0] * 164
  assert seconds < 60, f'{seconds:.0f} s'


@pytest.mark.slow
@pytest.mark.parametrize(
  'grade', [step_scores.all_passed(), step_scores.share_passed()]
)
def test_no_sabotage_passes(human_eval, grade):
  rows, wrong = sabotage(human_eval)
  for row, program in zip(rows, wrong, strict=True):
    right = row['prompt'] + row['solution']
    assert passes(row, right) and not passes(row, program)
  found = rewards(rows, [fenced(program) for program in wrong], score=grade)
  assert len(found) == 20 and max(found) < 1


def test_helpers_of_the_prompt_cannot_be_redefined(human_eval):
  row = human_eval[32]  # Its test asks `poly` of the prompt.
  assert row['entry_point'] == 'find_zero' and 'poly(coeffs' in row['test']
  forged = 'def poly(*args): return 0\ndef find_zero(xs): return 0'
  right = row['prompt'] + row['solution']
  found = rewards([row] * 2, [fenced(forged), fenced(right)])
  assert found == [0.0, 1.0]


def test_objects_of_classes_in_the_prompt_go_by_value():
  """Their operators are the prompt's, whatever the program does to them."""
  prompt = 'class P:\n  def __init__(self, x):\n    self.x = x\n'
  prompt += '  def __eq__(self, other):\n    return self.x == other.x\n\n'
  test = 'def check(g):\n  p = P(1)\n  assert g(p) == P(2)\n  assert p.x == 2'
  row = dict(prompt=prompt + 'def f(p):\n', test=test, entry_point='f')
  forged = prompt.replace('self.x == other.x', 'True')
  answers = [
    '  p.x += 1\n  return P(p.x)',
    '  return P(2)',
    fenced(forged + 'def f(p):\n  return P(3)'),
  ]
  found = rewards([row] * 3, answers, score=step_scores.share_passed())
  assert found == [1, 0.5, 0]


CHECK = """
LIMIT = 3
def check(candidate):
  assert True, 'this prints'
  for i in range(LIMIT):
    assert candidate(i) == i
  import math
  big = 10
  assert candidate(big) == big, 'big'
  if math.pi > 3:
    assert candidate(-1) == -1
  print('end')
"""


def test_the_share_of_a_check_counts_its_assertions():
  row = dict(prompt='Write f.', test=CHECK, entry_point='f')
  answers = ['return x', 'return abs(x)', 'return x % 5', 'return 9', 'return']
  answers = [f'def f(x): {answer}' for answer in answers]
  rows = [row] * 5
  share = rewards(rows, answers, score=step_scores.share_passed())
  assert share == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
  assert rewards(rows, answers) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
  'check',
  [
    'def check(f):\n  if f(1) == 1: return\n  assert f(1) == 2',
    'def check(f):\n  global x\n  x = f(1)\n  assert x in (1, 2)',
    'def check(f):\n  (lambda: f(1))()',
    'def one(f):\n  return f(1)\ndef check(f):\n  assert one(f) in (1, 2)',
  ],
)
def test_a_check_of_another_shape_is_run_all_the_same(check):
  row = dict(prompt='', test=check, entry_point='f')
  texts = ['def f(x): return x', 'def f(x): return 2', 'def f(x): 1 / 0']
  found = rewards([row] * 3, texts, score=step_scores.share_passed())
  assert found == [1, 1, 0]


# MBPP -----------------------------------------------------------------------


@pytest.fixture(scope='module')
def mbpp(shared):
  folder = shared / 'data' / 'mbpp'
  rows = [
    row for split in tasks.MBPP_SPLITS for row in tasks.mbpp(folder, split)
  ]
  return {row['task_id']: row for row in rows}


# A function called `sum`, two that build their arguments with a class of the
# program in a set-up that must come after it, one that does so in its tests.
ODD = (126, 367, 927, 601)


def test_mbpp(mbpp):
  rows = [mbpp[i] for i in (1, 2, *ODD)]
  assert rewards(rows, [row['solution'] for row in rows]) == [1.0] * 6
  wrong = [f'{row["solution"]}\n{row["entry_point"]} = len' for row in rows]
  assert rewards(rows, wrong) == [0.0] * 6
  # Without the name `sum` would be the built-in function.
  without = [{**row, 'entry_point': None} for row in rows]
  found = rewards(without, [row['solution'] for row in rows])
  assert found == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.slow
def test_all_of_mbpp(mbpp):
  assert len(mbpp) == 974
  rows = list(mbpp.values())
  found = rewards(rows, [row['solution'] for row in rows])
  # The data breaks none of them.
  wrong = [r['task_id'] for r, s in zip(rows, found, strict=True) if s < 1]
  assert wrong == []


# Standard input and output --------------------------------------------------

SUM = (
  'import sys\nif __name__ == "__main__":\n  print(sum(map(int, sys.stdin)))'
)
AT_EXIT = 'import atexit, io, os, sys\nout = sys.stdout = io.BytesIO()\n'
AT_EXIT += 'atexit.register(lambda: os.write(1, out.getvalue()))\n'
AT_EXIT += 'out.write(b"%d" % sum(map(int, sys.stdin.buffer.read().split())))'
THREAD = 'import threading, time\ndef main():\n  time.sleep(0.1)\n'
THREAD += '  n = int(input())\n  try: n += int(input())\n  except EOFError: 0\n'
THREAD += '  print(n)\nthreading.Thread(target=main).start()'
APPS = {'inputs': ['1\n2\n', '5\n'], 'outputs': ['3\n', '5']}
CALLS = {'fn_name': 'add', 'inputs': [[1, 2], [[1], [2]]]}
CALLS |= {'outputs': [3, [1, 2]]}
LIVE = [{'input': '1\n2', 'output': '3', 'testtype': 'functional'}]
METHOD = 'class Solution:\n  def add(self, a, b): return a {} b'
ADD = 'def add(a, b): return a {} b'
PAIR = 'def add(a, b): return (a[0], b[0]) if type(a) is list else a + b'


@pytest.mark.parametrize(
  'column, value, entry_point, program, scores',
  [
    ('input_output', APPS, None, SUM, 1),
    ('input_output', json.dumps(APPS), None, fenced(SUM), 1),
    ('input_output', APPS, None, 'print(3)', 0.5),
    ('input_output', APPS, None, 'print(int(input()) + int(input()))', 0.5),
    ('input_output', APPS, None, SUM + '\nraise SystemExit(1)', 0),
    ('input_output', APPS, None, SUM + '\nimport os; os._exit(0)', 0),
    ('input_output', APPS, None, SUM + '\nexit()', 1),
    ('input_output', APPS, None, AT_EXIT, 1),
    ('input_output', APPS, None, THREAD, 1),
    ('input_output', APPS, None, 'while True: pass', 0),
    ('input_output', {'inputs': [['1', '2']], 'outputs': [['3']]}, '', SUM, 1),
    ('input_output', CALLS, None, ADD.format('+'), 1),
    ('input_output', CALLS, None, METHOD.format('+'), 1),
    ('input_output', CALLS, None, PAIR, 1),
    ('input_output', CALLS, None, ADD.format('or'), 0),
    ('test_cases', LIVE, 'add', METHOD.format('+'), 1),
    ('test_cases', json.dumps(LIVE), 'add', METHOD.format('-'), 0),
    ('test_cases', [{'input': '1\n2', 'output': '3'}], '', SUM, 1),
    ('test_cases', [{'input': '1\n2', 'output': '4'}], 'add', SUM, 0),
  ],
)
def test_rows_of_apps_and_livecodebench(
  column, value, entry_point, program, scores
):
  row = {'prompt': 'Add.', column: value, 'entry_point': entry_point}
  slow = dict(timeout=1.0) if 'while' in program else {}
  grade = step_scores.share_passed()
  assert rewards([row], [program], score=grade, **slow) == [scores]


# The reward function --------------------------------------------------------

ROW = dict(
  prompt='Add.', entry_point='add', test_list=['assert add(1, 2) == 3'] * 2
)
RIGHT = 'def add(a, b): return a + b'


def test_every_public_name_is_a_factory():
  public = [
    name
    for name, value in vars(code).items()
    if inspect.isfunction(value) and not name.startswith('_')
  ]
  assert public == code.__all__
  assert code.code_tests.__doc__.startswith('Factory:')
  columns = {name: [ROW.get(name)] * 2 for name in COLUMNS}
  part = RewardPart('code', code.code_tests(timeout=60.0))
  scores = score([part], ['Add.'] * 2, [RIGHT, 'x'], columns)
  assert scores.total.tolist() == [1, 0] and scores.valid.all()


def test_faults_of_the_program_score_0():
  faults = ['', 'def add(', 'while True: pass', 'x = bytearray(2**31)']
  faults += ['import os; os._exit(0)', 'import os; os.abort()']
  found = rewards([ROW] * 7, [*faults, RIGHT], timeout=2.0, parallel=7)
  assert found == [0.0] * 6 + [1.0]


def test_packages_are_importable_by_name():
  pytest.importorskip('numpy')
  program = 'import numpy as np\ndef f(x): return np.cumsum(x), np.float64(2)'
  test = 'import numpy\na, b = f(numpy.ones((2, 2)))\n'
  test += 'assert (a == [1, 2, 3, 4]).all() and b == 2'
  row = dict(prompt='', test_list=[test])
  settings = dict(packages=('numpy',), memory=2**31)
  assert rewards([row], [program], **settings) == [1.0]
  assert rewards([row], [program.replace('ones', 'zeros')]) == [0.0]
  row_2 = dict(prompt='', test_list=['assert f([1, 2])[0].tolist() == [1, 3]'])
  assert rewards([row_2], [program], **settings) == [1.0]
  other = [program + '\nimport pytest']
  assert rewards([row], other, **settings) == [0.0]
  with pytest.raises(UserError, match="'no_such' is not installed"):
    rewards([row], [program], packages=('no_such',))


def test_a_batch_has_a_deadline(caplog):
  programs = [f'while True: {i}' for i in range(4)]
  start = time.monotonic()
  found = rewards(
    [ROW] * 5, [RIGHT, *programs], parallel=1, batch_timeout=3.5, timeout=2.0
  )
  assert found == [1.0, 0.0, None, None, None]
  assert time.monotonic() - start < 30
  assert '3 of 5 programs had not ended' in caplog.text


def test_equal_programs_run_once(monkeypatch):
  sandbox.isolation()
  ran = []

  def count(program, *args, **kwargs):
    ran.append(program)
    return sandbox.Result(sandbox.Outcome.PASSED, (True, True), '', '')

  monkeypatch.setattr(sandbox, 'run', count)
  assert rewards([ROW] * 4, ['a', 'b', 'a', 'a']) == [1.0] * 4
  assert sorted(ran) == ['a', 'b']


def test_a_sandbox_that_cannot_run_is_no_score(monkeypatch):
  def fails(*args, **kwargs):
    raise OSError(11, 'Resource temporarily unavailable')

  sandbox.isolation()
  monkeypatch.setattr(sandbox.subprocess, 'Popen', fails)
  with pytest.raises(UserError, match='cannot start a program'):
    rewards([ROW] * 3, [RIGHT] * 3)


VACUOUS = ['', ' # nothing', 'assert True', 'assert 1, "x"', 'x = 1']


def _check(body):
  test = f'def check(candidate):\n  {body}'
  return dict(test_list=None, test=test, entry_point='f')


def _pairs(value):
  return dict(test_list=None, input_output=value)


@pytest.mark.parametrize(
  'change, text',
  [
    (dict(test_list=None), 'sample 1 needs either'),
    (dict(test=CHECK), 'sample 1 needs either'),
    (dict(test_list=[]), 'at least one test'),
    (dict(test_list='assert'), 'test_list of sample 1 is str'),
    (dict(test_list=[1]), 'at least one test'),
    *((dict(test_list=[t]), 'tests nothing') for t in VACUOUS),
    (dict(test_list=['assert f(']), 'test_list of sample 1 is not Python'),
    (_check('pass'), 'tests nothing'),
    (_check('assert True'), 'tests nothing'),
    (_check('assert 1 + 1 == 2'), 'tests nothing'),
    (_pairs('{'), 'input_output of sample 1 is not JSON'),
    (_pairs({'inputs': []}), 'must hold inputs and'),
    (_pairs({'inputs': ['1'], 'outputs': []}), 'as many outputs'),
    (_pairs({'inputs': [1], 'outputs': [2]}), 'must hold texts'),
    (dict(test_list=None, test_cases=[{'input': ''}]), 'each needs an input'),
    (
      _pairs('{"inputs": [""], "outputs": [""]}') | dict(test_list=['f()']),
      'ne',
    ),
    (dict(test_setup_code=3), 'test_setup_code of sample 1 is int 3'),
    (dict(test_list=None, test='def check(', entry_point='f'), 'not Python'),
    (dict(test_list=None, test='x = 1', entry_point='f'), 'no function check'),
    (dict(test_list=None, test=CHECK, entry_point=None), 'sample 1 needs'),
  ],
)
def test_rows_without_tests_are_refused(change, text):
  with mistakes.refused(text):
    rewards([ROW, ROW | change], [RIGHT] * 2)


def test_settings_are_checked():
  for settings in (
    dict(parallel=0),
    dict(packages='numpy'),
    dict(batch_timeout=0),
  ):
    with pytest.raises(UserError, match='code_tests'):
      code.code_tests(**settings)


def test_a_configuration_can_name_it():
  config = base.get_config()
  spec = dict(name='code_tests', timeout=60.0, weight=2.0)
  config.rewards = dict(
    all=spec, share=spec | dict(score=dict(name='share_passed'))
  )
  parts = {part.name: part for part in build.reward_parts(config)}
  half = dict(ROW, test_list=['assert add(1, 2) == 3', 'assert add(1, 2) == 4'])
  columns = {name: [half.get(name)] for name in COLUMNS}
  given = dict(prompts=['Add.'], completions=[RIGHT], **columns)
  assert parts['all'].function(**given) == [0.0]
  assert parts['share'].function(**given) == [0.5]
  assert parts['share'].weight == 2.0
  config.rewards = dict(all=spec | dict(score=dict(name='shared')))
  with pytest.raises(UserError, match="did you mean 'share_passed'"):
    build.reward_parts(config)
