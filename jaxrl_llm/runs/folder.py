"""A run's folder: its lock, its configuration and its starts.

A run folder holds `config.json` (the latest configuration), `starts.jsonl` (a
line per start: where, with what and how it was configured) and `lock` (the
current owner) beside the run's records and checkpoints.  A resume writes the
first two once the run is known to continue.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxrl_llm import processes
from jaxrl_llm.atomic import as_json, write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.metrics import last_step

_PACKAGES = (
  *('jaxrl_llm', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint'),
  *('transformers', 'numpy'),
)

# Facts that numbers depend on.
_NUMERIC = (
  *('backend', 'device_kind', 'device_count', 'process_count'),
  *('jax', 'jaxlib'),
)

# Names whose values must not be written down: api_key, HF_TOKEN, apiKey.
SECRET = re.compile(
  r'(?i)((api|access|private)_?key|passw(or)?d|secret|credentials|auth'
  r'|authorization|(?<!eos_|pad_|end_)(?<!mask_|stop_)token)$'
)


def software() -> dict:
  """Returns versions, platform and command line; no environment variables.

  The command line is None if the name of a flag suggests a secret.
  """
  versions = {'python': platform.python_version()}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  return {
    'versions': versions,
    'platform': platform.platform(),
    'machine': platform.machine(),
    'command': None
    if any(SECRET.search(item.partition('=')[0]) for item in sys.argv)
    else list(sys.argv),
  }


def devices() -> dict:
  """Returns the devices of JAX.

  Initialises JAX's backend, so call it after `jax.distributed.initialize`.
  """
  return {
    'backend': jax.default_backend(),
    'device_kind': jax.devices()[0].device_kind,
    'device_count': jax.device_count(),
    'process_count': jax.process_count(),
  }


def environment() -> dict:
  """Combines `software` and `devices`."""
  return software() | devices()


def read_starts(workdir) -> list[dict]:
  """Returns the starts of a run, oldest first; those that can be read."""
  starts = []
  with contextlib.suppress(OSError):
    content = (pathlib.Path(workdir) / 'starts.jsonl').read_bytes()
    for line in content.splitlines():
      with contextlib.suppress(ValueError):
        starts.append(json.loads(line))
  return [start for start in starts if isinstance(start, dict)]


def _commit() -> dict:
  """Returns the git commit of this package; None where it is in none."""
  root = pathlib.Path(__file__).parents[2]

  def git(*arguments):
    done = subprocess.run(
      ['git', '-C', str(root), *arguments], capture_output=True, timeout=10
    )
    return done.stdout.decode().strip() if done.returncode == 0 else None

  try:
    # Installed elsewhere, the package may lie in a repository of the user's.
    if git('ls-files', '--error-unmatch', __file__) is None:
      return {'commit': None, 'dirty': None}
    return {
      'commit': git('rev-parse', 'HEAD'),
      'dirty': bool(git('status', '--porcelain', '--untracked-files=no')),
    }
  except (OSError, subprocess.SubprocessError):
    return {'commit': None, 'dirty': None}


@dataclasses.dataclass
class RunFolder(contextlib.AbstractContextManager):
  """A run's folder, locked for as long as this object is open.

  With several processes, only process 0 holds the lock.

  Use `open_run`, as a context manager.

  Attributes:
    path: the folder.
    resuming: True if the folder already held this run.
    notes: changes since the last start, such as another version of JAX or
      changed code, a line each.
    former: in process 0, the configuration at that time; else None.
  """

  path: pathlib.Path
  resuming: bool
  notes: Sequence[str] = ()
  former: dict | None = None
  _start: dict | None = None
  _lock: Any = None

  def describe(self, step: int) -> None:
    """Writes `config.json`, and the start to `starts.jsonl`.

    All processes call it, once the run is known to continue: a refused resume
    leaves the folder unchanged.

    Args:
      step: number of completed steps.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    processes.on_main(lambda: self._describe(step), 'the start of the run')

  def _describe(self, step: int) -> None:
    try:
      _write_config(self.path, self._start['config'])
      starts = self.path / 'starts.jsonl'
      with open(starts, 'a', encoding='utf-8') as file:
        file.write(json.dumps({'step': step, **self._start}) + '\n')
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
      raise _unusable(self.path, error) from error

  def refuse_loss(self) -> None:
    """Raises UserError for a run that has lost all its checkpoints."""
    processes.on_main(self._refuse_loss, 'the run folder')

  def _refuse_loss(self) -> None:
    # Two saves were due by then, and the second waits for the first.
    due = 2 * self.former['checkpoints']['every'] + 1 if self.resuming else 0
    if self.resuming and _lines(self.path / 'metrics.jsonl') > due:
      raise UserError(
        f'{self.path / "checkpoints"} is missing or empty: restore it from a '
        'copy'
      )

  def close(self) -> None:
    """Releases the lock.  The folder stays as it is."""
    _give_back(self._lock)
    self._lock = None

  def __exit__(self, *exc_info):
    self.close()


def open_run(
  workdir,
  resume: bool,
  config: dict,
  allowed: frozenset[str] = frozenset(),
  code: Sequence[str] = (),
) -> RunFolder:
  """Creates or reopens a run folder and takes its lock.

  With `resume`, a folder without a run starts afresh, so that the same command
  line serves the first start and every restart of a preemptible job.  A run
  that has completed no step starts afresh too, with any configuration.  With
  several processes, all call it; process 0 does the work, and the others share
  its result or error.

  Args:
    workdir: the folder; created where missing.
    resume: continue the run that the folder holds.
    config: the run's nested configuration, as JSON values (tuples become
      lists), for `config.json`.
    allowed: dotted keys, such as `'steps'` or `'log'` (with all below it),
      that may differ from the stored configuration on resume.
    code: the user's files that the run executes; their sha256 goes into
      `starts.jsonl`.  Their imports are not recorded.

  Raises:
    UserError: the folder is in use, holds a run and `resume` is off, or holds
      a run of another configuration.
  """
  path, opened = pathlib.Path(workdir), []

  def open_here():
    opened.append(_open(path, resume, config, allowed, code))
    return [opened[0].resuming, opened[0].notes]

  resuming, notes = processes.on_main(open_here, 'the run folder')
  return opened[0] if opened else RunFolder(path, resuming, notes)


def _open(path, resume, config, allowed, code) -> RunFolder:
  config = as_json(config, 'configuration')
  lock = None
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(path)
    stored, notes = _stored_config(path), []
    changed = {}
    if stored is not None and _has_begun(path):
      if not resume:
        raise UserError(
          f'{path} already holds a run.\n'
          'Continue it with --resume, or name another --workdir.'
        )
      changed = _compare(path, stored, config, allowed)
    start = {'time': _now(), **environment(), **_commit()}
    start['code_sha256'] = {str(file): _file_sha256(file) for file in code}
    if stored is None:
      _write_config(path, config)
    else:
      notes = _differences((read_starts(path) or [{}])[-1], start)
    start |= {'changed': changed, 'config': config}
    return RunFolder(path, stored is not None, notes, stored, start, lock)
  except OSError as error:
    _give_back(lock)
    raise _unusable(path, error) from error
  except BaseException:
    _give_back(lock)
    raise


def _write_config(path: pathlib.Path, config: dict) -> None:
  write_atomically(path / 'config.json', json.dumps(config, indent=2) + '\n')


def _has_begun(path: pathlib.Path) -> bool:
  """Returns True if a run has completed a step."""
  checkpoints, records = path / 'checkpoints', path / 'metrics.jsonl'
  saved = checkpoints.is_dir() and any(checkpoints.iterdir())
  # Step 0 has one line; several are a run's, even if the first is damaged.
  return saved or _lines(records) > 1 or last_step(records) > 0


def _lines(path: pathlib.Path) -> int:
  return path.read_bytes().count(b'\n') if path.exists() else 0


def _differences(before: dict, now: dict) -> list[str]:
  """Returns what differs between two starts and may change numbers."""
  old, new = ({**x, **x.get('versions', {})} for x in (before, now))
  notes = [
    f'{name} was {old[name]}, is {new[name]}: numbers may differ in the last '
    'bits'
    for name in _NUMERIC
    if old.get(name, new[name]) != new[name]
  ]
  old, new = before.get('code_sha256', {}), now['code_sha256']
  notes += [
    f'{file} has changed: earlier records come from the old code, later ones '
    'from the new'
    for file in new
    if old.get(file, new[file]) != new[file]
  ]
  return notes


def _unusable(path, error) -> UserError:
  return UserError(
    f'The run folder {path} cannot be used: {error.strerror or error}.\n'
    'Make room or change its permissions, or name another --workdir.'
  )


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(timespec='seconds')


def _take_lock(path):
  # The kernel releases the lock however its owner dies, so the content that a
  # dead owner left in the file never blocks a run.
  lock = open(path / 'lock', 'a+', encoding='utf-8')  # noqa: SIM115
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.seek(0)
    owner = _owner(lock.read())
    lock.close()
    raise UserError(
      f'{path} is in use by another run: {owner}.\n'
      'Wait for it, stop it, or name another --workdir.'
    ) from None
  except OSError:
    lock.close()
    raise
  owner = {'pid': os.getpid(), 'host': socket.gethostname(), 'since': _now()}
  lock.truncate(0)
  lock.write(json.dumps(owner) + '\n')
  lock.flush()
  # A forked child shares the lock, and would keep it after its parent's death.
  os.register_at_fork(after_in_child=lock.close)
  return lock


def _give_back(lock):
  if lock is not None and not lock.closed:
    # Emptied, not removed: another process may have opened this very file.
    lock.truncate(0)
    lock.close()


def _owner(text):
  try:
    owner = json.loads(text)
    return f'pid {owner["pid"]} on {owner["host"]} since {owner["since"]}'
  except (ValueError, KeyError, TypeError):
    return 'it has only just started'


def _stored_config(path):
  file = path / 'config.json'
  if not file.exists():
    return None
  try:
    stored = json.loads(file.read_text(encoding='utf-8'))
    if not isinstance(stored, dict):
      raise ValueError('it is not an object')
  except ValueError as error:
    raise UserError(
      f'{file} is not a JSON configuration: {error}.\n'
      'Restore it from a copy, or name another --workdir.'
    ) from error
  return stored


def _file_sha256(file):
  with open(file, 'rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()


def _flat(config, prefix=''):
  """Returns leaves by dotted key.  An empty dictionary is a leaf."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      leaves.update(_flat(value, f'{prefix}{key}.'))
    else:
      leaves[prefix + key] = value
  return leaves


def _compare(path, stored, config, allowed) -> dict[str, list]:
  """Returns the changed fields, with their old and new values.

  Raises:
    UserError: one of them may not change.
  """
  old, new = _flat(stored), _flat(config)
  changed = {
    key: [old.get(key), new.get(key)]
    for key in sorted(old.keys() | new.keys())
    if _shown(old, key) != _shown(new, key)
  }
  below = tuple(f'{key}.' for key in allowed)
  different = [key for key in changed if not f'{key}.'.startswith(below)]
  if different:
    shown = '; '.join(
      f'{key} was {_shown(old, key)}, is {_shown(new, key)}'
      for key in different[:3]
    )
    more = len(different) - 3
    raise UserError(
      f'{path} holds a run of another configuration:\n'
      f'{shown}{f"; and {more} more" if more > 0 else ""}.\n'
      'Resume with the stored values, name another --workdir, or add '
      f'--allow_change={",".join(different[:3])}.'
    )
  return changed


def _shown(values, key):
  return json.dumps(values[key]) if key in values else 'absent'
