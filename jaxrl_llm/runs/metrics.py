"""Writes numbers per step: JSON lines for programs, TensorBoard for people."""

import pathlib
import time

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.records import (
  RecordFile,
  cannot_write,
  cut,
  number,
  read_records,
)

# Seconds between two writes of `tb/` to the disk, if no `sync` comes first.
_BOARD_INTERVAL = 30.0


class MetricsWriter:
  """Writes one record per step to `metrics.jsonl`, `timings.jsonl` and `tb/`.

  `metrics.jsonl` holds what the run computed and no clock readings, so that two
  runs of one configuration can be compared byte by byte; clock readings, in
  seconds, and other numbers of the process go to `timings.jsonl`.  Floats are
  written in full (their shortest exact form); NaN and the infinities as the
  strings "nan", "inf", "-inf", which `read_metrics` converts back.

  Args:
    workdir: the run folder; must exist.
    resume_step: the step of the restored checkpoint.  Later records are
      removed, so that the file continues as if never interrupted.  None removes
      all records: the run starts at its beginning.

  Raises:
    UserError: the records do not reach `resume_step`.
  """

  def __init__(self, workdir, resume_step: int | None = None):
    workdir = pathlib.Path(workdir)
    paths = [workdir / f'{name}.jsonl' for name in ('metrics', 'timings')]
    try:
      cut(paths[0], resume_step, complete=True)
      cut(paths[1], resume_step)
      self._metrics, self._timings = map(RecordFile, paths)
      first = 0 if resume_step is None else resume_step + 1
      self._board = _Board(workdir / 'tb', first)
    except OSError as error:
      raise UserError(
        f'Records cannot be written in {workdir}: {error.strerror}.\n'
        'Make room or change its permissions, then resume.'
      ) from error
    self._last = resume_step

  def write(self, step: int, metrics: dict, timings: dict | None = None):
    """Writes a step's record.

    Args:
      step: greater than every earlier one.
      metrics: numbers by name, written in this order.
      timings: clock readings by name, in seconds, and counts of the process.

    Raises:
      ValueError: the step does not follow, or a metric is not one number.
      UserError: the disk is full.
    """
    if self._last is not None and step <= self._last:
      raise ValueError(f'Step {step} does not follow step {self._last}.')
    step = int(step)
    metrics, timings = (
      {name: number(value, name) for name, value in (values or {}).items()}
      for values in (metrics, timings)
    )
    self._metrics.write({'step': step, **metrics})
    if timings:
      self._timings.write({'step': step, **timings})
    self._last = step
    timings = {f'timings/{name}': value for name, value in timings.items()}
    self._board.write(step, metrics | timings)

  def sync(self) -> None:
    """Returns when every record is on the disk.

    Call it before a checkpoint: no checkpointed step may lack its record.
    """
    self._metrics.sync()
    self._timings.sync()
    self._board.sync()

  def close(self) -> None:
    """Closes the files.

    Raises:
      UserError: the disk is full.
    """
    self._metrics.close()
    self._timings.close()
    self._board.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, *rest):
    try:
      self.close()
    except UserError:
      # The first error is the one to report.
      if kind is None:
        raise


class _Board:
  """A TensorBoard event file, written by the calling thread.

  `SummaryWriter` has its own thread for that.  On a full disk it dies, and
  the tenth scalar after that waits for it for ever.

  Args:
    folder: that of the event files.
    first: the step from which earlier files are void.
  """

  def __init__(self, folder: pathlib.Path, first: int):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    self._folder = folder
    folder.mkdir(exist_ok=True)
    self._file = EventsWriter(str(folder / 'events'))
    started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._file.write_event(
      self._event(wall_time=time.time(), step=first, session_log=started)
    )
    self._written = time.monotonic()

  def write(self, step: int, values: dict) -> None:
    pairs = [
      self._summary.Value(tag=name, simple_value=float(value))
      for name, value in values.items()
    ]
    event = self._event(
      wall_time=time.time(), step=step, summary=self._summary(value=pairs)
    )
    self._try(self._file.write_event, event)
    if time.monotonic() - self._written > _BOARD_INTERVAL:
      self.sync()

  def sync(self) -> None:
    self._try(self._file.flush)
    self._written = time.monotonic()

  def close(self) -> None:
    self._try(self._file.close)

  def _try(self, write, *args) -> None:
    try:
      write(*args)
    except OSError as error:
      raise cannot_write(self._folder, error.strerror) from error


def read_metrics(path) -> list[dict]:
  """Reads `metrics.jsonl` or `timings.jsonl`, with every value a number.

  Raises:
    UserError: a line is not a record; the message has its number.
  """
  return [
    {
      name: float(value) if isinstance(value, str) else value
      for name, value in record.items()
    }
    for record in read_records(path)
  ]
