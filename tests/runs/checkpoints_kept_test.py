"""A checkpoint that is sound is not lost: to a kill, or to a passing fault."""

import errno
import os
import stat

import jax
import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1 as ocp

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import leftovers, orbax_io
from jaxrl_llm.runs.checkpoints import Checkpoints
from tests.runs.checkpoints_failures_test import restored_right
from tests.runs.checkpoints_test import (
  META,
  assert_same,
  lines,
  make_state,
  save_steps,
)


def replace_and_die(folder, monkeypatch, error):
  """Begins to save step 1 anew; `error` ends it before it is committed."""

  def dies(*args, **kwargs):
    raise error

  checkpoints = Checkpoints(folder, keep_latest=1)
  monkeypatch.setattr(ocp, 'save_checkpointables_async', dies)
  with pytest.raises((KeyboardInterrupt, UserError)) as caught:
    checkpoints.save(1, make_state(5), META)
  monkeypatch.undo()
  return caught


def test_a_kill_while_a_step_is_replaced_keeps_the_old_one(
  tmp_path, monkeypatch
):
  save_steps(tmp_path, [1], keep_latest=1)
  # Like SIGKILL, this is caught by nothing on its way.
  replace_and_die(tmp_path, monkeypatch, KeyboardInterrupt())
  assert os.listdir(tmp_path) == ['00000001.replaced']
  reader = Checkpoints(tmp_path, keep_latest=1, read_only=True)
  assert reader.steps() == [1]
  assert_same(reader.restore(make_state(0))[1], make_state(1))
  assert os.listdir(tmp_path) == ['00000001.replaced']
  assert restored_right(tmp_path) == 1
  assert os.listdir(tmp_path) == ['00000001']


def test_a_failed_replacement_puts_the_old_one_back(tmp_path, monkeypatch):
  save_steps(tmp_path, [1], keep_latest=1)
  error = OSError(errno.ENOSPC, 'No space left on device')
  caught = replace_and_die(tmp_path, monkeypatch, error)
  assert 'Steps kept: [1].' in str(caught.value)
  assert os.listdir(tmp_path) == ['00000001']
  assert restored_right(tmp_path) == 1


def test_a_kill_after_a_replacement_keeps_the_new_one(tmp_path):
  save_steps(tmp_path / 'old', [1])
  with Checkpoints(tmp_path / 'new', keep_latest=1) as checkpoints:
    for seed in (1, 5):
      checkpoints.save(1, make_state(seed), META)
    checkpoints.wait()
    assert os.listdir(tmp_path / 'new') == ['00000001']
  replaced = tmp_path / 'new' / '00000001.replaced'
  (tmp_path / 'old' / '00000001').rename(replaced)
  for read_only in (True, False):
    checkpoints = Checkpoints(tmp_path / 'new', read_only=read_only)
    assert checkpoints.steps() == [1]
    assert_same(checkpoints.restore(make_state(0))[1], make_state(5))
    assert replaced.exists() == read_only


def test_a_replaced_step_goes_when_it_is_old(tmp_path):
  save_steps(tmp_path, [1], keep_latest=1)
  checkpoints = Checkpoints(tmp_path, keep_latest=1)
  (tmp_path / '00000001').rename(tmp_path / '00000001.replaced')
  checkpoints.save(2, make_state(2), META)
  checkpoints.wait()
  assert os.listdir(tmp_path) == ['00000002']


OBSTACLES = [
  MemoryError('no room'),
  jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'),
  ValueError('PERMISSION_DENIED: Error opening "zarr3" driver'),
  ValueError('UNKNOWN: Error reading "d/1": Input/output error'),
  OSError(errno.EMFILE, 'Too many open files'),
  PermissionError(errno.EACCES, 'Permission denied'),
  OSError(errno.EIO, 'Input/output error'),
]


@pytest.mark.parametrize('part', ['manifest', 'state'])
@pytest.mark.parametrize('error', OBSTACLES, ids=repr)
def test_what_could_not_be_read_is_not_set_aside(
  tmp_path, monkeypatch, part, error
):
  save_steps(tmp_path, [1, 2])
  name = f'load_{part}'
  load = getattr(orbax_io, name)

  def fails(path, *arguments):
    if path.name == '00000002':
      raise RuntimeError('wrapped') from error
    return load(path, *arguments)

  with Checkpoints(tmp_path) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(orbax_io, name, fails)
      text = 'step 2 in .* could not be read'
      with pytest.raises(UserError, match=text) as caught:
        checkpoints.restore(make_state(0))
    assert len(lines(caught)) == 3 and str(error.args[-1]) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ['00000001', '00000002']
    assert checkpoints.restore(make_state(0))[0] == 2


def test_a_missing_file_is_damage(tmp_path, monkeypatch):
  save_steps(tmp_path, [1, 2])
  load = ocp.load_checkpointables

  def fails(path, items):
    if 'state' in items and path.name == '00000002':
      raise FileNotFoundError(errno.ENOENT, 'No such file or directory')
    return load(path, items)

  monkeypatch.setattr(ocp, 'load_checkpointables', fails)
  assert restored_right(tmp_path) == 1


def test_a_metric_that_could_not_be_read_costs_no_checkpoint(
  tmp_path, monkeypatch, caplog
):
  state = {'x': jnp.zeros(2)}
  with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
    for step, metric in ((1, 0.9), (2, 0.1), (3, 0.2)):
      checkpoints.save(step, state, {}, metric=metric)
  load = orbax_io.load_manifest

  def fails(path):
    if path.name == '00000001':
      raise OSError(errno.EMFILE, 'Too many open files')
    return load(path)

  checkpoints = Checkpoints(tmp_path, keep_latest=1)
  with monkeypatch.context() as patch:
    patch.setattr(orbax_io, 'load_manifest', fails)
    checkpoints.save(4, state, {}, metric=0.3)
    checkpoints.wait()
  assert 'Could not remove an old checkpoint' in caplog.text
  assert checkpoints.best_step() == 1
  checkpoints.save(5, state, {}, metric=0.3)
  checkpoints.wait()
  assert checkpoints.steps() == [1, 5]


def test_a_step_is_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
  sync, discard, done = os.fsync, leftovers.discard, []

  def place(status):
    return status.st_dev, status.st_ino

  def synced(descriptor):
    sync(descriptor)
    done.append(place(os.fstat(descriptor)))

  def discarded(path):
    if path.exists():
      step = tmp_path / '00000002'
      parts = [tmp_path, step, *step.rglob('*')]
      assert len(parts) > 8
      missing = [part for part in parts if place(part.stat()) not in done]
      assert not missing
      done.append(path.name)
    discard(path)

  with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
    checkpoints.save(1, make_state(1), META)
    checkpoints.wait()
    monkeypatch.setattr(os, 'fsync', synced)
    monkeypatch.setattr(leftovers, 'discard', discarded)
    checkpoints.save(2, make_state(2), META)
    checkpoints.wait()
  assert done[-1] == '00000001'


@pytest.mark.parametrize('number', [errno.EINVAL, errno.EIO])
def test_folders_that_are_not_synced(number, tmp_path, monkeypatch):
  """A file system may refuse; what it fails at may be lost."""
  sync = os.fsync

  def fails(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
      raise OSError(number, os.strerror(number))
    sync(descriptor)

  checkpoints = Checkpoints(tmp_path, keep_latest=1)
  checkpoints.save(1, make_state(1), META)
  checkpoints.wait()
  monkeypatch.setattr(os, 'fsync', fails)
  checkpoints.save(2, make_state(2), META)
  if number == errno.EINVAL:
    checkpoints.wait()
    assert os.listdir(tmp_path) == ['00000002']
  else:
    with pytest.raises(UserError, match='Saving checkpoint step 2'):
      checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ['00000001', '00000002']


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints')
  with pytest.raises(UserError, match='No such file or directory'):
    checkpoints.save(1, make_state(1), META)
  assert os.listdir(tmp_path) == []
