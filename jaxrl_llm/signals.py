"""Requests to stop a run: signals, which the run polls."""

import gc
import os
import signal
import threading

from jaxrl_llm import processes


class StopRequested(BaseException):
  """A signal asked the run to stop; the message is the signal's name.

  Like KeyboardInterrupt it is not an `Exception`: an interrupted function has
  not failed, and handlers of failures must not swallow it.
  """


class StopSignal:
  """Turns a signal into a request that a loop polls.

  The signals are SIGTERM, the first SIGINT, and SIGHUP, which a closed terminal
  sends, unless it is ignored, as under nohup.  A second SIGINT raises
  KeyboardInterrupt at once.  The former handlers are restored on exit.  Enter
  it in the main thread, where Python delivers signals.

  With several processes a signal to any of them stops all at the same `check`,
  which all of them call equally often.

    with StopSignal() as stop:
      for step in steps:
        ...
        if stop.requested:
          break

  Attributes:
    name: the signal that asked for the stop, such as `'SIGTERM'`, or None.
  """

  def __init__(self):
    self.name = None
    self._interrupted = False
    self._former = {}

  @property
  def requested(self) -> bool:
    return self.name is not None

  def check(self) -> None:
    """Raises StopRequested if a stop was requested in any process.

    For places from which returning is awkward, such as the middle of a rollout.
    All processes reach them in the same order.
    """
    if processes.agree(self.requested, 'a look at signals'):
      names = processes.gather_objects(self.name, 'a signal')
      raise StopRequested(next(name for name in names if name is not None))

  def check_alone(self) -> None:
    """Does the same where processes do not arrive together.

    With several processes it does nothing: the others would wait for one that
    stopped.  They stop at the next `check`.
    """
    if self.requested and processes.count() == 1:
      raise StopRequested(self.name)

  def _handle(self, number, frame):
    if number == signal.SIGINT:
      if self._interrupted and _in_gc_callback(frame):
        # Raised here it would be printed and dropped: it comes a moment later.
        again = os.getpid(), signal.SIGINT
        threading.Timer(0.01, os.kill, again).start()
      elif self._interrupted:
        raise KeyboardInterrupt
      self._interrupted = True
    self.name = self.name or signal.Signals(number).name

  def __enter__(self):
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      numbers.append(signal.SIGHUP)
    for number in numbers:
      self._former[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc_info):
    for number, handler in self._former.items():
      # None marks a handler installed by C code, which cannot be restored.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._former = {}


def _in_gc_callback(frame):
  """Returns True if the garbage collector has called, which JAX hooks into."""
  codes = {getattr(callback, '__code__', None) for callback in gc.callbacks}
  while frame is not None and frame.f_code not in codes:
    frame = frame.f_back
  return frame is not None
