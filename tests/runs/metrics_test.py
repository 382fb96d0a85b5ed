"""Records of steps, and files of them that a kill or a disk has spoilt."""

import functools
import math
import os
import resource

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import metrics
from tests.runs.samples_test import sample

FILES = 'metrics.jsonl', 'timings.jsonl', 'samples.jsonl'


def write_steps(folder, steps, resume_step=None):
  with (
    runs.MetricsWriter(folder, resume_step) as writer,
    runs.SampleLog(folder, resume_step) as samples,
  ):
    for step in steps:
      writer.write(step, {'reward': step / 7, 'n': step}, {'step_time': 0.1})
      samples.write([sample(step, f'{step}a'), sample(step, f'{step}b')])


def write_lines(path, lines):
  path.write_bytes(b''.join(line + b'\n' for line in lines))


def steps_to(last):
  return [b'{"step": %d}' % step for step in range(1, last + 1)]


def test_every_record_is_on_the_disk_after_a_sync(tmp_path, monkeypatch):
  synced, fsync = set(), os.fsync

  def watched(descriptor):
    fsync(descriptor)
    synced.add(os.fstat(descriptor).st_ino)

  monkeypatch.setattr(os, 'fsync', watched)
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'reward': 0.5}, {'step_time': 0.1})
    writer.sync()
    for name in FILES[:2]:
      assert (tmp_path / name).stat().st_ino in synced, name


def test_one_line_per_step_in_full_precision(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  written = [
    '{"step": 1, "b": 0.1, "a": 0.10000000149011612, "n": 3}',
    '{"step": 2, "b": "nan", "a": "-inf", "n": 1152921504606846976}',
  ]
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'b': 0.1, 'a': np.float32(0.1), 'n': jnp.int32(3)})
    assert path.read_text().splitlines() == written[:1]
    writer.write(
      2, {'b': jnp.float32(jnp.nan), 'a': -math.inf, 'n': np.int64(2**60)}
    )
    for step in (2, 1):
      with pytest.raises(ValueError, match='does not follow step 2'):
        writer.write(step, {})
    for value in (np.zeros(1), None, '0.5', 1j):
      with pytest.raises(ValueError, match='metric reward'):
        writer.write(3, {'reward': value})
  assert path.read_text().splitlines() == written
  record = runs.read_metrics(path)[1]
  assert math.isnan(record['b']) and record['a'] == -math.inf


@pytest.mark.parametrize('broken', [b'', b'{"step": 9, "rew', b'\x00' * 40])
def test_resumed_files_equal_uninterrupted_ones(tmp_path, broken):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  whole.mkdir()
  killed.mkdir()
  write_steps(whole, range(1, 13))
  write_steps(killed, range(1, 9))
  for name in FILES:
    with open(killed / name, 'ab') as file:
      file.write(broken)
  write_steps(killed, range(6, 13), resume_step=5)
  for name in FILES:
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
  # Without a checkpoint, all records go.
  write_steps(killed, [1])
  assert [r['step'] for r in runs.read_metrics(killed / FILES[0])] == [1]


def changed(number, line):
  return [*steps_to(number - 1), line, *steps_to(20)[number:]]


@pytest.mark.parametrize(
  'lines, text',
  [
    (None, ' has no record, but .* step 20'),
    ([], ' has no record'),
    (steps_to(19), ' ends at step 19'),
    (changed(12, b'{"st'), ', line 12: not a record'),
    # A flipped bit makes the '1' of step 12 a '5'.
    (changed(12, b'{"step": 52}'), ', line 12: has step 52, not step 12'),
    (changed(12, b'{"step": 20}'), ', line 12: has step 20, not step 12'),
    (steps_to(20)[3:], ', line 1: has step 4, not step 1'),
    (steps_to(5) + steps_to(20)[4:], ', line 6: has step 5, not step 6'),
  ],
)
def test_missing_and_broken_records_are_named(lines, text, tmp_path):
  path, before = tmp_path / 'metrics.jsonl', None
  if lines is not None:
    write_lines(path, lines)
    before = path.read_bytes()
  with pytest.raises(UserError, match=f'metrics.jsonl{text}') as error:
    runs.MetricsWriter(tmp_path, resume_step=20)
  assert len(str(error.value).splitlines()) <= 3
  assert before is None or path.read_bytes() == before


def test_records_may_begin_at_0_and_end_in_part(tmp_path):
  path = tmp_path / 'm.jsonl'
  write_lines(path, [b'{"step": 0}', *steps_to(20)])
  metrics.cut(path, 20, complete=True)
  assert path.read_bytes().count(b'\n') == 21
  # Only the line's end is missing: a record may be too short.
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='ends at step 19'):
    metrics.cut(path, 20, complete=True)


@pytest.mark.parametrize('complete', [True, False])
def test_what_is_broken_behind_the_checkpoint_goes(complete, tmp_path):
  """As a power cut leaves it: blocks of zeros, and what came after them."""
  path = tmp_path / 'm.jsonl'
  rest = [b'\0' * 40 + b'{"step": 21}', b'{"step": 22}', b'{"st', b'[]']
  write_lines(path, steps_to(20) + rest)
  metrics.cut(path, 20, complete=complete)
  assert path.read_bytes().splitlines() == steps_to(20)


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


def test_a_full_disk_is_said(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='full cannot be written: No space left'):
    metrics.RecordFile('/dev/full').write({'step': 1})
  file, size = metrics.RecordFile(tmp_path / 'm'), resource.RLIMIT_FSIZE
  before = resource.getrlimit(size)
  resource.setrlimit(size, (9, before[1]))
  try:
    with pytest.raises(
      UserError, match='m cannot be written: the disk is full'
    ):
      file.write({'step': 1})  # its beginning is written
  finally:
    resource.setrlimit(size, before)
  opener = 'tensorboardX.record_writer.open_file'
  full = functools.partial(open, '/dev/full', 'wb')
  monkeypatch.setattr(opener, lambda path: full())
  with (
    pytest.raises(UserError, match='tb cannot be written: No space left'),
    runs.MetricsWriter(tmp_path) as writer,
  ):
    for step in range(1000):
      writer.write(step, {'reward': 0.5})
