"""Writes numbers per step: JSON lines for programs, TensorBoard for people.

Files of one JSON record per line survive a kill and a resume.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError

# Seconds between two writes of `tb/` to the disk, if no `sync` comes first.
_BOARD_INTERVAL = 30.0


class MetricsWriter(contextlib.AbstractContextManager):
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

  def write(
    self,
    step: int,
    metrics: dict,
    timings: dict | None = None,
    again: bool = False,
  ):
    """Writes a step's record.

    Args:
      step: greater than every earlier one, or with `again` the last one.
      metrics: numbers by name, written in this order.
      timings: clock readings by name, in seconds, and counts of the process.
      again: replaces the last record.

    Raises:
      ValueError: the step does not follow, or a metric is not one number.
      UserError: the disk is full.
    """
    if self._last is not None and step < self._last + (not again):
      raise ValueError(f'Step {step} does not follow step {self._last}.')
    step = int(step)
    metrics, timings = (
      {name: number(value, name) for name, value in (values or {}).items()}
      for values in (metrics, timings)
    )
    self._metrics.write({'step': step, **metrics}, again)
    if timings:
      self._timings.write({'step': step, **timings}, again)
    self._last = step
    timings = {f'timings/{name}': value for name, value in timings.items()}
    self._board.write(step, metrics | timings)

  def last(self) -> tuple[dict, dict]:
    """Returns metrics and timings of the last step, as they were written."""
    metrics = read_metrics(self._metrics.path)[-1]
    step, timings = metrics.pop('step'), {}
    for record in read_metrics(self._timings.path):
      timings = record if record.pop('step') == step else {}
    return metrics, timings

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


class RecordFile:
  """Appends records with a `step`, one JSON object per line.

  A line is one write to the kernel, so a killed process leaves at most its last
  line broken, which `cut` removes on resume.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self._file = open(self.path, 'ab', buffering=0)  # noqa: SIM115

  def write(self, record: dict, again: bool = False) -> None:
    """Appends a record; with `again`, atomically replaces those of its step."""
    line = json.dumps(record, allow_nan=False).encode() + b'\n'
    try:
      if again:
        cut(self.path, record['step'] - 1, then=line)
        self._file.close()
        self._file = open(self.path, 'ab', buffering=0)  # noqa: SIM115
        return
      written = self._file.write(line)
    except OSError as error:
      raise cannot_write(self.path, error.strerror) from error
    if written != len(line):
      raise cannot_write(self.path, 'the disk is full')

  def sync(self) -> None:
    """Returns when all records are on the disk."""
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise cannot_write(self.path, error.strerror) from error

  def close(self) -> None:
    self._file.close()


def cannot_write(path, reason) -> UserError:
  """Returns the error to raise when a file of a run cannot be written."""
  return UserError(
    f'{path} cannot be written: {reason}.\n'
    'Make room or fix the disk, then resume.'
  )


def number(value, name: str):
  """Converts a number for a record: an int, a float, or 'nan', 'inf', '-inf'.

  JSON has no NaN, and null would read as "not measured": the three values that
  JSON lacks become strings, and `read_metrics` converts them back.

  Raises:
    ValueError: the value is not one number; the message has its name.
  """
  shape = getattr(value, 'shape', ())
  if shape or value is None or isinstance(value, str | complex):
    kind = f'an array of shape {shape}' if shape else repr(value)
    raise ValueError(f'The metric {name} must be one number, not {kind}.')
  item = value.item() if hasattr(value, 'item') else value
  if isinstance(item, int):  # bool included
    return int(item)
  item = float(item)
  return item if math.isfinite(item) else str(item)


def read_records(path) -> list[dict]:
  """Reads the records of a file, unconverted.

  Raises:
    UserError: a line is not a JSON object; the message has its number.
  """
  records = []
  with open(path, 'rb') as file:
    for count, line in enumerate(file, 1):
      record = _parse(line)
      if record is None:
        raise UserError(
          f'{path}, line {count}: not a record.\n'
          'Remove the line, or resume the run, which repairs its last lines.'
        )
      records.append(record)
  return records


def last_step(path) -> int:
  """Returns the last step up to which a file has every record; 0 for none."""
  reached = None
  with contextlib.suppress(FileNotFoundError), open(path, 'rb') as file:
    for record in map(_parse, file):
      expected = (0, 1) if reached is None else (reached + 1,)
      if record is None or record['step'] not in expected:
        break
      reached = record['step']
  return reached or 0


def _parse(line):
  """Parses the record of a line; returns None if it is broken."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  known = isinstance(record, dict) and type(record.get('step')) is int
  return record if known and line.endswith(b'\n') else None


def cut(
  path,
  step: int | None,
  complete: bool = False,
  drop: Callable[[dict], bool] = lambda record: False,
  then: bytes = b'',
) -> None:
  """Removes the records after a step, and broken lines behind it.

  Atomic: the file is the old one or the cut one.  Kept lines keep their bytes.

  Args:
    path: the file; may be absent.
    step: the last step to keep; None keeps nothing.
    complete: also require one record for each step, from 0 or 1 to `step`
      itself (if that is above 0).
    drop: marks further records to remove.
    then: lines to append at the same time.

  Raises:
    UserError: a line before the last to keep is broken, or records are missing.
  """
  path = pathlib.Path(path)
  lines = []
  if path.exists():
    lines = path.read_bytes().splitlines(keepends=True)
  records = [_parse(line) for line in lines]
  limit = -math.inf if step is None else step
  kept = [
    i
    for i, record in enumerate(records)
    if record and record['step'] <= limit and not drop(record)
  ]
  if complete:
    # Lines after the record of `step` are removed, whatever they hold.
    last = [i for i in kept if records[i]['step'] == step]
    kept = kept[: kept.index(last[0]) + 1] if last else kept
  end = kept[-1] + 1 if kept else 0
  for count, record in enumerate(records[:end], 1):
    if record is None:
      raise _broken(path, count, complete)
  if complete:
    _check_complete(path, [each['step'] for each in records[:end]], step)
  if then or len(kept) < len(lines):
    write_atomically(path, b''.join(lines[i] for i in kept) + then)


def _broken(path: pathlib.Path, count: int, complete: bool) -> UserError:
  remedy = 'Remove the line, then resume.'
  if complete:
    remedy = 'Restore the file from a copy, or start afresh in another folder.'
  return UserError(f'{path}, line {count}: not a record.\n{remedy}')


def _check_complete(path, steps: list[int], step: int | None) -> None:
  """Raises UserError unless these are the steps up to `step`, each once."""
  first = steps[0] if steps and steps[0] == 0 else 1
  gap = next((i for i, each in enumerate(steps) if each != first + i), None)
  if gap is not None:
    problem = (
      f'{path}, line {gap + 1}: has step {steps[gap]}, not step {first + gap}'
    )
  elif step and steps[-1:] != [step]:
    ends = f'ends at step {steps[-1]}' if steps else 'has no record'
    problem = f'{path} {ends}, but the checkpoint is of step {step}'
  else:
    return
  raise UserError(
    f'{problem}.\n'
    'Restore the file from a copy, or start afresh in another folder.'
  )


# JAX's event for every program that is compiled or, compiled before, read from
# the persistent cache.
_COMPILED = '/jax/core/compile/backend_compile_duration'

_lock = threading.Lock()
_compiled = [0, 0.0]


class Compiled(NamedTuple):
  """Programs of any size that were compiled.

  Attributes:
    programs: their number, those read from the persistent cache included.
    seconds: the time it took, without tracing and lowering.
  """

  programs: int
  seconds: float


class Meter:
  """Reports what the process has compiled since the last report."""

  def __init__(self):
    _listen()
    self._seen = _compiled[:]

  def take(self) -> Compiled:
    """Returns what was compiled since the last call, or since the beginning."""
    with _lock:
      now = _compiled[:]
    before, self._seen = self._seen, now
    return Compiled(now[0] - before[0], now[1] - before[1])


@functools.cache
def _listen() -> None:
  """Begins to count; a listener cannot be removed."""
  jax.monitoring.register_event_duration_secs_listener(_count)


def _count(event: str, seconds: float, **kwargs) -> None:
  del kwargs
  if event == _COMPILED:
    with _lock:
      _compiled[0] += 1
      _compiled[1] += seconds
