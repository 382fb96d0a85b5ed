"""Checkpoint folders that are not steps: set aside, replaced, left behind.

    00000140.broken/        a step that did not verify, kept for inspection
    00000160.replaced/      the old content of a step being saved again
    00000120.discarded/     a folder being removed
    00000180.orbax-checkpoint-tmp…  the output of an interrupted save

A name that only resembles these belongs to the user and is left alone.
"""

import logging
import pathlib
import re
import shutil

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.checkpoint_errors import one_line

BROKEN = '.broken'
REPLACED = '.replaced'
_DISCARDED = '.discarded'

_STEP = re.compile(rf'(\d{{8,}})({REPLACED})?')
_BROKEN_STEP = re.compile(rf'(\d{{8,}}){BROKEN}')
_DEAD = re.compile(
  rf'\d{{8,}}(({BROKEN}|{REPLACED})?{_DISCARDED}|\.orbax-checkpoint-tmp.*)'
)
_log = logging.getLogger(__name__)


def steps(folder: pathlib.Path) -> list[int]:
  """Returns the committed steps, ascending, including replaced ones."""
  if not folder.is_dir():
    return []
  matches = (_STEP.fullmatch(path.name) for path in folder.iterdir())
  return sorted({int(match[1]) for match in matches if match})


def clean(folder: pathlib.Path) -> None:
  """Removes the leftovers of interrupted or failed saves.

  One that cannot be removed only takes room and causes a warning.

  Raises:
    UserError: the folder cannot be read, or the old content of a step cannot be
      restored.
  """
  if not folder.is_dir():
    return
  try:
    paths = sorted(folder.iterdir())
  except OSError as error:
    raise UserError(
      f'{folder} cannot be read: {error.strerror}.\n'
      'Fix permissions or the disk, then resume.'
    ) from error
  for path in paths:
    match = _STEP.fullmatch(path.name)
    if _DEAD.fullmatch(path.name):
      _remove(path)
    elif match and match[2]:
      _settle(path, path.with_name(match[1]))


def _settle(replaced: pathlib.Path, step: pathlib.Path) -> None:
  """Removes a step's old content, or makes it the step again."""
  try:
    if step.exists():
      discard(replaced)
    else:  # the save ended too early
      replaced.rename(step)
  except OSError as error:
    if step.exists():
      _warn(replaced, error)
      return
    raise UserError(
      f'{replaced} cannot be renamed: {error.strerror}.\n'
      f'It holds checkpoint {step.name}: fix permissions or the disk, then '
      'resume.'
    ) from error


def discard(path: pathlib.Path) -> None:
  """Removes a folder such that a crash halfway leaves no partial step.

  Raises:
    OSError: it is still there, unchanged.
  """
  if path.exists():
    dead = path.with_name(path.name + _DISCARDED)
    if dead.exists():
      shutil.rmtree(dead)
    path.rename(dead)
    _remove(dead)


def discard_broken(folder: pathlib.Path, last: int) -> None:
  """Discards the steps up to `last` that did not verify."""
  for path in sorted(folder.glob(f'*{BROKEN}')):
    match = _BROKEN_STEP.fullmatch(path.name)
    if match and int(match[1]) <= last:
      discard(path)


def move_aside(path: pathlib.Path, suffix: str) -> None:
  """Renames a step, if it exists; discards any folder with the new name.

  Raises:
    OSError: it is still there, unchanged.
  """
  if path.exists():
    aside = path.with_name(path.name + suffix)
    discard(aside)
    path.rename(aside)


def _remove(path):
  try:
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()
  except OSError as error:
    _warn(path, error)


def _warn(path, error):
  _log.warning('Could not remove %s: %s', path, one_line(error))
