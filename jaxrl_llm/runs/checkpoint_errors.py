"""What an error of a restore says of a checkpoint: damaged, or not to be read.

A damaged step is passed over for the one before.  One that this process could
not read just now (no memory, no permission, too many open files, a disk that
does not answer) may be healthy: to pass it over would lose what it holds.
"""

import errno
import os
import re

import jax

# These lie in the step itself: a part of it is gone or is something else.
_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# TensorStore raises ValueError, with the status in front of its message.
_STATUS = re.compile(
  'RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE'
  '|DEADLINE_EXCEEDED|CANCELLED'
)
_CAUSES = tuple(
  os.strerror(number)
  for number in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
)


class BrokenError(Exception):
  """A step does not verify; the message says what of it."""


def obstacle(error: BaseException) -> BaseException | None:
  """What kept a step from being read; None if the step itself is damaged.

  Args:
    error: of a restore; the errors that it was raised from count too.
  """
  seen = []
  while error is not None and error not in seen:
    if _is_obstacle(error):
      return error
    seen.append(error)
    error = error.__cause__ or error.__context__
  return None


def _is_obstacle(error):
  if isinstance(error, MemoryError):
    return True
  if isinstance(error, OSError):
    # Without a number it is of a decoder, which did read.
    return error.errno is not None and not isinstance(error, _DAMAGE)
  if isinstance(error, jax.errors.JaxRuntimeError | ValueError):
    text = str(error)
    return bool(_STATUS.match(text)) or any(cause in text for cause in _CAUSES)
  return False


def one_line(error: BaseException) -> str:
  """The error's first cause in one line: Orbax wraps it several times."""
  while error.__cause__ or not (
    error.__suppress_context__ or error.__context__ is None
  ):
    error = error.__cause__ or error.__context__
  text = ' '.join(str(error).split())
  text = re.split(r' \[(?:source locations|tensorstore_spec)', text)[0]
  if len(text) > 300:
    text = f'{text[:150]} … {text[-150:]}'
  return f'{type(error).__name__}: {text}'
