"""Keeps off the screen what Orbax says while its errors are being handled.

When one array of a checkpoint cannot be read, Orbax abandons the reads of the
others: each then prints a traceback of its own, some seconds later, from other
threads.  The error itself is raised, so nothing is lost with these.
"""

import logging
import pathlib
import sys
import warnings


def hush() -> None:
  """Installs the filters, once per process.  Other libraries keep theirs."""
  for name in ('absl', 'asyncio'):
    logger = logging.getLogger(name)
    if not any(isinstance(old, _Filter) for old in logger.filters):
      logger.addFilter(_Filter())
  if not isinstance(sys.unraisablehook, _Hook):
    sys.unraisablehook = _Hook(sys.unraisablehook)
  abandoned = "coroutine '(_read_array_index_and_device_put|Store\\.)"
  warnings.filterwarnings('ignore', abandoned, RuntimeWarning)


class _Filter(logging.Filter):
  """Drops log records that come from Orbax or are about its tasks."""

  def filter(self, record):
    files = [record.pathname]
    trace = record.exc_info[2] if record.exc_info else None
    while trace is not None:
      files.append(trace.tb_frame.f_code.co_filename)
      trace = trace.tb_next
    about = 'tensorstore_spec' in record.getMessage()
    return not about and not any(map(_is_orbax, files))


class _Hook:
  """Drops the last words of coroutines that Orbax has abandoned."""

  def __init__(self, former):
    self._former = former

  def __call__(self, unraisable):
    code = getattr(unraisable.object, 'cr_code', None)
    late = str(unraisable.exc_value) == 'Event loop is closed'
    if not late and (code is None or not _is_orbax(code.co_filename)):
      self._former(unraisable)


def _is_orbax(filename):
  return 'orbax' in pathlib.PurePath(filename).parts
