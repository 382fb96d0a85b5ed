"""The number and time of the programs that a process has compiled."""

import functools
import threading
from typing import NamedTuple

import jax

# JAX's event, once for every program that is compiled or, compiled before,
# read from the persistent cache.
_EVENT = '/jax/core/compile/backend_compile_duration'

_lock = threading.Lock()
_total = [0, 0.0]


class Compiled(NamedTuple):
  """What was compiled, of programs of any size.

  Attributes:
    programs: how many, those read from the persistent cache included.
    seconds: the time that took, without tracing and lowering.
  """

  programs: int
  seconds: float


class Meter:
  """Tells what the process has compiled since it was last asked."""

  def __init__(self):
    _listen()
    self._seen = _total[:]

  def take(self) -> Compiled:
    """What was compiled since the last call, or since the beginning."""
    with _lock:
      now = _total[:]
    before, self._seen = self._seen, now
    return Compiled(now[0] - before[0], now[1] - before[1])


@functools.cache
def _listen() -> None:
  """Begins to count; a listener cannot be taken back."""
  jax.monitoring.register_event_duration_secs_listener(_add)


def _add(event: str, seconds: float, **kwargs) -> None:
  del kwargs
  if event == _EVENT:
    with _lock:
      _total[0] += 1
      _total[1] += seconds
