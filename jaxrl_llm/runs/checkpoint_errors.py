"""Distinguishes errors of a damaged checkpoint from those of an unreadable one.

A damaged step is skipped in favour of the one before.  One that this process
cannot read just now (no memory, no permission, too many open files, a disk that
does not answer) may be healthy: skipping it would lose its content.
"""

import errno
import os
import re

import jax

# Errors of the step itself: a part of it is missing or something else.
_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# TensorStore raises ValueError, whose message starts with the status.
_STATUS = re.compile(
  'RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE'
  '|DEADLINE_EXCEEDED|CANCELLED'
)
_CAUSES = tuple(
  os.strerror(number)
  for number in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
)


class BrokenError(Exception):
  """A step does not verify; the message gives the reason."""


def obstacle(error: BaseException) -> BaseException | None:
  """Returns the error that kept a step from being read; None if it is damaged.

  Args:
    error: from a restore; the errors that it was raised from count too.
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
    # Without a number it comes from a decoder, which did read.
    return error.errno is not None and not isinstance(error, _DAMAGE)
  if isinstance(error, jax.errors.JaxRuntimeError | ValueError):
    text = str(error)
    return bool(_STATUS.match(text)) or any(cause in text for cause in _CAUSES)
  return False


def one_line(error: BaseException) -> str:
  """Formats an error's first cause in a line: Orbax wraps it several times."""
  while error.__cause__ or not (
    error.__suppress_context__ or error.__context__ is None
  ):
    error = error.__cause__ or error.__context__
  text = ' '.join(str(error).split())
  text = re.split(r' \[(?:source locations|tensorstore_spec)', text)[0]
  if len(text) > 300:
    text = f'{text[:150]} … {text[-150:]}'
  return f'{type(error).__name__}: {text}'
