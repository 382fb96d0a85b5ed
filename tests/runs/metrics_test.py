"""Records of steps, and files of them that a kill or a disk has spoilt."""

import functools
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import metrics
from tests.runs.samples_test import sample


def write_steps(folder, steps, resume_step=None):
  with (
    runs.MetricsWriter(folder, resume_step) as writer,
    runs.SampleLog(folder, resume_step) as samples,
  ):
    for step in steps:
      writer.write(step, {'reward': step / 7, 'n': step}, {'step_time': 0.1})
      samples.write([sample(step, f'{step}a'), sample(step, f'{step}b')])
    writer.sync()
    samples.sync()


FILES = ('metrics.jsonl', 'timings.jsonl', 'samples.jsonl')


def contents(folder):
  return [(folder / name).read_bytes() for name in FILES]


def test_one_line_per_step_in_full_precision(tmp_path):
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'b': 0.1, 'a': np.float32(0.1), 'n': jnp.int32(3)})
    writer.write(2, {'b': 1e-300, 'a': True, 'n': np.int64(2**60)})
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert lines == [
    '{"step": 1, "b": 0.1, "a": 0.10000000149011612, "n": 3}',
    '{"step": 2, "b": 1e-300, "a": 1, "n": 1152921504606846976}',
  ]
  assert (tmp_path / 'timings.jsonl').read_bytes() == b''


def test_nan_is_kept_and_valid_json(tmp_path):
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(
      1, {'a': jnp.float32(jnp.nan), 'b': math.inf, 'c': -np.inf, 'd': 1.0}
    )
  text = (tmp_path / 'metrics.jsonl').read_text()

  def refuse(name):
    raise AssertionError(name)

  record = json.loads(text, parse_constant=refuse)
  assert record == {'step': 1, 'a': 'nan', 'b': 'inf', 'c': '-inf', 'd': 1.0}
  (record,) = runs.read_metrics(tmp_path / 'metrics.jsonl')
  assert math.isnan(record['a'])
  assert (record['b'], record['c'], record['d']) == (math.inf, -math.inf, 1)


@pytest.mark.parametrize('value', [np.zeros(2), np.zeros(1), None, '0.5', 1j])
def test_what_is_no_number_is_named(tmp_path, value):
  with runs.MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match='metric reward'):
      writer.write(1, {'reward': value})
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b''


def test_steps_ascend(tmp_path):
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(3, {})
    for step in (3, 2):
      with pytest.raises(ValueError, match='does not follow step 3'):
        writer.write(step, {})


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'a': 1})
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 1, "a": 1}\n'


@pytest.mark.parametrize('broken', [b'', b'{"step": 9, "rew', b'\x00' * 40])
def test_resumed_files_equal_uninterrupted_ones(tmp_path, broken):
  for name in ('whole', 'killed'):
    (tmp_path / name).mkdir()
  write_steps(tmp_path / 'whole', range(1, 13))
  write_steps(tmp_path / 'killed', range(1, 9))
  for name in FILES:
    with open(tmp_path / 'killed' / name, 'ab') as file:
      file.write(broken)
  write_steps(tmp_path / 'killed', range(6, 13), resume_step=5)
  assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')
  assert not list(tmp_path.rglob('*.tmp'))


def test_a_last_line_without_its_end_is_cut(tmp_path):
  # All of the record is there but the line's end: a record may be too short.
  write_steps(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='ends at step 1, but .* step 2'):
    runs.MetricsWriter(tmp_path, resume_step=2)


@pytest.mark.parametrize('kept', [None, b'', b'{"step": 1}\n{"step": 2}\n'])
def test_missing_records_are_named(tmp_path, kept):
  if kept is not None:
    (tmp_path / 'metrics.jsonl').write_bytes(kept)
  with pytest.raises(UserError, match='metrics.jsonl .* step 3') as error:
    runs.MetricsWriter(tmp_path, resume_step=3)
  assert len(str(error.value).splitlines()) <= 3
  # Resuming at the very start needs no record.
  runs.MetricsWriter(tmp_path, resume_step=0).close()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match='metrics.jsonl, line 2'):
    runs.MetricsWriter(tmp_path, resume_step=3)
  with pytest.raises(UserError, match='metrics.jsonl, line 2'):
    runs.read_metrics(path)
  assert path.read_bytes().count(b'\n') == 3


def test_without_a_checkpoint_all_records_go(tmp_path):
  write_steps(tmp_path, [1, 2])
  write_steps(tmp_path, [1])
  assert [r['step'] for r in runs.read_metrics(tmp_path / FILES[0])] == [1]


def test_tensorboard_holds_the_scalars(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  write_steps(tmp_path, [1, 2])
  (path,) = (tmp_path / 'tb').iterdir()
  content, found = path.read_bytes(), {}
  while content:
    # A TFRecord: length, its checksum, the event, its checksum.
    size = int.from_bytes(content[:8], 'little')
    event = Event.FromString(content[12 : 12 + size])
    content = content[16 + size :]
    for value in event.summary.value:
      found[value.tag, event.step] = value.simple_value
  assert found['reward', 2] == pytest.approx(2 / 7)
  assert found['timings/step_time', 1] == pytest.approx(0.1)
  assert {tag for tag, _ in found} == {'reward', 'n', 'timings/step_time'}


def test_a_full_disk_is_said(tmp_path):
  script = """
import resource, sys
from jaxrl_llm.runs.metrics import RecordFile
file = RecordFile(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (50, -1))
for step in range(9):
  try:
    file.write({'step': step})
  except Exception as error:
    print(type(error).__name__, error)
    break
"""
  path = tmp_path / 'm.jsonl'
  result = subprocess.run(
    [sys.executable, '-c', script, path], capture_output=True, text=True
  )
  assert 'UserError' in result.stdout and 'm.jsonl cannot be' in result.stdout
  assert result.stdout.count('\n') <= 3
  # What is whole can be resumed.
  metrics.cut(path, 2)
  assert [r['step'] for r in metrics.read_records(path)] == [0, 1, 2]


def test_a_full_disk_under_tensorboard_is_said(tmp_path, monkeypatch):
  full = functools.partial(open, '/dev/full', 'wb')
  opener = 'tensorboardX.record_writer.open_file'
  monkeypatch.setattr(opener, lambda path: full())
  with (
    pytest.raises(UserError, match='tb cannot be written: No space left'),
    runs.MetricsWriter(tmp_path) as writer,
  ):
    for step in range(1000):
      writer.write(step, {'reward': 0.5})


def test_import_is_light():
  script = """
import sys
import jaxrl_llm.runs, jaxrl_llm.runs.folder
heavy = {'matplotlib', 'rich', 'tensorboardX', 'tqdm', 'transformers'}
print(sorted(heavy & set(sys.modules)))
"""
  result = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True
  )
  assert result.stdout == '[]\n', result.stderr


def write_lines(path, lines):
  path.write_bytes(b''.join(line + b'\n' for line in lines))


@pytest.mark.parametrize(
  'change, text',
  [
    # A flipped bit makes the '1' of step 12 a '5'.
    (
      lambda lines: [*lines[:11], b'{"step": 52}', *lines[12:]],
      '52, not .* 12',
    ),
    (lambda lines: [*lines[:11], b'{"step": 2}', *lines[12:]], '2, not .* 12'),
    (
      lambda lines: [*lines[:11], b'{"step": 20}', *lines[12:]],
      '20, not .* 12',
    ),
    (lambda lines: lines[:5] + lines[9:], '10, not step 6'),
    (lambda lines: lines[3:], '4, not step 1'),
    (lambda lines: lines[:5] + lines[4:], '5, not step 6'),
  ],
)
def test_the_first_gap_in_the_records_is_named(change, text, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  lines = [b'{"step": %d}' % step for step in range(1, 21)]
  write_lines(path, change(lines))
  before = path.read_bytes()
  with pytest.raises(
    UserError, match=f'metrics.jsonl, line .* {text}'
  ) as error:
    metrics.cut(path, 20, complete=True)
  assert len(str(error.value).splitlines()) == 2
  assert path.read_bytes() == before
  # A run without a warm start has a record of its beginning.
  for whole in (lines, [b'{"step": 0}', *lines]):
    write_lines(path, whole)
    metrics.cut(path, 20, complete=True)
    assert path.read_bytes().count(b'\n') == len(whole)


@pytest.mark.parametrize('complete', [True, False])
def test_what_is_broken_behind_the_checkpoint_goes(complete, tmp_path):
  """As a power cut leaves it: blocks of zeros, and what came after them."""
  path = tmp_path / 'm.jsonl'
  lines = [b'{"step": %d}' % step for step in range(1, 21)]
  rest = [b'\0' * 40 + b'{"step": 21}', b'{"step": 22}', b'{"st', b'[]']
  write_lines(path, lines + rest)
  metrics.cut(path, 20, complete=complete)
  assert path.read_bytes().splitlines() == lines
