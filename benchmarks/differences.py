"""Differences between two run folders, bit for bit or up to rounding."""

import collections
import json
import math
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file

FILES = 'metrics.jsonl', 'samples.jsonl', 'hf/model.safetensors'
SIDES = 'old', 'new'
_TENSORS = 3  # listed at most: after an update all differ


def compare(old, new, tolerance=0.0, allowed=(), sides=SIDES) -> list[str]:
  """Returns a line for each field that differs between two run folders.

  Args:
    old, new: folders.
    tolerance: greatest relative difference of floats; 0 compares bits.  For a
      tensor it is relative to its greatest element.  Rewards of samples, and
      all that is not a float, must be equal in any case.
    allowed: 'metrics:FIELD' or 'samples:FIELD', fields that one side may lack.
    sides: names of the folders.
  """
  lines = []
  for name in FILES:
    tables = [_read(pathlib.Path(folder, name)) for folder in (old, new)]
    first, greatest = {}, {}
    for step, field, what, amount in _differences(*tables, tolerance, sides):
      if what == 'differs' or f'{name.split(".")[0]}:{field}' not in allowed:
        first.setdefault((field, what), step)
        greatest[field] = max(greatest.get(field, 0.0), amount)
    messages = [] if any(tables) else ['missing']
    for (field, what), step in first.items():
      start = f' from step {step}' if step else ''
      amount = f', relatively by up to {greatest[field]:.2g}'
      shown = amount if greatest[field] < math.inf else ''
      messages.append(f'{field} {what}{start}{shown}')
    if name == FILES[-1] and len(messages) > _TENSORS:
      messages[_TENSORS:] = [f'{len(messages) - _TENSORS} more']
    lines += [f'{name}: {line}' for line in messages]
  return lines


def _read(path: pathlib.Path) -> dict[tuple[int, int], dict]:
  """Returns flat records by step and by number within it; {} if missing."""
  if not path.is_file():
    return {}
  if path.suffix == '.safetensors':
    return {(0, 0): load_file(path)}
  records, counts = {}, collections.Counter()
  for line in path.read_text(encoding='utf-8').splitlines():
    record = json.loads(line)
    step = record['step']
    records[step, counts[step]] = dict(_leaves(record))
    counts[step] += 1
  return records


def _leaves(record: dict, prefix: str = ''):
  for name, value in record.items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{name}/')
    else:
      yield prefix + name, value


def _differences(old, new, tolerance: float, sides):
  """Yields (step, field, what differs, relative difference)."""
  for key in sorted(old.keys() | new.keys()):
    x, y = old.get(key), new.get(key)
    if x is None or y is None:
      yield key[0], 'record', f'only in {sides[x is None]}', math.inf
      continue
    # Metrics have sums of rewards, which another program may round otherwise.
    exact = ('reward', 'rewards') if 'response' in x else ()
    for field in sorted(x.keys() | y.keys()):
      if field not in x or field not in y:
        yield key[0], field, f'only in {sides[field not in x]}', math.inf
        continue
      relative = difference(x[field], y[field])
      if relative > (0.0 if field.split('/')[0] in exact else tolerance):
        yield key[0], field, 'differs', relative


def difference(old, new) -> float:
  """Returns the relative difference of two values or arrays.

  It is 0 only for equal bits, and infinite for all but finite floats.
  """
  if not isinstance(old, np.ndarray) and repr(old) == repr(new):
    return 0.0
  x, y = np.asarray(old), np.asarray(new)
  if (x.dtype, x.shape) != (y.dtype, y.shape) or x.dtype.kind != 'f':
    return math.inf
  if x.tobytes() == y.tobytes():
    return 0.0
  if not (np.isfinite(x).all() and np.isfinite(y).all()):
    return math.inf
  x, y = x.astype(np.float64), y.astype(np.float64)
  scale = max(np.abs(x).max(), np.abs(y).max(), sys.float_info.min)
  # Two zeros of different signs differ, too.
  return max(float(np.abs(x - y).max() / scale), sys.float_info.min)
