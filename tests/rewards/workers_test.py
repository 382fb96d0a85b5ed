"""Worker processes against functions that hang, crash, lie and leave things."""

import math
import pathlib
import time

import hostile
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import (
  RewardPart,
  Workers,
  functions,
  isolated,
  score,
)

HOSTILE = hostile.NAME
# Seconds: enough for a healthy sample on a machine that is busy otherwise.
TIMEOUT = 2.0

# What a sample does → the kind it is counted as.
FAILING = {
  'sleep': 'timeout',
  'hold the lock': 'timeout',
  'backtrack': 'timeout',
  'detach and sleep': 'timeout',
  'exit': 'crash',
  'fault': 'crash',
  'kill group': 'crash',
  'forge': 'crash',
  'forge badly and sleep': 'crash',
  'write without end': 'crash',
  'close everything': 'crash',
  'allocate': 'memory',
  'raise': 'error',
  'SystemExit': 'error',
  'KeyboardInterrupt': 'error',
  'recurse': 'error',
  'nan': 'error',
  'text': 'error',
  'too many': 'error',
  'too few': 'error',
  'no list': 'error',
}
HARMLESS = {
  'print': 1.0,
  'close output': 1.0,
  'return twice': 1.0,
  'detach': 1.0,
  'none': None,
}


@pytest.mark.parametrize('kind', ['namespace', 'subreaper'])
def test_hostile_samples_cost_nobody_else_a_score(kind, marked, allowed_kinds):
  if kind not in allowed_kinds:
    pytest.skip(f'the kernel allows no {kind}')
  bad = [*FAILING, *HARMLESS]
  healthy = [str(i) for i in range(64 - len(bad))]
  with Workers(
    HOSTILE, workers=4, timeout=TIMEOUT, containment=kind
  ) as workers:
    assert workers.containment == kind and workers.memory_limited
    start = time.monotonic()
    pending = hostile.begin(workers, bad + healthy)
    assert not pending.done()
    scores = pending.result()
    # One time-out, and the start of 20 processes on however busy a machine.
    assert time.monotonic() - start < TIMEOUT + 30
    assert scores[: len(FAILING)] == [None] * len(FAILING)
    assert scores[len(FAILING) : len(bad)] == list(HARMLESS.values())
    assert scores[len(bad) :] == [float(text) for text in healthy]
    counts, messages = pending.failures()
    assert counts == {
      kind: list(FAILING.values()).count(kind)
      for kind in ('timeout', 'crash', 'error', 'memory')
    }
    assert messages['error'] == (
      f"ValueError: no answer (sample {bad.index('raise')}, completion 'raise')"
    )
    assert messages['timeout'].startswith('no answer in 2 s (sample 0')
    # Of what hung nothing is left: 4 workers and what 'detach' left running.
    left = [
      pid
      for pid in marked()
      if b'time.sleep' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
    ]
    assert len(left) <= 1
    again = hostile.begin(workers, healthy).result()
    assert again == [float(text) for text in healthy]
  assert not marked()


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize(
  'bad',
  ['raise', 'sleep', 'exit', 'allocate', 'detach and sleep', 'hold the lock'],
)
def test_a_hostile_sample_of_64_costs_a_time_out_and_5_seconds(
  bad, count, marked
):
  """On a machine that does nothing else."""
  samples = [str(i) for i in range(64)]
  samples[20] = bad
  with Workers(HOSTILE, workers=count, timeout=5.0) as workers:
    hostile.begin(workers, ['1']).result()
    start = time.monotonic()
    pending = hostile.begin(workers, samples)
    scores = pending.result()
    elapsed = time.monotonic() - start
    assert pending.failures().counts[FAILING[bad]] == 1
  for text, found in zip(samples, scores, strict=True):
    assert found == (None if text == bad else float(text))
  assert not marked()
  assert elapsed < 5.0 + 5.0, elapsed


def test_one_that_hangs_holds_up_one_worker_alone():
  with Workers(HOSTILE, timeout=1000) as workers:
    first = hostile.begin(workers, ['sleep'])
    second = hostile.begin(workers, ['2'] * 200)
    assert second.result() == [2.0] * 200 and second.done()
    assert not first.done()


def test_a_process_serves_until_it_has_to_be_replaced():
  given = ['born', 'return twice', 'raise', 'born', 'forge', 'born', 'none']
  with Workers(HOSTILE, workers=1, timeout=60.0) as workers:
    found = workers(prompts=given, completions=given)
  first, *between, again, forged, fresh, nothing = found
  assert between == [1.0, None] and forged is None and nothing is None
  assert first == again != fresh


def test_a_process_that_a_sample_leaves_does_not_answer_later_ones():
  samples = ['steal', *(['2'] * 200)]
  with Workers(HOSTILE, workers=1, timeout=TIMEOUT) as workers:
    pending = hostile.begin(workers, samples)
    assert pending.result() == [1.0] + [2.0] * 200
    assert not pending.failures().total


def test_a_forged_reply_is_no_score():
  with Workers(HOSTILE, workers=1) as workers:
    pending = hostile.begin(workers, ['forge'])
    assert pending.result() == [None]
    assert 'wrote to the channel' in pending.failures().messages['crash']


@pytest.mark.parametrize(
  'stray, allowed',
  [
    ('print a line', {1.0}),
    ('write a line', {None}),
    ('forge the next', {None}),
    ('forge the next later', {1.0}),
    # In its own process a function can give itself any score.
    ('forge this', {None, 9.0}),
  ],
)
def test_a_stray_line_is_no_score_of_another_sample(stray, allowed):
  with Workers(HOSTILE, workers=1) as workers:
    pending = hostile.begin(workers, ['1', stray])
    first, scored = pending.result()
    assert first == 1.0 and scored in allowed
    assert pending.failures().counts['crash'] == (scored is None)
    time.sleep(0.5)
    later = hostile.begin(workers, ['2', '3'])
    assert later.result() == [2.0, 3.0] and not later.failures().total
    # And without a pause.
    given = ['4', stray, '5', 'outlast the alarm', '6']
    found = workers(prompts=given, completions=given)
    assert found[:1] + found[2:] == [4.0, 5.0, 1.0, 6.0]
    assert found[1] in allowed


@pytest.mark.parametrize(
  'before, sample',
  [('leave an alarm', 'outlast the alarm'), ('leak', 'need memory')],
)
def test_what_an_earlier_sample_broke_is_not_held_against_a_later_one(
  before, sample
):
  with Workers(HOSTILE, workers=1, timeout=5, memory=160 << 20) as workers:
    pending = hostile.begin(workers, [before, sample])
    assert pending.result() == [1.0, 1.0]
    assert not any(pending.failures().counts.values())


def test_scores_are_those_of_the_function_itself():
  """Every reward of the library and each float, through the channel."""
  texts = ['#### 18', 'so 3+4=7', '7', ' 0.5', '#### 1,000', 'é\n\ud800"', '']
  columns = {
    'answer': ['18', 7, '7', 0.5, '#### 1000', '0', '1'],
    'completion_ids': [list(range(i)) for i in range(7)],
    'finished': [True, False] * 3 + [True],
  }
  for name in ('gsm8k_answer', 'prefix_match', 'length_in_tokens'):
    own = score(
      [RewardPart(name, getattr(functions, name))], texts, texts, columns
    )
    with Workers(name, workers=1) as workers:
      found = score([RewardPart(name, workers)], texts, texts, columns)
    np.testing.assert_array_equal(found.total, own.total)
    assert found.valid.all()
  numbers = [0.1, 1e-310, -3.4028234663852886e38, 2**60, 1 / 3]
  with isolated(HOSTILE, workers=1) as function:
    given = [repr(number) for number in numbers]
    assert function(prompts=given, completions=given) == numbers
    assert function(prompts=[], completions=[]) == []


def test_a_factory_gets_its_settings():
  with isolated('length_penalty', workers=1, limit=8, buffer=4) as function:
    ids = [[0] * n for n in (4, 6, 9)]
    assert function(
      prompts=['', '', ''], completions=['', '', ''], completion_ids=ids
    ) == [0, -0.5, -1]


def test_parts_in_workers_beside_others():
  seen = []

  def slow(completions):
    seen.append(time.monotonic())
    return [10.0, 20.0]

  with Workers(HOSTILE, workers=1, timeout=TIMEOUT) as workers:
    parts = [
      RewardPart('a', workers),
      RewardPart('b', slow, 2.0),
      RewardPart('c', workers),
    ]
    found = score(parts, ['', ''], ['5', 'raise'], {'answer': ['x', 'y']})
  assert list(found.parts) == ['a', 'b', 'c']
  np.testing.assert_array_equal(found.total, [30, 0])
  np.testing.assert_array_equal(found.parts['a'], [5, np.nan])
  assert found.valid.tolist() == [True, False]
  assert set(found.failures) == {'a', 'c'}
  assert found.failures['a'].counts['error'] == 1


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
    assert score(parts, [''], [str(path)], {}).total.tolist() == [2.0]


def test_only_what_the_function_names_is_sent(tmp_path):
  (tmp_path / 'mine.py').write_text(
    'def mine(completions, answer=("none",), *, weight=2):\n'
    '  return [weight * len(answer[0])]\n'
  )
  with Workers(f'{tmp_path}/mine.py:mine', workers=1) as workers:
    columns = {'answer': ['ab'], 'other': [object()]}
    assert workers.submit(['p'], ['c'], columns).result() == [4.0]
    assert workers(prompts=['p'], completions=['c']) == [8.0]


@pytest.mark.parametrize(
  'value', [object(), (1, 2), {1: 2}, np.float32(1), [[b'x']], {'a': {3}}]
)
def test_a_column_that_json_would_change_is_named(value, exact):
  columns = {'answer': ['1', '2'], 'odd': ['fine', value]}
  with pytest.raises(UserError, match="'odd' .* at sample 1") as caught:
    exact.submit(['', ''], ['1', '2'], columns)
  assert len(str(caught.value).splitlines()) <= 3
  del columns['odd']
  assert exact.submit(['', ''], ['1', '2'], columns).result() == [1, 1]


@pytest.fixture(scope='module')
def exact():
  with Workers('exact_match', workers=1) as workers:
    yield workers


def test_a_missing_or_short_column_is_named(exact):
  with pytest.raises(UserError, match="'exact_match' needs .*'answer'"):
    exact(prompts=[''], completions=[''])
  with pytest.raises(UserError, match="1 completions .* 2 entries in 'answer'"):
    exact(prompts=[''], completions=[''], answer=['1', '2'])


def test_a_mistake_in_the_data_set_is_no_failure_of_a_sample(exact):
  with pytest.raises(
    UserError, match='given sample 1 alone: .* None'
  ) as caught:
    exact(prompts=['', ''], completions=['', ''], answer=['1', None])
  assert len(str(caught.value).splitlines()) <= 3


def test_a_function_that_never_works_is_the_users_mistake():
  with Workers(HOSTILE, workers=1) as workers:
    with pytest.raises(UserError, match='hostile.py.* first batch') as caught:
      workers(prompts=['', ''], completions=['raise', 'nan'])
    assert 'ValueError: no answer (sample 0' in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    # Nor is a crash of all, which is not the function's doing alone.
    assert workers(prompts=[''], completions=['exit']) == [None]
    assert workers(prompts=[''], completions=['1']) == [1.0]
    assert workers(prompts=[''], completions=['raise']) == [None]


@pytest.mark.parametrize(
  'name, changes, text',
  [
    ('exct_match', {}, "did you mean 'exact_match'"),
    ('nowhere.py:f', {}, 'no such Python file: nowhere.py'),
    ('nowhere:f', {}, 'no such Python file: nowhere'),
    ('FILE:broken', {}, "no function 'broken' in"),
    ('EXITS:f', {}, 'does not load\nSystemExit: 3'),
    ('CRASHES:f', {}, r'CRASHES.py:f ended with status 7'),
    ('HANGS:f', dict(load_timeout=0.5), 'does not load within 0.5 s'),
    ('format_match', {}, 'format_match needs pattern'),
    ('format_match', dict(settings=dict(pattern='(')), 'regular expression'),
    ('format_match', dict(settings=dict(pattern={1})), 'not a JSON value'),
    ('exact_match', dict(settings=dict(x=1)), "no setting 'x'"),
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
def test_what_cannot_be_loaded_is_refused(name, changes, text, tmp_path):
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
  assert len(message.splitlines()) <= 3


def test_a_file_that_vanishes_or_changes_is_not_loaded_again(tmp_path):
  path = tmp_path / 'mine.py'
  code = (
    'import os\n'
    'def mine(completions):\n'
    '  return os._exit(1) if completions[0] == "exit" else [1.0]\n'
  )
  path.write_text(code)
  with Workers(f'{path}:mine', workers=1) as workers:
    ask = lambda what: workers(prompts=[''], completions=[what])
    assert ask('1') == [1.0]
    path.unlink()
    with pytest.raises(UserError, match='no such Python file'):
      ask('exit')
    path.write_text(code + '# Another.')
    with pytest.raises(UserError, match='mine.py:mine has changed\n') as caught:
      ask('1')
    assert len(str(caught.value).splitlines()) <= 3
    path.write_text(code)
    assert ask('1') == [1.0]


def test_paths_mean_what_they_meant_at_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'sibling.py').write_text('VALUE = 3.0')
  (tmp_path / 'mine.py').write_text(
    'import os, sibling\n'
    'def mine(completions):\n'
    '  return os._exit(1) if completions[0] == "exit" else [sibling.VALUE]\n'
  )
  (tmp_path / 'elsewhere').mkdir()
  with Workers('mine.py:mine', workers=1) as workers:
    monkeypatch.chdir(tmp_path / 'elsewhere')
    given = ['1', 'exit', '1']
    assert workers(prompts=given, completions=given) == [3.0, None, 3.0]


def test_closing_ends_what_is_under_way(marked):
  workers = Workers(HOSTILE, timeout=1000)
  pending = hostile.begin(workers, ['sleep'] * 5)
  start = time.monotonic()
  workers.close()
  assert time.monotonic() - start < 10 and not marked()
  with pytest.raises(UserError, match='its workers are closed'):
    pending.result()
  workers.close()
  with pytest.raises(UserError, match='its workers are closed'):
    hostile.begin(workers, ['1'])


def test_workers_that_nobody_refers_to_end(marked):
  workers = Workers(HOSTILE)
  assert hostile.begin(workers, ['1']).result() == [1.0] and marked()
  del workers
  assert hostile.until(lambda: not marked())
