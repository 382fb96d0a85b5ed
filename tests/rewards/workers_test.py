"""Worker processes against functions that hang, crash, lie and leave things."""

import math
import os
import pathlib
import tempfile
import threading
import time

import hostile
import mistakes
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import (
  RewardPart,
  Workers,
  containment,
  functions,
  score,
)
from jaxrl_llm.rewards import (
  workers as reward_workers,
)

HOSTILE = hostile.NAME
# Seconds: enough for a healthy sample on a machine that is busy otherwise.
TIMEOUT = 2.0

# Kind of failure → samples that are counted as it.
FAILING = {
  'timeout': ['sleep', 'hold the lock', 'backtrack', 'detach and sleep'],
  'crash': ['exit', 'fault', 'kill group', 'forge', 'forge badly and sleep']
  + ['write without end', 'close everything', 'write a line'],
  'memory': ['allocate'],
  'error': ['raise', 'SystemExit', 'KeyboardInterrupt', 'recurse', 'nan']
  + ['text', 'too many', 'too few', 'no list'],
}
HARMLESS = ['print', 'close output', 'return twice', 'detach']


@pytest.mark.parametrize('kind', containment.KINDS[:-1])
def test_hostile_samples_cost_nobody_else_a_score(kind, marked, allowed_kinds):
  if kind not in allowed_kinds:
    pytest.skip(f'the kernel allows no {kind}')
  bad = sum(FAILING.values(), [])
  healthy = [str(i) for i in range(63 - len(bad) - len(HARMLESS))]
  expected = [None] * len(bad) + [1.0] * len(HARMLESS) + [None]
  threads = threading.active_count()
  with Workers(
    HOSTILE, workers=4, timeout=TIMEOUT, containment=kind
  ) as workers:
    assert workers.containment == kind
    start = time.monotonic()
    pending = hostile.begin(workers, [*bad, *HARMLESS, 'none', *healthy])
    assert not pending.done()
    assert pending.result() == expected + list(map(float, healthy))
    # One time-out, and the start of 20 processes on however busy a machine.
    assert time.monotonic() - start < TIMEOUT + 30
    failures = pending.failures()
    kinds = [kind for kind, samples in FAILING.items() for _ in samples]
    assert [kind for kind, _ in failures.values()] == kinds
    assert [*failures] == list(range(len(bad)))  # 'none' is not a failure.
    index = bad.index('raise')
    assert failures[index][1] == (
      f"ValueError: no answer (sample {index}, completion 'raise')"
    )
    assert failures[0][1].startswith('gave no answer in 2 s (sample 0')
    # Of what hung nothing is left: 4 workers and what 'detach' left running.
    left = [
      pid
      for pid in marked()
      if b'time.sleep' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
    ]
    assert len(left) <= 1
    again = hostile.begin(workers, healthy).result()
    assert again == list(map(float, healthy))
  assert not marked() and threading.active_count() == threads


def test_one_that_hangs_holds_up_one_worker_alone():
  with Workers(HOSTILE, timeout=1000) as workers:
    first = hostile.begin(workers, ['sleep'])
    second = hostile.begin(workers, ['2'] * 200)
    assert second.result() == [2.0] * 200 and second.done()
    assert not first.done()


def test_a_process_serves_until_it_has_to_be_replaced():
  given = ['born', 'return twice', 'raise', 'born', 'forge', 'born']
  with Workers(HOSTILE, workers=1, timeout=60.0) as workers:
    first, *between, again, forged, fresh = workers(given, given)
  assert between == [1.0, None] and forged is None
  assert first == again != fresh


def test_a_process_that_a_sample_leaves_does_not_answer_later_ones():
  samples = ['steal', *(['2'] * 200)]
  with Workers(HOSTILE, workers=1, timeout=TIMEOUT) as workers:
    pending = hostile.begin(workers, samples)
    assert pending.result() == [1.0] + [2.0] * 200 and not pending.failures()


@pytest.mark.parametrize(
  'stray, own',
  [
    ('write a line', None),
    ('forge', None),
    # In its own process a function can give itself any score.
    ('forge this', 9.0),
    ('forge this later', 1.0),
  ],
)
def test_a_stray_line_is_no_score_of_another_sample(stray, own):
  with Workers(HOSTILE, workers=1) as workers:
    pending = hostile.begin(workers, ['1', stray])
    assert pending.result() == [1.0, own]
    if own is None:
      kind, message = pending.failures()[1]
      assert kind == 'crash' and 'wrote to the channel' in message
    time.sleep(0.5)
    later = hostile.begin(workers, ['2', '3'])
    assert later.result() == [2.0, 3.0] and not later.failures()
    # And without a pause.
    given = ['4', stray, '5', 'outlast the alarm', '6']
    assert workers(given, given) == [4.0, own, 5.0, 1.0, 6.0]


@pytest.mark.parametrize(
  'before, sample',
  [('leave an alarm', 'outlast the alarm'), ('leak', 'need memory')],
)
def test_what_an_earlier_sample_broke_is_not_held_against_a_later_one(
  before, sample
):
  with Workers(HOSTILE, workers=1, timeout=5, memory=160 << 20) as workers:
    pending = hostile.begin(workers, [before, sample])
    assert pending.result() == [1.0, 1.0] and not pending.failures()


def test_scores_are_those_of_the_function_itself():
  """A reward of each kind of column and each float, through the channel."""
  texts = ['#### 18', 'so 3+4=7', '7', ' 0.5', '#### 1,000', 'é\n\ud800"', '']
  columns = {
    'answer': ['18', 7, '7', 0.5, '#### 1000', '0', '1'],
    'completion_ids': [list(range(i)) for i in range(7)],
    'finished': [True, False] * 3 + [True],
  }
  for name in ('gsm8k_answer', 'length_in_tokens'):
    own = score(
      [RewardPart(name, getattr(functions, name))], texts, texts, columns
    )
    with Workers(name, workers=1) as workers:
      found = score([RewardPart(name, workers)], texts, texts, columns)
    np.testing.assert_array_equal(found.total, own.total)
    assert found.valid.all()
  numbers = [0.1, 1e-310, -3.4028234663852886e38, 2**60, 1 / 3]
  with Workers(HOSTILE, workers=1) as function:
    given = [repr(number) for number in numbers]
    assert function(given, given) == numbers
    assert function(prompts=[], completions=[]) == []
  with Workers(
    'length_penalty', dict(limit=8, buffer=4), workers=1
  ) as function:
    ids = [[0] * n for n in (4, 6, 9)]
    given = dict(prompts=[''] * 3, completions=[''] * 3, completion_ids=ids)
    assert function(**given) == [0, -0.5, -1]


def test_workers_begin_before_the_other_functions_are_called(tmp_path):
  """The one waits for a file that the other writes: in turn they would hang."""
  (tmp_path / 'waits.py').write_text(
    'import os, time\n'
    'def waits(completions):\n'
    '  while not os.path.exists(completions[0]): time.sleep(0.01)\n'
    '  return [1.0]\n'
  )
  path = tmp_path / 'written'

  def writes(completions):
    path.touch()
    return [1.0]

  with Workers(f'{tmp_path}/waits.py:waits', workers=1, timeout=60) as workers:
    parts = [RewardPart('waits', workers), RewardPart('writes', writes)]
    found = score(parts, [''], [str(path)], {})
  assert found.total.tolist() == [2.0] and [*found.parts] == ['waits', 'writes']


def test_only_what_the_function_names_is_sent_after_it_is_warm(tmp_path):
  (tmp_path / 'mine.py').write_text(
    'import time\n'
    'def mine(completions, answer=("none",), *, weight=2):\n'
    '  return [weight * len(answer[0]) + mine.warm]\n'
    'def warm_up():\n'
    '  time.sleep(1.5)\n'
    '  mine.warm = 10\n'
    'mine.warm_up = warm_up\n'
  )
  with Workers(f'{tmp_path}/mine.py:mine', workers=1, timeout=1.0) as workers:
    columns = {'answer': ['ab'], 'other': [object()]}
    assert workers.submit(['p'], ['c'], columns).result() == [14.0]
    assert workers(['p'], ['c']) == [18.0]


@pytest.fixture(scope='module')
def exact():
  with Workers('exact_match', workers=1) as workers:
    yield workers


@pytest.mark.parametrize(
  'value', [object(), (1, 2), {1: 2}, np.float32(1), [[b'x']], {'a': {3}}]
)
def test_a_column_that_json_would_change_is_named(value, exact):
  columns = {'answer': ['1', '2'], 'odd': ['fine', value]}
  with mistakes.refused("'odd'", 'at sample 1'):
    exact.submit(['', ''], ['1', '2'], columns)
  del columns['odd']
  assert exact.submit(['', ''], ['1', '2'], columns).result() == [1, 1]


@pytest.mark.parametrize(
  'columns, text',
  [
    ({}, "'exact_match' needs an argument 'answer'"),
    ({'answer': ['1']}, "2 completions to score but 1 entries in 'answer'"),
    # A mistake in the data set is not a failure of a sample.
    ({'answer': ['1', None]}, "'exact_match', sample 1 alone: "),
  ],
)
def test_a_mistake_in_a_column_is_named(columns, text, exact):
  with mistakes.refused(text):
    exact(['', ''], ['', ''], **columns)


def test_a_function_that_never_works_is_the_users_mistake():
  with Workers(HOSTILE, workers=1) as workers:
    with mistakes.refused('first batch', 'ValueError: no answer (sample 0'):
      workers(['', ''], ['raise', 'nan'])
    # Nor is a crash of all, which is not the function's doing alone.
    samples = 'exit', '1', 'raise'
    assert [workers([''], [x])[0] for x in samples] == [None, 1.0, None]


@pytest.mark.parametrize(
  'name, changes, text',
  [
    ('exct_match', {}, "did you mean 'exact_match'"),
    ('nowhere.py:f', {}, 'no such Python file: nowhere.py'),
    ('FILE:broken', {}, "no function 'broken' in"),
    ('EXITS:f', {}, 'does not load\nSystemExit: 3'),
    ('CRASHES:f', {}, r'CRASHES.py:f ended with status 7'),
    ('HANGS:f', {}, 'HANGS.py:f gave no answer in 0.5 s'),
    ('format_match', {}, 'format_match needs pattern'),
    ('format_match', dict(settings=dict(pattern='(')), 'regular expression'),
    ('format_match', dict(settings=dict(pattern={1})), 'not a JSON value'),
    ('exact_match', dict(workers=0), 'workers is 0'),
    ('exact_match', dict(workers=True), 'workers is True'),
    ('exact_match', dict(timeout=0), 'timeout is 0'),
    ('exact_match', dict(timeout=math.inf), 'timeout is inf'),
    ('exact_match', dict(timeout='1'), "timeout is '1'"),
    ('exact_match', dict(memory=1.0), 'memory is 1.0'),
    ('exact_match', dict(memory=1000), 'memory is 1000\n.*at least'),
    ('exact_match', dict(containment='jail'), "containment is 'jail'\n.*group"),
  ],
)
def test_what_cannot_be_loaded_is_refused(
  name, changes, text, tmp_path, marked, monkeypatch
):
  if 'HANGS' in name:
    monkeypatch.setattr(reward_workers, '_LOADING', 0.5)
  for stem, code in {
    'FILE': 'def works(completions): ...',
    'EXITS': 'raise SystemExit(3)',
    'CRASHES': 'import os; os._exit(7)',
    'HANGS': 'import time; time.sleep(1000)',
  }.items():
    (tmp_path / f'{stem}.py').write_text(code)
    name = name.replace(f'{stem}:', f'{tmp_path}/{stem}.py:')
  with pytest.raises(UserError, match=text) as caught:
    Workers(name, field='config.rewards.part', **changes)
  message = str(caught.value)
  assert message.startswith(('config.rewards.part: ', 'format_match: '))
  assert len(message.splitlines()) <= 3 and not marked()


def test_a_file_that_vanishes_or_changes_is_not_loaded_again(
  tmp_path, monkeypatch
):
  """Paths, of imports too, mean what they meant at first."""
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'mine.py'
  (tmp_path / 'sibling.py').write_text('VALUE = 3.0')
  (tmp_path / 'elsewhere').mkdir()
  code = (
    'import os, sibling\n'
    'def mine(completions):\n'
    '  return os._exit(1) if completions[0] == "exit" else [sibling.VALUE]\n'
  )
  path.write_text(code)
  with Workers('mine.py:mine', workers=1) as workers:
    monkeypatch.chdir(tmp_path / 'elsewhere')
    given = ['1', 'exit', '1']
    assert workers(given, given) == [3.0, None, 3.0]
    path.unlink()
    with pytest.raises(UserError, match='no such Python file'):
      workers([''], ['exit'])
    path.write_text(code + '# Another.')
    with mistakes.refused('mine.py:mine has changed\n'):
      workers([''], ['1'])
    path.write_text(code)
    assert workers([''], ['1']) == [3.0]


def test_workers_end_when_closed_and_when_nobody_refers_to_them(marked):
  workers = Workers(HOSTILE, timeout=1000)
  pending = hostile.begin(workers, ['sleep'] * 5)
  start = time.monotonic()
  workers.close()
  assert time.monotonic() - start < 10 and not marked()
  with pytest.raises(UserError, match='its workers are closed'):
    pending.result()
  with pytest.raises(UserError, match='its workers are closed'):
    hostile.begin(workers, ['1'])
  workers.close()
  workers = Workers(HOSTILE)
  assert hostile.begin(workers, ['1']).result() == [1.0] and marked()
  del workers
  assert hostile.until(lambda: not marked())


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_15_hostile_samples_of_64_cost_their_own_time_outs(
  count, marked, monkeypatch, tmp_path
):
  """On a machine that does nothing else; nothing is left of them."""
  bad = ['sleep', 'hold the lock', 'detach and sleep', *FAILING['crash'][:-1]]
  bad += ['allocate', 'raise', 'recurse', 'print', 'steal']
  samples = [str(i) for i in range(64)]
  samples[2:62:4] = bad
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  threads = threading.active_count()
  with Workers(HOSTILE, workers=count, timeout=5.0) as workers:
    hostile.begin(workers, ['1']).result()
    start = time.monotonic()
    pending = hostile.begin(workers, samples)
    scores = pending.result()
    elapsed = time.monotonic() - start
    print(f'{count} workers: {elapsed:.2f} s')
  for text, found in zip(samples, scores, strict=True):
    harmless = 1.0 if text in ('print', 'steal') else None
    assert found == (float(text) if text.isdigit() else harmless), text
  expected = {'timeout': 3, 'crash': 7, 'memory': 1, 'error': 2}
  assert hostile.counts(pending) == expected
  assert elapsed < 5.0 * math.ceil(3 / count) + 5.0, elapsed
  # No process, zombie, thread or folder.
  assert not marked() and not os.listdir(tmp_path)
  with pytest.raises(ChildProcessError):
    os.waitpid(-1, os.WNOHANG)
  assert threading.active_count() == threads
