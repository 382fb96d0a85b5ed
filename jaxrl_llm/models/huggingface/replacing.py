"""Replaces a folder by another completely, or not at all.

If the process is killed between the two renames, the old folder is in
`.NAME.replaced` next to it, and the next save restores it first.  It also
removes the `.NAME-xxxxxxxx` that killed saves have left.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import tempfile

import safetensors

from jaxrl_llm import processes
from jaxrl_llm.errors import UserError
from jaxrl_llm.models.huggingface import reading

# In the folder of a save: its name identifies the program, and a lock on it
# means that the save is still running.
_MARKER = 'jaxrl_llm_is_writing_here'


@contextlib.contextmanager
def new_folder(path):
  """Yields an empty folder, which replaces `path` when it is filled.

  Yields None outside process 0; those processes wait at the end for the folder.

  Raises:
    UserError: the old folder contains files that the new one lacks; it is a
      file; the disk is full.
  """
  if not processes.is_main():
    yield None
    processes.barrier(f'the export to {path}')
    return
  target = pathlib.Path(path)
  if target.exists() and not target.is_dir():
    raise UserError(f'{target} is a file; name a folder to write.')
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_back(target)
    _remove_stale(target)
    with _workspace(target) as folder:
      yield folder
      _move(folder, target)
  except (OSError, safetensors.SafetensorError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{target} cannot be written: {" ".join(str(reason).split())[:200]}.\n'
      'Make room or change its permissions, or name another folder.'
    ) from error
  processes.barrier(f'the export to {path}')


@contextlib.contextmanager
def _workspace(target):
  """Yields an empty folder on the target's file system, marked as in use."""
  with tempfile.TemporaryDirectory(
    prefix=f'.{target.name}-', dir=target.parent
  ) as temporary:
    outer = pathlib.Path(temporary)
    with open(outer / 'unmarked', 'w') as marker:
      # The kernel drops the lock with this process, however it ends.  Without
      # locks (some network file systems) there is no marker, and the folder of
      # a killed save remains.
      with contextlib.suppress(OSError):
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(marker.name, outer / _MARKER)
      (outer / 'new').mkdir()
      yield outer / 'new'


def _remove_stale(target):
  """Removes the workspaces of saves to `target` that were killed."""
  pattern = re.escape(f'.{target.name}-') + r'\w{8}'
  for path in target.parent.iterdir():
    if not re.fullmatch(pattern, path.name) or path.is_symlink():
      continue
    # A workspace that cannot be read or removed does not stop this save.
    with contextlib.suppress(OSError), open(path / _MARKER) as marker:
      fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(path)


def _replaced(target):
  return target.with_name(f'.{target.name}.replaced')


def _put_back(target):
  """Restores the folder after a kill in the middle of `_move`."""
  aside = _replaced(target)
  if aside.is_dir():
    if target.exists():
      shutil.rmtree(aside)
    else:
      aside.rename(target)


def _move(folder, target):
  """Replaces `target` by `folder`."""
  aside = _replaced(target)
  if target.exists():
    new = {file.name for file in folder.iterdir()}
    lost = [
      file.name
      for file in target.iterdir()
      if file.name not in new
      and file.name != reading.INDEX
      and not re.fullmatch(r'model(-\d+-of-\d+)?\.safetensors', file.name)
    ]
    if lost:
      raise UserError(
        f'{target} exists and contains {", ".join(sorted(lost)[:3])}, which '
        'would be lost; choose another folder.'
      )
    target.rename(aside)
  try:
    folder.rename(target)
  finally:
    _put_back(target)
