"""JSON values, and files that readers see whole: the old or the new one."""

import errno
import json
import os
import pathlib
from typing import Any

from jaxrl_llm.errors import UserError

# Errors of file systems that do not sync folders: their names reach the disk
# eventually.
_NO_SYNC = frozenset(
  (
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
    *(errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM),
  )
)


def as_json(value: Any, name: str, allow_nan: bool = False) -> Any:
  """Returns a copy of a value as JSON restores it: tuples become lists.

  Args:
    value: numbers, strings, lists and dictionaries.
    name: the value's name, for the message.
    allow_nan: keep NaN and the infinities, which only Python's JSON has.

  Raises:
    UserError: it has a key that is not a string (JSON would make it one), a
      number that is not allowed, or a value that JSON cannot express.
  """
  _check_keys(value, name)
  try:
    return json.loads(json.dumps(value, allow_nan=allow_nan))
  except (TypeError, ValueError) as error:
    raise UserError(
      f'The {name} cannot be written as JSON: {error}.\n'
      'Use numbers, strings, lists and dictionaries only.'
    ) from error


def _check_keys(value, name, above=''):
  if isinstance(value, dict):
    for key, inner in value.items():
      if not isinstance(key, str):
        raise UserError(
          f'The {name} has a key {key!r}, at {above}{key}.\n'
          'JSON keys are strings: use str(key).'
        )
      _check_keys(inner, name, f'{above}{key}/')
  elif isinstance(value, list | tuple):
    for inner in value:
      _check_keys(inner, name, above)


def write_atomically(path, content: str | bytes) -> None:
  """Writes a file such that readers see all of the old one or of the new one.

  Returns when it is on the disk.

  Raises:
    OSError: it could not be written; the old file is untouched.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  if isinstance(content, str):
    content = content.encode()
  try:
    with open(temporary, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise


def sync_tree(path) -> None:
  """Returns when a folder and its whole content are on the disk.

  Raises:
    OSError: something could not be written, or the folder is not there.
  """
  for folder, _, names in os.walk(path, topdown=False, onerror=_raise):
    for name in names:
      _sync(os.path.join(folder, name))
    sync_folder(folder)


def sync_folder(path) -> None:
  """Returns when the names in a folder are on the disk.

  Raises:
    OSError: they could not be written; not raised where folders are not synced.
  """
  try:
    _sync(path)
  except OSError as error:
    if error.errno not in _NO_SYNC:
      raise


def _sync(path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _raise(error):
  raise error
