"""Training on a full disk: reported within a step, fixed by free space."""

import functools
import subprocess

import faults
import pytest
import scripts

# Phase in which the disk is full, records written before, bytes that are left.
# The file system allocates pages of 4 KiB.
MOMENTS = [
  ('warm start', 3, 0),
  *(('rollout', scripts.WARM + 3, left) for left in (0, 4096)),
  *(('save', scripts.WARM + 3, left) for left in (0, 16384, 65536)),
  *((phase, scripts.WARM + 8, 0) for phase in ('evaluation', 'record')),
  *(('export', scripts.TOTAL, left) for left in (0, 16384)),
]


@pytest.fixture
def disk(tmp_path):
  """A small file system of its own."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(folder)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('cannot mount a file system here')
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)


def message_of(ended) -> str:
  """Returns the message of a run that ended with status 2, in three lines."""
  assert ended.code == 2, ended
  # TensorStore prints errors of writes that end after Orbax has given up.
  late = ended.err.count('RuntimeError: Event loop is closed')
  assert ended.err.count('Traceback') == late, ended.err
  # JAX may warn of a program in the cache that the full disk cut short.
  message = ended.err[('\n' + ended.err).rindex('\nerror: ') :]
  assert len(message.splitlines()) <= 3, message
  return message


@pytest.mark.slow
@pytest.mark.parametrize('phase, after, left', MOMENTS)
def test_a_full_disk_is_reported_and_free_space_fixes_it(
  phase, after, left, disk, tmp_path
):
  workdir = disk / 'run'
  config = scripts.write_config(tmp_path / 'config')
  start = functools.partial(scripts.train, workdir, config)
  fault = functools.partial(faults.fill_disk, left, phase, str(workdir), after)
  message = message_of(start(before=fault).wait(120))
  assert 'No space left on device' in message or 'disk is full' in message
  assert str(workdir) in message
  # To the next checkpoint at most.
  assert after <= scripts.steps_written(workdir) <= after + scripts.EVERY + 1
  assert not list(workdir.rglob('*tmp*'))
  # It reports the same until there is room, and loses nothing.
  message_of(start().wait(120))
  (workdir / 'ballast').unlink()
  ended = start().wait()
  assert ended.code == 0, ended.err
  scripts.assert_same_run(workdir)
