"""Runs one program that a model wrote, and its tests, under limits.

Each program gets fresh interpreters with only the standard library (and the
packages named), in an empty directory that is removed afterwards, without input
and without the parent's environment.  The program and its tests are different
processes (see `sandbox_child`): a program cannot see the tests, and what it
returns is plain data, which the tests compare.  String hashes are fixed.

Limits: wall-clock and CPU time, address space of each process, size of each
file and of what is printed, open files, processes and threads, no core dumps.

Isolation, as far as the machine allows (`isolation` reports what is missing,
and the log warns once):

- Namespaces (`unshare`): no network at all, not even the local one; when the
  program ends, so does every process that it started.  Elsewhere the process
  group is killed, and a process that leaves it survives.
- Landlock (Linux ≥ 5.13): only Python's library, the system's shared libraries
  and the program's directory can be read, and only the last can be changed.
- For root: separate users for the program and for its tests.

This is not a security boundary: the program runs on the same kernel, and can
fill the disk with many files of permitted size.
"""

import contextlib
import ctypes
import enum
import functools
import importlib.util
import itertools
import logging
import os
import pathlib
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.errors import UserError

_log = logging.getLogger(__name__)
_FOLDER = pathlib.Path(__file__).parent
# Not a script, which Python would compile each time.
_MAIN = """
import sys
sys.path.insert(0, {folder!r})
import sandbox_child
del sys.path[0]
sandbox_child.main({settings!r})
"""
_NOBODY = 65534
# Seconds beyond the time limit, to start an interpreter on a loaded machine.
_GRACE = 60.0
_LEAST_MEMORY = 2**26
_PROCESSES = 16  # and threads at a time
_OUTPUT = 2**16  # bytes of printed output that are returned
_ENVIRONMENT = {
  'PATH': os.defpath,
  'LANG': 'C.UTF-8',
  'PYTHONHASHSEED': '0',
  'PYTHONUTF8': '1',
  'OPENBLAS_NUM_THREADS': '1',
}


class Outcome(enum.Enum):
  """The ways in which a program can end."""

  PASSED = 'passed'
  FAILED = 'failed'
  TIMED_OUT = 'timed_out'
  OUT_OF_MEMORY = 'out_of_memory'
  CRASHED = 'crashed'


class Result(NamedTuple):
  """The result of running a program.

  Attributes:
    outcome: `PASSED` if it ran to its end and no test raised.
    passed: a bool per test; all False if the tests did not run to their end.
    error: '' or one line: 'AssertionError: …' from the program or the first
      failed test, 'signal 11' for a crash, or the limit exceeded.
    output: the first bytes of standard output and error, as text.
  """

  outcome: Outcome
  passed: tuple[bool, ...]
  error: str
  output: str


class Isolation(NamedTuple):
  """The barriers between a program and the rest of the machine.

  Attributes:
    namespaces: separate processes, and no network.
    own_user: it runs as a separate user instead of root.
    landlock: version of the kernel's Landlock; 0 for none.
  """

  namespaces: bool = False
  own_user: bool = False
  landlock: int = 0

  @property
  def missing(self) -> tuple[str, ...]:
    """Abilities that a program has here but not under full isolation."""
    linux = sys.platform == 'linux'
    root = os.geteuid() == 0 and not self.own_user
    other = self.namespaces or self.own_user
    can = {
      'reach the network': not self.namespaces,
      'leave detached processes behind': not self.namespaces,
      'use any amount of memory': not linux,
      'start any number of processes': not linux or root,
      'act as root': root,
      'look into other processes': not (self.landlock or other),
      'change files of this user': not (self.landlock or self.own_user),
      'read files outside its directory': not self.landlock,
    }
    return tuple(what for what, able in can.items() if able)


@functools.cache
def isolation() -> Isolation:
  """Returns the best isolation that works here; tested once, then cached.

  Missing isolation is logged as a warning.

  Raises:
    UserError: not even a plain process of the interpreter works.
  """
  with contextlib.suppress(OSError):  # A folder that is read-only.
    for path in _FOLDER.glob('sandbox_*.py'):
      py_compile.compile(path, doraise=True)
  landlock = _landlock_version()
  own_users = (True, False) if os.geteuid() == 0 else (False,)
  for own_user, namespaces in itertools.product(own_users, (True, False)):
    candidate = Isolation(namespaces, own_user, landlock)
    try:
      # Loads modules in Python and in C.
      result = run('import random', timeout=_GRACE, isolated=candidate)
    except UserError as error:
      obstacle = error
      continue
    if result.outcome is Outcome.PASSED:
      for what in candidate.missing:
        _log.warning('a program that is run as a reward can %s', what)
      return candidate
    obstacle = UserError(f'sandbox: {sys.executable}: {result.error}.')
  raise obstacle


def run(
  program: str,
  tests: Sequence[str] = (),
  *,
  examples: Sequence[tuple[str, str]] = (),
  setup: str = '',
  entry_point: str = '',
  timeout: float = 10.0,
  memory: int = 2**29,
  packages: Sequence[str] = (),
  isolated: Isolation | None = None,
) -> Result:
  """Runs a program and its tests.

  The program is the module `program`, so its `__main__` section does not run,
  and tests use its names by `sandbox_harness`: but never one of a built-in
  function, unless it is the entry point, or of a module.  Tests run in order,
  and continue after one fails.  Without tests, a program that runs to its end
  passes.  Thread-safe: any number of programs can run at a time.

  Args:
    program: Python source.
    tests: Python source; each fails if it raises.
    examples: instead, pairs of standard input and expected output; the program
      runs once for each, with its `__main__` section.
    setup: Python source to run before the tests, once.
    entry_point: name under test.
    timeout: seconds of wall-clock time for program and tests, and of CPU time
      (rounded up) for each process.
    memory: bytes of address space of each process; it may have 16 processes
      and threads at a time.
    packages: installed packages that program and tests may import.
    isolated: None for the best that works here.

  Raises:
    UserError: the program could not be run, through no fault of its own.
  """
  if timeout <= 0 or memory < _LEAST_MEMORY:
    raise UserError(
      f'sandbox: timeout={timeout} must be positive, memory={memory} at least '
      f'{_LEAST_MEMORY}.'
    )
  isolated = isolated or isolation()
  settings = dict(
    timeout=float(timeout),
    memory=int(memory),
    processes=_process_limit(isolated),
    landlock=isolated.landlock,
    pairs=bool(examples),
  )
  texts = program, entry_point, setup, *tests, *itertools.chain(*examples)
  try:
    ended = _execute(isolated, settings, texts, packages)
  except OSError as error:
    raise UserError(f'sandbox: cannot start a program: {error}.') from error
  return _result(*ended, len(examples or tests))


def _result(report, status, text, count) -> Result:
  """Interprets the supervisor's report; see `sandbox_child`."""
  ready, _, verdict = report.partition('\n')
  if ready != 'ready':
    reason = f'{ready} {" ".join(text.split())[-200:]}'.strip()
    ended = 'had to be killed' if status is None else f'ended with {status}'
    raise UserError(
      f'sandbox: a program could not be run: {reason or "no report"}\n'
      f'The process that was to run it {ended}.'
    )
  none = (False,) * count
  if status is None:
    return Result(Outcome.TIMED_OUT, none, 'the time limit', text)
  if not verdict:  # The program killed its supervisor.
    return Result(Outcome.CRASHED, none, f'status {status}', text)
  word, digits, error = verdict[:-1].split(' ', 2)
  outcome = Outcome(word)
  passed = tuple(digit == '1' for digit in digits.strip('-'))
  whole = outcome is not Outcome.OUT_OF_MEMORY and len(passed) == count
  return Result(outcome, passed if whole else none, error, text)


def _execute(isolated, settings, texts, packages):
  """Starts the supervisor and waits until all processes have ended.

  Returns:
    The report, the status (None if it had to be killed), and the first bytes of
    output, as text.
  """
  top = pathlib.Path(tempfile.mkdtemp(prefix='sandbox-'))
  directory, user = top / 'work', 0
  try:
    directory.mkdir()
    if isolated.own_user:
      # Distinct per directory: inodes of one file system differ.
      user = 2**30 + 2 * (os.stat(directory).st_ino % 2**29)
      os.chown(directory, user, user)
      top.chmod(0o711)
    settings |= dict(user=user, packages=_link(packages, top))
    main = _MAIN.format(folder=str(_FOLDER), settings=settings)
    places = dict.fromkeys(('HOME', 'TMPDIR'), str(directory))
    # The program may only append: the tests print there, too.
    with (
      (top / 'printed').open('ab') as printed,
      subprocess.Popen(
        [*_command(isolated), '-c', main],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=printed,
        cwd=directory,
        env=_ENVIRONMENT | places,
        start_new_session=True,
      ) as process,
    ):
      try:
        report, _ = process.communicate(
          b''.join(map(_frame, texts)), settings['timeout'] + _GRACE
        )
        status = process.returncode
      except subprocess.TimeoutExpired as error:
        report, status = error.stdout or b'', None
      finally:
        # On macOS a group with only zombies left does not exist.
        with contextlib.suppress(ProcessLookupError, PermissionError):
          os.killpg(process.pid, signal.SIGKILL)
    with (top / 'printed').open('rb') as file:
      text = file.read(_OUTPUT).decode('utf-8', 'replace')
    return report.decode('utf-8', 'replace'), status, text
  finally:
    _remove(top)


def _link(packages, top):
  """Links to packages in a folder; returns it and the paths behind."""
  paths = []
  for name in packages:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
      raise UserError(f'sandbox: packages: {name!r} is not installed here.')
    package = pathlib.Path(spec.submodule_search_locations[0])
    # Wheels keep shared libraries beside the package.
    for path in (package, package.with_name(f'{name}.libs')):
      if path.exists():
        (top / 'packages').mkdir(exist_ok=True)
        (top / 'packages' / path.name).symlink_to(path)
        paths.append(str(path.resolve()))
  return [str(top / 'packages'), *paths] if paths else []


def _remove(directory):
  """Removes a directory of any depth and permissions."""
  try:
    shutil.rmtree(directory)
  except (OSError, RecursionError):
    for command in (['chmod', '-R', 'u+rwx'], ['rm', '-rf']):
      subprocess.run([*command, directory], capture_output=True)
    if os.path.lexists(directory):
      raise UserError(
        f'sandbox: cannot remove {directory}: remove it by hand.'
      ) from None


def _frame(text: str) -> bytes:
  data = text.encode('utf-8', 'surrogatepass')
  return len(data).to_bytes(4, 'big') + data


def _command(isolated: Isolation) -> list[str]:
  """Returns the command that starts the interpreter."""
  command = []
  if isolated.namespaces:
    command += ['unshare', '--net', '--pid', '--fork', '--kill-child']
    # In a user namespace anyone may; a user mapped to another than root lacks
    # root's rights there.
    if not isolated.own_user:
      command += [f'--map-user={_NOBODY}', f'--map-group={_NOBODY}']
  return [*command, sys.executable, '-s', '-S', '-P', '-B']


def _process_limit(isolated: Isolation) -> int:
  """Returns an RLIMIT_NPROC that allows `_PROCESSES`; 0 if it has no effect.

  The kernel counts processes and threads per user and namespace (per user
  before Linux 5.14, where namespaces are thus not used).  It does not limit
  root.
  """
  if isolated.own_user:
    return _PROCESSES
  if sys.platform != 'linux' or os.geteuid() == 0:
    return 0
  if isolated.namespaces:
    return _PROCESSES + 3  # `unshare`, the supervisor and the tests
  running = 0
  for task in pathlib.Path('/proc').glob('[0-9]*/task/*'):
    with contextlib.suppress(OSError):  # It has ended meanwhile.
      running += task.stat().st_uid == os.geteuid()
  return _PROCESSES + running


def _landlock_version() -> int:
  """Returns the kernel's version of Landlock; 0 without Landlock."""
  if sys.platform != 'linux':
    return 0
  # landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
  return max(0, ctypes.CDLL(None).syscall(444, None, 0, 1))
