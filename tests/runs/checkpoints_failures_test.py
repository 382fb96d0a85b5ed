"""Checkpoints under damage, kills, full disks and passing faults.

Never silently wrong; a sound checkpoint is not lost.
"""

import errno
import json
import os
import pathlib
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import checkpoints as checkpoints_module
from jaxrl_llm.runs import orbax_io
from jaxrl_llm.runs.checkpoints import Checkpoints
from tests.runs.checkpoints_test import (
  META,
  abstract,
  assert_same,
  lines,
  make_state,
  manifest_of,
  names,
  run_script,
  save_steps,
)

STATE = {'x': jnp.zeros(2)}


@pytest.fixture(autouse=True)
def no_aftermath(monkeypatch):
  monkeypatch.setattr(checkpoints_module, '_AFTERMATH', 0.0)


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
  """A folder with the steps 1 and 2."""
  folder = tmp_path_factory.mktemp('sound')
  save_steps(folder, [1, 2])
  return folder


def damage(path, kind, rng):
  content = bytearray(path.read_bytes())
  if kind == 'delete':
    path.unlink()
  elif kind.startswith('flip'):
    # The last fifth of what a process has written is an index of its own,
    # which is not read once those of all processes are merged.
    skipped = kind == 'flip' and 'ocdbt.process_0' in path.parts
    bit = rng.randrange(8 * len(content) * (3 if skipped else 4) // 4)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
  else:
    path.write_bytes(content[: {'empty': 0, 'cut': len(content) // 2}[kind]])


def is_read(path):
  """Returns True if a restore has to read this file of a step."""
  if path.suffix == '.ocdbt':
    return path.parent.name == 'state'
  return path.parent.name in ('d', 'manifest')


def restored_right(folder):
  """Restores the newest step or the one before, bit for bit."""
  with Checkpoints(folder) as checkpoints:
    step, state, metadata = checkpoints.restore(abstract(make_state(0)))
  assert metadata == {**META, 'step': step}
  assert_same(state, make_state(step))
  return step


@pytest.mark.parametrize(
  'kind, count',
  [
    *(('delete', 1), ('empty', 1), ('cut', 1), ('flip', 3)),
    pytest.param('flip', 16, marks=pytest.mark.slow),
    pytest.param('flip anywhere', 16, marks=pytest.mark.slow),
  ],
)
def test_damage_is_never_silently_wrong(tmp_path, caplog, sound, kind, count):
  """Damage to every file of a step; those that hold the arrays are found."""
  rng = random.Random(0)
  files = [path for path in (sound / '00000002').rglob('*') if path.is_file()]
  assert sum(is_read(path) for path in files) >= 3
  for path in [path for path in sorted(files) if path.stat().st_size] * count:
    shutil.copytree(sound, tmp_path / 'bad')
    damage(tmp_path / 'bad' / path.relative_to(sound), kind, rng)
    caplog.clear()
    step = restored_right(tmp_path / 'bad')
    assert step == 1 or not is_read(path) or kind == 'flip anywhere', path
    if step == 1:
      (warning,) = [x for x in caplog.messages if 'Checkpoint' in x]
      assert warning.startswith('Checkpoint step 2 does not verify (')
      assert warning.endswith('using step 1.')
    shutil.rmtree(tmp_path / 'bad')


@pytest.mark.parametrize('change', ['cursor', 'metric', 'leaf', 'step', 'all'])
def test_an_edited_manifest_does_not_verify(tmp_path, caplog, sound, change):
  folder = shutil.copytree(sound, tmp_path / 'c')
  manifest = json.loads(manifest_of(folder, 2).read_text())
  if change == 'cursor':
    manifest['metadata']['cursor'] += 1
  elif change == 'leaf':
    del manifest['leaves']['params/head']
  elif change == 'all':  # that of another step
    manifest = json.loads(manifest_of(folder, 1).read_text())
  else:
    manifest[change] = 5
  manifest_of(folder, 2).write_text(json.dumps(manifest))
  assert restored_right(folder) == 1
  assert 'its manifest: ValueError: it has changed' in caplog.text


def test_nothing_left_is_an_error(tmp_path, sound):
  folder = shutil.copytree(sound, tmp_path / 'c')
  shutil.rmtree(folder / '00000001' / 'state')
  manifest_of(folder, 2).write_text('')
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(UserError, match='verifies') as error:
      checkpoints.restore(make_state(0))
    assert 'step 2 does' in str(error.value) and 'step 1 ' in str(error.value)
    assert len(lines(error)) == 3
    assert checkpoints.steps() == [1, 2]


def test_a_broken_step_goes_when_a_later_save_is_complete(tmp_path):
  save_steps(tmp_path, [1, 4])
  manifest_of(tmp_path, 4).write_text('{}')
  with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
    assert checkpoints.restore(make_state(0))[0] == 1
    assert checkpoints.steps() == [1] and checkpoints.best_step() is None
    assert names(tmp_path) == ['00000001', '00000004']
    checkpoints.save(2, make_state(2), META)
    checkpoints.wait()
    assert names(tmp_path) == ['00000002']
    checkpoints.save(4, make_state(4), META)
    checkpoints.wait()
    assert checkpoints.steps() == [4]


KILLED = """
import sys
import jax.numpy as jnp
from jaxrl_llm.runs.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_latest=3)
for step in range(1, 1000):
  x = jnp.full((400_000,), step, jnp.float32) + jnp.arange(400_000)
  checkpoints.save(step, {'x': x}, {'step': step})
  print(step, flush=True)
"""


@pytest.mark.parametrize('seed', range(3))
def test_a_killed_save_leaves_a_sound_folder(tmp_path, seed):
  process = subprocess.Popen(
    [sys.executable, '-c', KILLED, tmp_path],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  for _ in range(4):
    printed = int(process.stdout.readline())
  time.sleep(random.Random(seed).uniform(0, 0.15))
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  checkpoints = Checkpoints(tmp_path)
  assert all(name.isdigit() for name in names(tmp_path)), names(tmp_path)
  step, state, metadata = checkpoints.restore({'x': jnp.zeros(400_000)})
  assert step >= printed - 1 and metadata == {'step': step}
  expected = np.float32(step) + np.arange(400_000, dtype=np.float32)
  np.testing.assert_array_equal(state['x'], expected)


@pytest.mark.parametrize('step, newest', [(2, 1), (3, 3)])
def test_a_removal_that_is_killed_leaves_no_step_in_part(
  tmp_path, monkeypatch, sound, step, newest
):
  """Before step 2 is saved again, and after step 3 is complete."""
  folder = shutil.copytree(sound, tmp_path / 'c')
  checkpoints = Checkpoints(folder, keep_latest=1)

  def dies(path):
    for part in list(pathlib.Path(path).rglob('d/*')):
      part.unlink()
    raise KeyboardInterrupt  # Like SIGKILL, nothing catches it on its way.

  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'rmtree', dies)
    with pytest.raises(KeyboardInterrupt):
      checkpoints.save(step, make_state(step), {**META, 'step': step})
      checkpoints.wait()
  assert restored_right(folder) == newest
  assert names(folder) == [f'{newest:08d}']


# A limit on the size of files stands in for a full disk: the write of the data
# fails in Orbax's own thread, and small files can still be written.
FULL = """
import os, resource, sys, time
import jax, jax.numpy as jnp
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.errors import UserError
x = {'x': jax.random.normal(jax.random.key(0), (100_000,))}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, x, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
checkpoints.save(2, x, {})
try:
  for _ in range(100):
    time.sleep(0.1)
    checkpoints.poll()
  print('no error')
except UserError as error:
  print(error)
  print(os.listdir(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
checkpoints.save(3, x, {})
checkpoints.wait()
print(checkpoints.steps(), checkpoints.restore(x)[0])
"""


def test_a_failed_write_is_reported_and_leaves_nothing(tmp_path):
  result = run_script(FULL, tmp_path)
  assert (result.returncode, result.stderr) == (0, '')
  out = result.stdout.splitlines()
  assert len(out) == 5, result.stdout
  assert 'Saving checkpoint step 2' in out[0]
  assert 'too large' in out[1].lower()
  assert 'Steps kept: [1].' in out[2]
  assert out[3:] == ["['00000001']", '[1, 3] 3']
  assert names(tmp_path) == ['00000001', '00000003']


@pytest.mark.parametrize(
  'folder, size', [('file/c', 2), ('absent/c', 2), ('', 0)]
)
def test_a_save_that_cannot_begin_is_reported_at_once(tmp_path, folder, size):
  """A folder that was removed is not made again; Orbax refuses size 0."""
  (tmp_path / 'file').write_text('')
  checkpoints = Checkpoints(tmp_path / folder)
  threads = threading.active_count()
  with pytest.raises(UserError, match='Saving checkpoint step 1') as error:
    checkpoints.save(1, {'x': jnp.zeros(size)}, {})
  assert len(lines(error)) == 3
  assert threading.active_count() <= threads
  assert names(tmp_path) == ['file']


OBSTACLES = [
  MemoryError('no room'),
  jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'),
  ValueError('PERMISSION_DENIED: Error opening "zarr3" driver'),
  ValueError('UNKNOWN: Error reading "d/1": Input/output error'),
  OSError(errno.EMFILE, 'Too many open files'),
  PermissionError(errno.EACCES, 'Permission denied'),
  OSError(errno.EIO, 'Input/output error'),
]


@pytest.mark.parametrize('name', ['load_manifest', 'load_state', 'describe'])
@pytest.mark.parametrize('error', OBSTACLES, ids=repr)
def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(
  tmp_path, monkeypatch, sound, name, error
):
  folder = shutil.copytree(sound, tmp_path / 'c')

  def fails(*arguments):
    raise RuntimeError('wrapped') from error

  module = checkpoints_module if name == 'describe' else orbax_io
  with Checkpoints(folder) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(module, name, fails)
      text = 'step 2 in .* could not be read'
      with pytest.raises(UserError, match=text) as caught:
        checkpoints.restore(make_state(0))
    assert len(lines(caught)) == 3 and str(error.args[-1]) in str(caught.value)
    assert names(folder) == ['00000001', '00000002']
    assert checkpoints.restore(make_state(0))[0] == 2


def test_a_metric_that_cannot_be_read_costs_no_checkpoint(
  tmp_path, monkeypatch, caplog
):
  with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
    for step, metric in ((1, 0.9), (2, 0.1), (3, 0.2)):
      checkpoints.save(step, STATE, {}, metric=metric)
  load = orbax_io.load_manifest

  def fails(path):
    if path.name == '00000001':
      raise OSError(errno.EMFILE, 'Too many open files')
    return load(path)

  checkpoints = Checkpoints(tmp_path, keep_latest=1)
  with monkeypatch.context() as patch:
    patch.setattr(orbax_io, 'load_manifest', fails)
    checkpoints.save(4, STATE, {}, metric=0.3)
    checkpoints.wait()
    with pytest.raises(UserError, match='Step 1 cannot be read'):
      checkpoints.best_step()
  assert 'Could not remove an old checkpoint' in caplog.text
  assert checkpoints.best_step() == 1
  checkpoints.save(5, STATE, {}, metric=0.3)
  checkpoints.wait()
  assert checkpoints.steps() == [1, 5]


def test_a_step_is_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
  sync, rename, synced = os.fsync, pathlib.Path.rename, []

  def identity(status):
    return status.st_dev, status.st_ino

  def fsync(descriptor):
    sync(descriptor)
    synced.append(identity(os.fstat(descriptor)))

  def checked(path, target):
    if path.name == '00000001':
      step = tmp_path / '00000002'
      parts = [tmp_path, step, *step.rglob('*')]
      assert len(parts) > 8
      assert all(identity(part.stat()) in synced for part in parts)
    return rename(path, target)

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(pathlib.Path, 'rename', checked)
  save_steps(tmp_path, [1, 2], keep_latest=1)
  assert names(tmp_path) == ['00000002']


@pytest.mark.parametrize('number', [errno.EINVAL, errno.EIO])
def test_folders_that_are_not_synced(number, tmp_path, monkeypatch):
  """Some file systems refuse it; after an error the step may be lost."""
  sync = os.fsync

  def fails(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
      raise OSError(number, os.strerror(number))
    sync(descriptor)

  save_steps(tmp_path, [1])
  checkpoints = Checkpoints(tmp_path, keep_latest=1)
  monkeypatch.setattr(os, 'fsync', fails)
  checkpoints.save(2, make_state(2), META)
  if number == errno.EINVAL:
    checkpoints.wait()
    assert names(tmp_path) == ['00000002']
  else:
    with pytest.raises(UserError, match='Saving checkpoint step 2'):
      checkpoints.wait()
    assert names(tmp_path) == ['00000001', '00000002']


def test_only_remains_are_cleared(tmp_path, caplog):
  theirs = ['00000001_mine.broken', 'notes.orbax-checkpoint-tmp', 'old.broken']
  remains = ['00000005.orbax-checkpoint-tmp-1', '00000006.broken']
  for name in theirs + remains:
    (tmp_path / name).mkdir()
  save_steps(tmp_path, [1, 2], keep_latest=1)
  assert names(tmp_path) == sorted([*theirs, '00000002'])
  assert Checkpoints(tmp_path).steps() == [2]
  assert not caplog.records


def test_remains_that_cannot_be_cleared_are_reported(
  tmp_path, monkeypatch, caplog
):
  save_steps(tmp_path, [1])
  (tmp_path / '00000005.orbax-checkpoint-tmp').mkdir()

  def refuse(path):
    raise OSError(errno.ENOTEMPTY, 'Directory not empty')

  with monkeypatch.context() as patch:
    # As on NFS, where a file that somebody holds open gets another name.
    patch.setattr(shutil, 'rmtree', refuse)
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    assert '00000005.orbax-checkpoint-tmp: [Errno' in caplog.text
    checkpoints.save(2, make_state(2), META)
    checkpoints.wait()
    assert checkpoints.steps() == [2] and len(names(tmp_path)) == 3
  Checkpoints(tmp_path)
  assert names(tmp_path) == ['00000002']
