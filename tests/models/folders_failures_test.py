"""Saves that are killed, fail or meet a full disk: the old folder survives."""

import errno
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import safetensors.numpy
from trees import assert_same

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.huggingface import folders
from tests.models.folders_test import CONFIG


@pytest.fixture(scope='module')
def params():
  return transformer.init(CONFIG, jax.random.key(0))


@pytest.fixture
def folder(tmp_path, params):
  folders.save(tmp_path / 'model', CONFIG, params)
  return tmp_path / 'model'


def test_a_kill_between_the_renames_keeps_the_old_folder(
  folder, params, monkeypatch
):
  rename = pathlib.Path.rename
  calls = []

  def dies_at_the_second(path, to):
    calls.append(to)
    if len(calls) >= 2:  # also what would mend it: a kill leaves no time
      raise KeyboardInterrupt
    return rename(path, to)

  changed = jax.tree.map(lambda leaf: leaf + 1, params)
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'rename', dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
      folders.save(folder, CONFIG, changed)
  aside = folder.with_name('.model.replaced')
  assert not folder.exists()
  assert_same(folders.load(aside)[1], params)
  # A save that fails puts it back too.
  with pytest.raises(UserError, match='is absent'):
    folders.save(folder, CONFIG, {})
  assert_same(folders.load(folder)[1], params)
  folders.save(folder, CONFIG, changed)
  assert_same(folders.load(folder)[1], changed)
  assert [path.name for path in folder.parent.iterdir()] == ['model']


# Saves, and dies where nothing is cleaned up or, told to, waits meanwhile.
KILLED = """
import os, signal, sys, time
from jaxrl_llm.models.huggingface import folders, writing
def write(*args):
  print('writing', flush=True)
  if sys.argv[2] == 'wait':
    time.sleep(60)
  os.kill(os.getpid(), signal.SIGKILL)
config, params = folders.load(sys.argv[1])
writing.write_params = write
folders.save(sys.argv[1], config, params)
"""


def begin_save(folder, how):
  """A process in the middle of a save."""
  process = subprocess.Popen(
    [sys.executable, '-c', KILLED, folder, how],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert process.stdout.readline() == 'writing\n'
  return process


@pytest.mark.slow
def test_what_a_killed_save_left_is_removed_by_the_next(folder, params):
  assert begin_save(folder, 'die').wait() < 0
  [left] = [path for path in folder.parent.iterdir() if path != folder]
  alive = begin_save(folder, 'wait')
  # Neither another's folder nor that of a save that goes on is touched.
  others = {'.model-mine', '.model-abcdefgh', '.model-12345678'}
  for name in others:
    (folder.parent / name).mkdir()
  (folder.parent / '.model-abcdefgh' / 'notes.txt').write_text('mine')
  (folder.parent / '.model-12345678').rmdir()
  (folder.parent / '.model-12345678').symlink_to(left)
  running = [
    path
    for path in folder.parent.iterdir()
    if path not in (folder, left) and path.name not in others
  ]
  folders.save(folder, CONFIG, params)
  names = {path.name for path in folder.parent.iterdir()}
  assert len(running) == 1 and not left.exists()
  assert names == others | {'model', running[0].name}
  assert os.listdir(folder.parent / '.model-abcdefgh') == ['notes.txt']
  alive.kill()
  alive.wait()
  alive.stdout.close()
  folders.save(folder, CONFIG, params)
  assert {path.name for path in folder.parent.iterdir()} == others | {'model'}
  assert_same(folders.load(folder)[1], params)


def test_a_failed_rename_puts_the_old_folder_back(folder, params, monkeypatch):
  rename = pathlib.Path.rename

  def fails_for_the_new(path, to):
    if path.name == 'new':
      raise OSError(errno.EIO, 'Input/output error')
    return rename(path, to)

  monkeypatch.setattr(pathlib.Path, 'rename', fails_for_the_new)
  with pytest.raises(UserError, match='cannot be written: Input/output error'):
    folders.save(folder, CONFIG, params)
  assert_same(folders.load(folder)[1], params)
  assert [path.name for path in folder.parent.iterdir()] == ['model']


# A limit on the size of files stands in for a full disk.
FULL = """
import resource, signal, sys
import jax, jax.numpy as jnp
from jaxrl_llm.errors import UserError
from jaxrl_llm.models.huggingface import folders
config, params = folders.load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
  folders.save(sys.argv[1], config, jax.tree.map(jnp.zeros_like, params))
except UserError as error:
  print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  'limit', [100, pytest.param(2000, marks=pytest.mark.slow)]
)
def test_a_full_disk_is_said(folder, params, limit):
  result = subprocess.run(
    [sys.executable, '-c', FULL, folder, str(limit)],
    capture_output=True,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert result.returncode == 0, result.stderr
  first, second = result.stdout.splitlines()
  assert f'{folder} cannot be written: ' in first and 'too large' in first
  assert second.startswith('Make room')
  assert_same(folders.load(folder)[1], params)


def test_what_does_not_read_back_is_refused(folder, params, monkeypatch):
  write = safetensors.numpy.save_file

  def damaged(arrays, path, **kwargs):
    write({name: array + 1 for name, array in arrays.items()}, path, **kwargs)

  monkeypatch.setattr(safetensors.numpy, 'save_file', damaged)
  with pytest.raises(UserError, match='does not hold what was written'):
    folders.save(folder, CONFIG, params)
  assert_same(folders.load(folder)[1], params)
