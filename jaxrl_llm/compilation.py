"""Caches compiled programs in a folder for later processes.

JAX stores and finds them (its persistent compilation cache); this module sets
and tidies the user's folder.  A program's key covers its HLO, its compiler
options, JAX's version and the kind of device.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import tempfile
import zlib

import jax
from jaxlib import utils

# Bytes that the folder may hold when a process begins; beyond, the least
# recently used programs are removed.
LIMIT = 1 << 30

# Small programs too: they are many, and each costs some 20 ms.
_THRESHOLDS = {
  'jax_persistent_cache_min_compile_time_secs': 0.0,
  'jax_persistent_cache_min_entry_size_bytes': -1,
}
ENTRIES = '*-cache'  # as JAX names the files of programs
_CHECKED = 'checked'  # a file whose time is that of the last check of entries
_ZLIB = b'\x78'  # the first byte of zlib's output
_REQUEST = '/jax/compilation_cache/compile_requests_use_cache'


def use() -> str | None:
  """Lets JAX cache what it compiles.  Call it before anything is compiled.

  A folder that the user has chosen, by `JAX_COMPILATION_CACHE_DIR` or in
  `jax.config`, is left as it is; '' turns the cache off, as does
  `JAX_ENABLE_COMPILATION_CACHE=0`.  The other variables of JAX's cache apply,
  too; `JAX_COMPILATION_CACHE_MAX_SIZE` replaces `LIMIT`, and 0 is no cache.

  Several runs may use one folder at a time.

  Returns:
    The reason, in one line, if the folder cannot be used; else None.
  """
  if jax.__version__.startswith('0.10.'):
    quiet_loader()
  for name, value in _THRESHOLDS.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
  chosen = jax.config.jax_compilation_cache_dir is not None
  if chosen or not jax.config.jax_enable_compilation_cache:
    return None
  limit = jax.config.jax_compilation_cache_max_size
  if limit == 0:
    return None
  folder = None
  try:
    folder = default_folder()
    _open(folder)
    tidy(folder, limit if limit > 0 else LIMIT)
  except OSError as error:
    where = f'{folder}: ' if folder else ''
    return (
      'no compilation cache, every start compiles again: '
      f'{where}{error.strerror or error}'
    )
  # JAX's own bound keeps a second file per program: a process killed between
  # the two writes leaves a folder that accepts no further program.
  jax.config.update('jax_compilation_cache_max_size', -1)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  return None


@functools.cache
def quiet_loader() -> None:
  """Silences an error that jaxlib 0.10 logs for each program it reads on CPU.

  It warns of SIGILL because the program was compiled for the feature
  "prefer-no-gather", which the host lacks.  That is a preference of LLVM, not
  an instruction; real features are part of the folder's name.  With a GPU or
  TPU as default backend nothing is silenced.
  """

  def listen(event: str, **kwargs) -> None:
    del kwargs
    if event == _REQUEST and jax.default_backend() == 'cpu':
      utils.absl_set_min_log_level(3)  # The level above errors: fatal ones.

  jax.monitoring.register_event_listener(listen)


def leave() -> None:
  """Undoes `use`, before anything is compiled.

  For several processes: JAX lets only the first one write.  Where each has its
  own disk, the others would compile what the first one reads, and some
  compilers work on a program together.
  """
  with contextlib.suppress(OSError):
    if jax.config.jax_compilation_cache_dir == str(default_folder()):
      jax.config.update('jax_compilation_cache_dir', None)


def default_folder() -> pathlib.Path:
  """Returns the folder of this user's programs for this kind of machine.

  Below `$XDG_CACHE_HOME`, or `~/.cache`.  A program for a CPU holds its
  instructions, which another machine of the same home may lack.

  Raises:
    OSError: the home folder is unknown.
  """
  # The XDG base directory standard ignores relative paths.
  base = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(base):
    base = os.path.expanduser('~/.cache')
  if not os.path.isabs(base):
    raise OSError('the home folder is not known')
  return pathlib.Path(base) / 'jaxrl_llm' / 'programs' / _machine()


def tidy(folder: pathlib.Path, limit: int) -> None:
  """Removes what is broken or beyond the limit.

  A program that a kill or a full disk has cut short would be read, warned about
  and compiled again at every start.

  Args:
    folder: of programs.
    limit: bytes.
  """
  mark = folder / _CHECKED
  since = mark.stat().st_mtime if mark.exists() else 0.0
  mark.touch()
  entries = []
  for path in folder.glob(ENTRIES):
    # Another process may remove it first.
    with contextlib.suppress(FileNotFoundError):
      status = path.stat()
      if status.st_mtime >= since and not _is_whole(path):
        path.unlink()
      else:
        used = max(status.st_atime, status.st_mtime)
        entries.append((used, status.st_size, path))
  total = sum(size for _, size, _ in entries)
  for _, size, path in sorted(entries):
    if total <= limit:
      break
    path.unlink(missing_ok=True)
    total -= size


def _open(folder: pathlib.Path) -> None:
  """Creates the folder; raises OSError if it is not writable or trustworthy."""
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  # Programs are run as they are found: only the user may write them.
  status = folder.stat()
  if status.st_uid != os.getuid() or status.st_mode & 0o022:
    raise OSError('others may write there')
  with tempfile.TemporaryFile(dir=folder):
    pass


def _is_whole(path: pathlib.Path) -> bool:
  content = path.read_bytes()
  if content[:1] != _ZLIB:  # Zstandard, whose reader is not always there.
    return bool(content)
  try:
    zlib.decompress(content)
  except zlib.error:
    return False
  return True


def _machine() -> str:
  """Returns a short name that machines with the same CPU share."""
  known = [platform.machine(), platform.processor()]
  with contextlib.suppress(OSError), open('/proc/cpuinfo', 'rb') as file:
    # The first processor's name and what it can do.
    known += [
      line
      for line in file.read().split(b'\n\n')[0].split(b'\n')
      if line.split(b'\t')[0] in (b'model name', b'flags', b'Features')
    ]
  return hashlib.sha256(repr(known).encode()).hexdigest()[:16]
