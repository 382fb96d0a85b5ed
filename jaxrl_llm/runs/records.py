"""Files of one JSON record per line that survive a kill and a resume."""

import json
import math
import os
import pathlib

from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError


class RecordFile:
  """Appends records with a `step`, one JSON object per line.

  A line is one write to the kernel, so a killed process leaves at most its last
  line broken, which `cut` removes on resume.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self._file = open(self.path, 'ab', buffering=0)  # noqa: SIM115

  def write(self, record: dict) -> None:
    line = json.dumps(record, allow_nan=False).encode() + b'\n'
    try:
      written = self._file.write(line)
    except OSError as error:
      raise self._failed(error.strerror) from error
    if written != len(line):
      raise self._failed('the disk is full')

  def sync(self) -> None:
    """Returns when all records are on the disk."""
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise self._failed(error.strerror) from error

  def close(self) -> None:
    self._file.close()

  def _failed(self, reason):
    return cannot_write(self.path, reason)


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


def _parse(line):
  """Parses the record of a line; returns None if it is broken."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  known = isinstance(record, dict) and type(record.get('step')) is int
  return record if known and line.endswith(b'\n') else None


def cut(path, step: int | None, complete: bool = False) -> None:
  """Removes the records after a step, and broken lines behind it.

  Atomic: the file is the old one or the cut one.  Kept lines keep their bytes.

  Args:
    path: the file; may be absent.
    step: the last step to keep; None keeps nothing.
    complete: also require one record for each step, from 0 or 1 to `step`
      itself (if that is above 0).

  Raises:
    UserError: a line before the last to keep is broken, or records are missing.
  """
  path = pathlib.Path(path)
  lines = []
  if path.exists():
    lines = path.read_bytes().splitlines(keepends=True)
  records = [_parse(line) for line in lines]
  kept = [i for i, each in enumerate(records) if _is_kept(each, step)]
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
  if len(kept) < len(lines):
    write_atomically(path, b''.join(lines[i] for i in kept))


def _is_kept(record: dict | None, step: int | None) -> bool:
  return record is not None and step is not None and record['step'] <= step


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
