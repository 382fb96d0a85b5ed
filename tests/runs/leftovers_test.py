"""What is no checkpoint in a folder of checkpoints: cleared, or left alone."""

import errno
import os
import pathlib
import shutil

import jax.numpy as jnp
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import leftovers
from jaxrl_llm.runs.checkpoints import Checkpoints

STATE = {'x': jnp.zeros(2)}
# As somebody might call what is to be kept.
OWN = (
  'old.broken',
  '00000001_mine.broken',
  'old.discarded',
  'old.replaced',
  'notes.orbax-checkpoint-tmp',
)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def save(folder, *steps):
  with Checkpoints(folder, keep_latest=1) as checkpoints:
    for step in steps:
      checkpoints.save(step, STATE, {})
      checkpoints.wait()


def test_folders_that_the_user_named_are_left_alone(tmp_path, caplog):
  for name in OWN:
    (tmp_path / name).mkdir()
  (tmp_path / '00000001.broken').mkdir()
  save(tmp_path, 1, 2)
  assert names(tmp_path) == sorted([*OWN, '00000002'])
  assert Checkpoints(tmp_path).steps() == [2]
  assert not caplog.records


def test_a_file_among_the_leftovers_is_removed(tmp_path):
  save(tmp_path, 1)
  (tmp_path / '00000005.orbax-checkpoint-tmp').write_text('')
  Checkpoints(tmp_path)
  assert names(tmp_path) == ['00000001']


@pytest.mark.parametrize(
  'name',
  [
    '00000005.orbax-checkpoint-tmp-12',
    '00000001.discarded',
    '00000002.replaced',  # its step is whole
  ],
)
def test_what_cannot_be_removed_is_said(name, tmp_path, monkeypatch, caplog):
  save(tmp_path, 2)
  (tmp_path / name).mkdir()

  def refuse(path, *args, **kwargs):
    raise OSError(errno.ENOTEMPTY, 'Directory not empty')

  with monkeypatch.context() as patch:
    # As on NFS, where a file that somebody holds open gets another name.
    patch.setattr(shutil, 'rmtree', refuse)
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    said = [each.getMessage() for each in caplog.records]
    assert len(said) == 1 and 'Directory not empty' in said[0], said
    assert name.split('.')[0] in said[0]
    assert checkpoints.restore(STATE)[0] == 2
  checkpoints.save(3, STATE, {})
  checkpoints.wait()
  Checkpoints(tmp_path)
  assert names(tmp_path) == ['00000003']


def test_a_step_that_cannot_be_put_back_is_an_error(tmp_path, monkeypatch):
  save(tmp_path, 1)
  (tmp_path / '00000001').rename(tmp_path / '00000001.replaced')

  def refuse(self, target):
    raise PermissionError(errno.EACCES, 'Permission denied')

  monkeypatch.setattr(pathlib.Path, 'rename', refuse)
  with pytest.raises(UserError, match='00000001.replaced cannot be') as error:
    Checkpoints(tmp_path)
  assert len(str(error.value).splitlines()) == 2
  assert os.listdir(tmp_path) == ['00000001.replaced']


def test_a_broken_step_that_cannot_be_renamed_is_said(
  tmp_path, monkeypatch, caplog
):
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, STATE, {})
  (tmp_path / '00000002' / 'manifest' / 'data.json').write_text('')

  def refuse(path, suffix):
    raise PermissionError(errno.EACCES, 'Permission denied')

  checkpoints = Checkpoints(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(leftovers, 'move_aside', refuse)
    assert checkpoints.restore(STATE)[0] == 1
  assert 'Permission denied' in caplog.text
  checkpoints.save(2, STATE, {})
  checkpoints.wait()
  assert Checkpoints(tmp_path).restore(STATE)[0] == 2
  assert names(tmp_path) == ['00000001', '00000002']
