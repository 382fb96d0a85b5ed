"""Waiting for rewards in such a way that something else can end the wait.

A sample may take minutes.  Whether to go on waiting is for the program to say
that was asked to stop, not for every function between it and the wait: so the
question is kept here while it lasts, for each thread on its own.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

# Seconds from one question to the next.
_INTERVAL = 0.1

_check = contextvars.ContextVar('check', default=None)


@contextlib.contextmanager
def checked(check: Callable[[], None]) -> Iterator[None]:
  """Within it, this thread calls `check` while it waits for rewards.

    with StopSignal() as stop, waiting.checked(stop.check):
      ...

  What is asked are rewards in worker processes and `code.code_tests`; another
  function in this process is not interrupted.

  Args:
    check: called about ten times a second; what it raises ends the wait.  An
      `Exception` would be taken for one of the function that waits.
  """
  token = _check.set(check)
  try:
    yield
  finally:
    _check.reset(token)


def wait(done: Callable[[float | None], bool]) -> None:
  """Waits until `done(seconds)`, which itself waits so long, is true.

  Args:
    done: called with None where nothing can end the wait.

  Raises:
    BaseException: what the check raises.
  """
  check = _check.get()
  if check is None:
    done(None)
    return
  check()
  while not done(_INTERVAL):
    check()
