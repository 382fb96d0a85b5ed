"""A folder that takes another's place whole, or not at all.

If the process is killed in the moment between the two, the old folder is in
`.NAME.replaced` beside it, and the next one to come puts it back first.  What
killed ones have left in `.NAME-xxxxxxxx` is removed likewise.
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

# In the folder of a save: its name tells whose it is, a lock on it that the
# save goes on.
_MARKER = 'jaxrl_llm_is_writing_here'


@contextlib.contextmanager
def new_folder(path):
  """An empty folder, which takes the place of `path` when it is filled.

  None outside process 0, where the others wait at the end for the folder.

  Raises:
    UserError: the old one holds what the new one does not; it is a file; the
      disk is full.
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
  """An empty folder on the target's file system, marked as in use."""
  with tempfile.TemporaryDirectory(
    prefix=f'.{target.name}-', dir=target.parent
  ) as temporary:
    outer = pathlib.Path(temporary)
    with open(outer / 'unmarked', 'w') as marker:
      # The kernel drops the lock with this process, however it ends.  Without
      # locks (some network file systems) there is no marker, and the folder of
      # a killed save stays.
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
    # What cannot be looked into or removed is no hindrance to this save.
    with contextlib.suppress(OSError), open(path / _MARKER) as marker:
      fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(path)


def _replaced(target):
  return target.with_name(f'.{target.name}.replaced')


def _put_back(target):
  """Mends what a kill in the midst of `_move` has left."""
  aside = _replaced(target)
  if aside.is_dir():
    if target.exists():
      shutil.rmtree(aside)
    else:
      aside.rename(target)


def _move(folder, target):
  """Puts `folder` in the place of `target`."""
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
        f'{target} exists and holds {", ".join(sorted(lost)[:3])}, which '
        'would be lost; choose another folder.'
      )
    target.rename(aside)
  try:
    folder.rename(target)
  finally:
    _put_back(target)
