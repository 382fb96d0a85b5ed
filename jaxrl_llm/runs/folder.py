"""A run's folder: its lock and its description.

A run folder holds `config.json` (the requested configuration), `env.json` (the
latest environment) and `lock` (the current owner) beside the run's records and
checkpoints.  A resume rewrites the first two once the run is known to continue.
"""

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
import sys
from collections.abc import Sequence

import jax

from jaxrl_llm import processes
from jaxrl_llm.atomic import as_json, write_atomically
from jaxrl_llm.errors import UserError

_PACKAGES = (
  'jaxrl_llm',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'transformers',
  'numpy',
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


class RunFolder:
  """A run's folder, locked for as long as this object is open.

  With several processes, only process 0 holds the lock.

  Use `open_run`, as a context manager.

  Attributes:
    path: the folder.
    resuming: True if the folder already held this run.
    changed: code files whose content has changed since the run last began or
      resumed.
    former: in process 0, the configuration at that time; else None.
  """

  def __init__(
    self,
    path: pathlib.Path,
    resuming: bool,
    changed: list[str],
    lock,
    former: dict | None = None,
    description: dict | None = None,
  ):
    self.path = path
    self.resuming = resuming
    self.changed = changed
    self.former = former
    self._description = description
    self._lock = lock

  def describe(self) -> None:
    """Writes `config.json` and `env.json`.  All processes call it.

    A new run has them from the start.  On a resume, call it once the run is
    known to continue: a refused resume leaves them unchanged.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    processes.on_main(self._describe, 'the description of the run')

  def _describe(self):
    try:
      for name, content in (self._description or {}).items():
        text = json.dumps(content, indent=2) + '\n'
        write_atomically(self.path / f'{name}.json', text)
    except OSError as error:
      raise _unusable(self.path, error) from error

  def close(self) -> None:
    """Releases the lock.  The folder stays as it is."""
    _give_back(self._lock)
    self._lock = None

  def __enter__(self):
    return self

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
  line serves the first start and every restart of a preemptible job.  With
  several processes, all call it; process 0 does the work, and the others share
  its result or error.

  Args:
    workdir: the folder; created where missing.
    resume: continue the run that the folder holds.
    config: the run's nested configuration, as JSON values (tuples become
      lists), for `config.json`.
    allowed: dotted keys, such as `'steps'` or `'log'` (with all below it),
      that may differ from the stored configuration on resume.  The new values
      are stored by `RunFolder.describe`.
    code: the user's files that the run executes; their sha256 goes into
      `env.json`.  Their imports are not recorded.

  Raises:
    UserError: the folder is in use, holds a run and `resume` is off, or holds
      a run of another configuration.
  """
  path, opened = pathlib.Path(workdir), []

  def open_here():
    opened.append(_open(path, resume, config, allowed, code))
    return [opened[0].resuming, opened[0].changed]

  resuming, changed = processes.on_main(open_here, 'the run folder')
  return opened[0] if opened else RunFolder(path, resuming, changed, None)


def _open(path, resume, config, allowed, code) -> RunFolder:
  config = as_json(config, 'configuration')
  lock, changed = None, []
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(path)
    stored = _stored_config(path)
    if stored is not None:
      if not resume:
        raise UserError(
          f'{path} already holds a run.\n'
          'Continue it with --resume, or name another --workdir.'
        )
      _compare(path, stored, config, allowed)
    env = environment()
    env['code_sha256'] = {str(file): _file_sha256(file) for file in code}
    if stored is not None:
      changed = _changed(path, env['code_sha256'])
    description = {'config': config, 'env': env}
    resuming = stored is not None
    folder = RunFolder(path, resuming, changed, lock, stored, description)
    if not resuming:
      folder._describe()
  except OSError as error:
    _give_back(lock)
    raise _unusable(path, error) from error
  except BaseException:
    _give_back(lock)
    raise
  return folder


def _unusable(path, error) -> UserError:
  return UserError(
    f'The run folder {path} cannot be used: {error.strerror or error}.\n'
    'Make room or change its permissions, or name another --workdir.'
  )


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
  now = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  owner = {'pid': os.getpid(), 'host': socket.gethostname(), 'since': now}
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


def _changed(path, code):
  """Returns the files that differ from their record in env.json."""
  try:
    env = json.loads((path / 'env.json').read_text(encoding='utf-8'))
    before = dict(env['code_sha256'])
  except (OSError, ValueError, KeyError, TypeError):
    return []  # An older or damaged record proves nothing.
  return [file for file in code if before.get(file, code[file]) != code[file]]


def _flat(config, prefix=''):
  """Returns leaves by dotted key.  An empty dictionary is a leaf."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      leaves.update(_flat(value, f'{prefix}{key}.'))
    else:
      leaves[prefix + key] = value
  return leaves


def _compare(path, stored, config, allowed):
  old, new = _flat(stored), _flat(config)
  different = []
  for key in sorted(old.keys() | new.keys()):
    parts = key.split('.')
    heads = {'.'.join(parts[: n + 1]) for n in range(len(parts))}
    if heads & allowed:
      continue
    before, now = (_shown(values, key) for values in (old, new))
    if before != now:
      different.append(f'{key} was {before}, is {now}')
  if different:
    more = len(different) - 3
    raise UserError(
      f'{path} holds a run of another configuration:\n'
      f'{"; ".join(different[:3])}{f"; and {more} more" if more > 0 else ""}.\n'
      'Resume with the stored values, or name another --workdir.'
    )


def _shown(values, key):
  return json.dumps(values[key]) if key in values else 'absent'
