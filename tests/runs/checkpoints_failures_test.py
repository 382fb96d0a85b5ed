"""Checkpoints under damage, kills, full disks and passing faults.

Never silently wrong; a sound checkpoint is not lost.
"""

import errno
import os
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import pytest
from trees import assert_same

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import checkpoints as checkpoints_module
from jaxrl_llm.runs import orbax_io
from jaxrl_llm.runs.checkpoints import Checkpoints
from tests.runs.checkpoints_test import (
  META,
  abstract,
  lines,
  make_state,
  manifest_of,
  names,
  save_steps,
  start_script,
)


@pytest.fixture(autouse=True)
def no_aftermath(monkeypatch):
  monkeypatch.setattr(checkpoints_module, '_AFTERMATH', 0.0)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sound')
  save_steps(folder, [1, 2])
  return folder


@pytest.fixture
def sound(tmp_path, saved):
  """A folder with the steps 1 and 2."""
  return shutil.copytree(saved, tmp_path / 'c')


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
def test_damage_is_never_silently_wrong(tmp_path, caplog, saved, kind, count):
  """Damage to every file of a step; those that hold the arrays are found."""
  rng, bad = random.Random(0), tmp_path / 'bad'
  files = [path for path in (saved / '00000002').rglob('*') if path.is_file()]
  assert sum(is_read(path) for path in files) >= 3
  for path in [path for path in sorted(files) if path.stat().st_size] * count:
    shutil.copytree(saved, bad)
    damage(bad / path.relative_to(saved), kind, rng)
    caplog.clear()
    step = restored_right(bad)
    assert step == 1 or not is_read(path) or kind == 'flip anywhere', path
    if step == 1:
      (warning,) = [x for x in caplog.messages if 'Checkpoint' in x]
      assert warning.startswith('Checkpoint step 2 does not verify (')
      assert warning.endswith('using step 1.')
    shutil.rmtree(bad)


def test_the_manifest_of_another_step_does_not_verify(sound, caplog):
  shutil.copyfile(manifest_of(sound, 1), manifest_of(sound, 2))
  assert restored_right(sound) == 1
  assert 'its manifest: ValueError: it has changed' in caplog.text


def test_a_broken_step_goes_when_a_later_save_is_complete(sound):
  manifest_of(sound, 2).write_text('{}')
  with Checkpoints(sound, keep_latest=1) as checkpoints:
    assert checkpoints.restore(make_state(0))[0] == 1
    assert names(sound) == ['00000001', '00000002']
    checkpoints.save(3, make_state(3), META)
    checkpoints.wait()
    assert names(sound) == ['00000003']
    manifest_of(sound, 3).write_text('')
    with pytest.raises(UserError, match='verifies.\nstep 3 does') as error:
      checkpoints.restore(make_state(0))
    assert len(lines(error)) == 3 and names(sound) == ['00000003']


@pytest.mark.parametrize('step, newest', [(2, 1), (3, 3)])
def test_a_removal_that_is_killed_leaves_no_step_in_part(
  monkeypatch, sound, step, newest
):
  """Before step 2 is saved again, and after step 3 is complete."""
  checkpoints = Checkpoints(sound, keep_latest=1)

  def dies(path):
    for part in list(pathlib.Path(path).rglob('d/*')):
      part.unlink()
    raise KeyboardInterrupt  # Like SIGKILL, nothing catches it on its way.

  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'rmtree', dies)
    with pytest.raises(KeyboardInterrupt):
      checkpoints.save(step, make_state(step), {**META, 'step': step})
      checkpoints.wait()
  assert restored_right(sound) == newest
  assert names(sound) == [f'{newest:08d}']


# A limit on the size of files stands in for a full disk: the write of the data
# fails in Orbax's own thread, and small files can still be written.
FULL = """
import os, resource, sys, time
import jax
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
except UserError as error:
  print(error)
  print(os.listdir(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
checkpoints.save(3, x, {})
checkpoints.wait()
print(checkpoints.steps(), checkpoints.restore(x)[0])
"""


def test_a_failed_write_is_reported_and_leaves_nothing(tmp_path):
  process = start_script(FULL, tmp_path)
  out, err = process.communicate(timeout=100)
  assert (process.returncode, err) == (0, '')
  out = out.splitlines()
  assert len(out) == 5, out
  assert 'Saving checkpoint step 2' in out[0]
  assert 'too large' in out[1].lower()
  assert 'Steps kept: [1].' in out[2]
  assert out[3:] == ["['00000001']", '[1, 3] 3']


@pytest.mark.parametrize('folder, size', [('absent/c', 2), ('', 0)])
def test_a_save_that_cannot_begin_is_reported_at_once(tmp_path, folder, size):
  """A folder that was removed is not made again; Orbax refuses size 0."""
  checkpoints = Checkpoints(tmp_path / folder)
  with pytest.raises(UserError, match='Saving checkpoint step 1') as error:
    checkpoints.save(1, {'x': jnp.zeros(size)}, {})
  assert len(lines(error)) == 3 and names(tmp_path) == []


@pytest.mark.parametrize('name', ['load_manifest', 'load_state', 'describe'])
@pytest.mark.parametrize(
  'error',
  [
    MemoryError('no room'),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'),
    ValueError('UNKNOWN: Error reading "d/1": Input/output error'),
    PermissionError(errno.EACCES, 'Permission denied'),
  ],
  ids=repr,
)
def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(
  monkeypatch, sound, name, error
):
  def fails(*arguments):
    raise RuntimeError('wrapped') from error

  module = checkpoints_module if name == 'describe' else orbax_io
  with Checkpoints(sound) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(module, name, fails)
      text = 'step 2 in .* could not be read'
      with pytest.raises(UserError, match=text) as caught:
        checkpoints.restore(make_state(0))
    assert len(lines(caught)) == 3 and str(error.args[-1]) in str(caught.value)
    assert checkpoints.restore(make_state(0))[0] == 2


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


def test_only_remains_are_cleared(tmp_path, monkeypatch, caplog):
  theirs = ['00000001_mine.broken', 'notes.orbax-checkpoint-tmp', 'old.broken']
  for name in [*theirs, '00000005.orbax-checkpoint-tmp-1', '00000006.broken']:
    (tmp_path / name).mkdir()

  def refuse(path):
    raise OSError(errno.ENOTEMPTY, 'Directory not empty')

  with monkeypatch.context() as patch:
    # As on NFS, where a file that somebody holds open gets another name.
    patch.setattr(shutil, 'rmtree', refuse)
    save_steps(tmp_path, [1])
    assert '00000005.orbax-checkpoint-tmp-1: [Errno' in caplog.text
  save_steps(tmp_path, [2], keep_latest=1)
  assert names(tmp_path) == sorted([*theirs, '00000002'])
