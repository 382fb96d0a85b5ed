"""Runs one program that a model wrote, under limits.

Each program gets a fresh interpreter with only the standard library, in its own
session, in an empty directory that is removed afterwards, without input and
without the parent's environment.  The interpreter's options -s, -P, -S and -B
and a fresh environment amount to -I with one addition: string hashes are fixed,
so that a program that depends on the order of a set has one result.

Limits: wall-clock and CPU time, address space of each process, size of each
file, open files, processes and threads, no core dumps.

Isolation, as far as the machine allows (`isolation` reports what is missing,
and the log warns once):

- Namespaces (`unshare`): no network at all, not even the local one; when the
  program ends, so does every process that it started, detached ones too.
- Landlock (Linux ≥ 5.13): files can be created, changed and removed only in
  the program's directory; other processes cannot be inspected or, since
  version 6 (Linux 6.12), signalled.
- For root: a separate user, who can do neither; one who can read everything if
  only root can reach Python's library.

Without namespaces on Linux, orphans of the program become children of its
supervisor, which kills them all in the end; a program that first kills the
supervisor (possible only without Landlock and a separate user) leaves them
alive.  The process limit then adds to the processes that the user already has.
Elsewhere (macOS) the process group is killed, a process that leaves it
survives, and neither memory nor the number of processes is limited.  If the
caller itself is killed, its programs end by their time limit and leave their
directories behind.

This is not a security boundary.  The program runs on the same kernel, reads
what this user can read (as a separate user: what everyone can read), and can
fill the disk with many files of permitted size, which are slow to remove.  Nor
is the verdict proof against an attacker: tests run in the program's process.
Exiting early (`os._exit`, `SystemExit`), printing or forging success, replacing
built-in functions or `__main__`, and results that claim to equal everything all
fail.  But what methods return and attributes hold is not checked, and a program
that searches its own process for the harness, speaks its protocol, or replaces
parts of a module that the tests or harness import can still pass.
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
import platform
import py_compile
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.errors import UserError

_log = logging.getLogger(__name__)
_FOLDER = pathlib.Path(__file__).parent
# Not a script: Python would compile it each time.  The program must not import
# these modules, whose names may be those of its own.
_MAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import sandbox_child
del sys.path[0]
for name in [name for name in sys.modules if name.startswith('sandbox_')]:
  del sys.modules[name]
sandbox_child.main(sys.argv[2:])
"""
_NOBODY = 65534
# Seconds beyond the time limit, to start an interpreter on a loaded machine.
_GRACE = 60.0
# Seconds from a verdict until all processes have ended by themselves.
_END = 10.0
_LEAST_MEMORY = 2**26


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
def isolation(interpreter: str = sys.executable) -> Isolation:
  """Returns the best isolation that works here; tested once, then cached.

  Missing isolation is logged as a warning.

  Args:
    interpreter: path of the Python that will run programs.

  Raises:
    UserError: not even a plain process of the interpreter works.
  """
  with contextlib.suppress(OSError):  # A folder that is read-only.
    for path in _FOLDER.glob('sandbox_*.py'):
      py_compile.compile(path, doraise=True)
  landlock = _landlock_version()
  tries = [Isolation(space, False, landlock) for space in (True, False)]
  if os.geteuid() == 0:
    tries = [each._replace(own_user=True) for each in tries] + tries
  if sys.platform != 'linux':
    tries = [Isolation()]
  for candidate in tries:
    try:
      result = run(
        'import random',  # Loads modules in Python and in C.
        timeout=_GRACE,
        isolated=candidate,
        interpreter=interpreter,
      )
    except UserError as error:
      obstacle = error
      continue
    if result.outcome is Outcome.PASSED:
      for what in candidate.missing:
        _log.warning('a program that is run as a reward can %s', what)
      return candidate
    obstacle = UserError(f'sandbox: {interpreter}: {result.error}.')
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
  processes: int = 16,
  files: int = 64,
  file_size: int = 2**24,
  output: int = 2**16,
  packages: Sequence[str] = (),
  interpreter: str = sys.executable,
  isolated: Isolation | None = None,
) -> Result:
  """Runs a program, then its tests in the same process.

  The program is the module `program`, so its `__main__` section does not run.
  Tests see its names, but the original built-in functions.  A function that
  they call must return objects with Python's own operators: not of a program's
  class that defines `__eq__`.  Tests run in order, and continue after one
  fails.  Without tests, a program that runs to its end passes.

  Thread-safe: any number of programs can run at a time.

  Args:
    program: Python source.
    tests: Python source; each fails if it raises.
    setup: Python source to run between program and tests, once.
    entry_point: name under test.  If given, names of the program that shadow
      built-in functions are hidden from the tests, except this one: the program
      cannot supply its own `abs` or `len`.
    timeout: seconds of wall-clock time for program and tests, and of CPU time
      (rounded up) for each process.
    memory: bytes of address space of each process; all its processes together
      may use `processes` times as much.
    processes: processes and threads at a time.
    files: open at a time, in each process.
    file_size: bytes of each file.
    output: bytes of printed output to keep; the rest is dropped.
    interpreter: path of a Python, 3.11 or later.
    isolated: None for the best that works here.

  Raises:
    UserError: the program could not be run, through no fault of its own.
  """
  if timeout <= 0 or memory < _LEAST_MEMORY or min(processes, files) < 1:
    raise UserError(
      f'sandbox: timeout={timeout}, memory={memory}, processes={processes}, '
      f'files={files}.\nAll must be positive, memory at least {_LEAST_MEMORY}.'
    )
  if isolated is None:
    isolated = isolation(interpreter)
  limits = dict(
    timeout=timeout,
    memory=memory,
    processes=_process_limit(isolated, processes),
    files=files,
    file_size=file_size,
    namespaces=int(isolated.namespaces),
    landlock=isolated.landlock,
  )
  limits['pairs'] = int(bool(examples))
  texts = program, entry_point, setup, *tests, *itertools.chain(*examples)
  try:
    ended = _execute(isolated, interpreter, limits, texts, output, packages)
  except OSError as error:
    raise UserError(f'sandbox: cannot start a program: {error}.') from error
  return _result(*ended, len(examples or tests))


def _result(report, status, printed, count) -> Result:
  """Interprets the supervisor's report; see `sandbox_child`."""
  ready, _, verdict = report.partition('\n')
  text = printed.decode('utf-8', 'replace')
  if ready != 'ready':
    reason = ready.removeprefix('broken - ') or ' '.join(text.split())[-200:]
    ended = 'had to be killed' if status is None else f'ended with {status}'
    raise UserError(
      f'sandbox: a program could not be run: {reason or "no report"}.\n'
      f'The process that was to run it {ended}.'
    )
  none = (False,) * count
  if verdict.endswith('\n'):
    word, digits, error = verdict[:-1].split(' ', 2)
    if word == 'broken':
      raise UserError(f'sandbox: a program could not be run: {error}.')
    outcome = Outcome(word)
    passed = tuple(digit == '1' for digit in digits.strip('-'))
    if outcome is Outcome.OUT_OF_MEMORY or len(passed) != count:
      passed = none
    return Result(outcome, passed, error, text)
  if status is None:
    return Result(Outcome.TIMED_OUT, none, 'the time limit', text)
  if status < 0:
    return Result(Outcome.CRASHED, none, f'signal {-status}', text)
  raise UserError(
    f'sandbox: the supervisor ended with status {status}: '
    f'{" ".join(text.split())[-200:]}'
  )


def _execute(isolated, interpreter, limits, texts, keep, packages):
  """Starts the supervisor and waits until all processes have ended.

  Returns:
    The report, the status (None if it had to be killed), and the first `keep`
    bytes of output.
  """
  top = pathlib.Path(tempfile.mkdtemp(prefix='sandbox-'))
  directory = top / 'work'
  report, report_end = os.pipe()
  try:
    directory.mkdir()
    user = 0
    if isolated.own_user:
      # Distinct per directory: inodes of one file system differ.
      user = 2**30 + 2 * (os.stat(directory).st_ino % 2**29)
      os.chown(directory, user, user)
      top.chmod(0o711)
    limits |= dict(report=report_end, user=user)
    limits['packages'] = ''.join(f'{p}:' for p in _link(packages, top))
    settings = [f'{name}={value}' for name, value in limits.items()]
    command = _command(isolated, interpreter)
    with tempfile.TemporaryFile() as payload:
      payload.write(b''.join(map(_frame, texts)))
      payload.seek(0)
      process = subprocess.Popen(
        [*command, '-c', _MAIN, str(_FOLDER), *settings],
        stdin=payload,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=directory,
        env=_environment(str(directory)),
        pass_fds=(report_end,),
        start_new_session=True,
      )
    os.close(report_end)
    report_end = None
    try:
      return _listen(process, report, limits['timeout'] + _GRACE, keep)
    finally:
      _kill(process)
      process.stdout.close()
  finally:
    os.close(report)
    if report_end is not None:
      os.close(report_end)
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


def _listen(process, report, seconds, keep):
  """Reads report and output until the report ends, then kills the processes."""
  message, printed = bytearray(), bytearray()
  output = process.stdout.fileno()
  deadline = time.monotonic() + seconds
  with selectors.DefaultSelector() as selector:
    selector.register(report, selectors.EVENT_READ)
    selector.register(output, selectors.EVENT_READ)
    while report in selector.get_map():
      left = deadline - time.monotonic()
      if left <= 0:
        break
      for key, _ in selector.select(left):
        chunk = os.read(key.fd, 2**16)
        if not chunk:
          selector.unregister(key.fd)
        elif key.fd == output:
          printed += chunk[: keep - len(printed)]
        else:
          message += chunk
          if message.count(b'\n') == 2:
            deadline = min(deadline, time.monotonic() + _END)
    ended = report not in selector.get_map()
  _kill(process)
  os.set_blocking(output, False)
  while len(printed) < keep:
    try:
      chunk = os.read(output, keep - len(printed))
    except BlockingIOError:
      break
    if not chunk:
      break
    printed += chunk
  status = process.returncode if ended else None
  return message.decode('utf-8', 'replace'), status, bytes(printed)


def _kill(process):
  """Kills the process group, once; reaps its leader afterwards."""
  if process.returncode is not None:
    return
  # On macOS a group with only zombies left does not exist.
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _remove(directory):
  """Removes a directory of any depth and permissions."""
  try:
    shutil.rmtree(directory)
    return
  except (OSError, RecursionError):
    pass
  for command in (['chmod', '-R', 'u+rwx'], ['rm', '-rf']):
    subprocess.run([*command, directory], capture_output=True)
  if os.path.lexists(directory):
    raise UserError(f'sandbox: cannot remove {directory}: remove it by hand.')


def _frame(text: str) -> bytes:
  data = text.encode('utf-8', 'surrogatepass')
  return len(data).to_bytes(4, 'big') + data


def _environment(directory: str) -> dict[str, str]:
  return {
    'PATH': os.defpath,
    'LANG': 'C.UTF-8',
    'HOME': directory,
    'TMPDIR': directory,
    'PYTHONHASHSEED': '0',
    'PYTHONUTF8': '1',
    'OPENBLAS_NUM_THREADS': '1',
  }


def _command(isolated: Isolation, interpreter: str) -> list[str]:
  """Returns the command that starts the interpreter."""
  command = []
  if isolated.namespaces:
    command += ['unshare', '--net', '--pid', '--fork', '--kill-child']
    # In a user namespace anyone may; a user mapped to another than root lacks
    # root's rights there.
    if not isolated.own_user:
      command += [f'--map-user={_NOBODY}', f'--map-group={_NOBODY}']
  return [*command, interpreter, '-s', '-S', '-P', '-B']


def _process_limit(isolated: Isolation, processes: int) -> int:
  """Returns an RLIMIT_NPROC that allows `processes`; 0 if it has no effect.

  The kernel counts processes and threads per user, and since Linux 5.14 per
  user and namespace.  It does not limit root.
  """
  if isolated.own_user:
    return processes
  if sys.platform != 'linux' or os.geteuid() == 0:
    return 0
  release = re.match(r'(\d+)\.(\d+)', platform.release())
  if isolated.namespaces and tuple(map(int, release.groups())) >= (5, 14):
    return processes + 2  # `unshare` and the supervisor
  return processes + _own_tasks()


def _own_tasks() -> int:
  """Counts this user's processes and threads at present."""
  count = 0
  for process in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if process.stat().st_uid == os.geteuid():
        count += len(os.listdir(process / 'task'))
    except OSError:
      continue  # It has ended meanwhile.
  return count


def _landlock_version() -> int:
  """Returns the kernel's version of Landlock; 0 without Landlock."""
  if sys.platform != 'linux':
    return 0
  # landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
  return max(0, ctypes.CDLL(None).syscall(444, None, 0, 1))
