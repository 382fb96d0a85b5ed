"""Interruptible waiting for rewards.

A sample may take minutes.  The program that was asked to stop decides whether
to continue waiting, not every function between it and the wait; so its check is
stored here, per thread, while it applies.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

# Seconds between calls of the check.
_INTERVAL = 0.1

_check = contextvars.ContextVar('check', default=None)


@contextlib.contextmanager
def checked(check: Callable[[], None]) -> Iterator[None]:
  """Makes this thread call `check` while it waits for rewards.

    with StopSignal() as stop, interruptible.checked(stop.check):
      ...

  It is called about ten times a second while rewards run in worker processes or
  in `code.code_tests`; a BaseException from it ends the wait.  An `Exception`
  would be attributed to the function that waits.
  """
  token = _check.set(check)
  try:
    yield
  finally:
    _check.reset(token)


def wait(done: Callable[[float | None], bool]) -> None:
  """Waits until `done(seconds)`, which itself waits that long, returns True.

  Without a check, `done(None)` waits for as long as it takes.
  """
  check = _check.get()
  if check is None:
    done(None)
    return
  check()
  while not done(_INTERVAL):
    check()
