"""Runs one Python program that a model has written, under limits.

Each program gets a fresh interpreter with nothing but the standard library, in
a session of its own, in an empty directory that is removed afterwards, without
input and without the parent's environment.  The interpreter's options -s, -P,
-S and -B and an environment made here are -I with one addition: strings hash as
they did last time, so that a program which depends on the order of a set has
one result.

Limits: wall-clock and CPU time, address space of each process, size of each
file, open files, processes and threads, no core dumps.

Isolation, as far as the machine allows; `isolation` says what is missing, and
the log says it once:

- Namespaces (`unshare`): no network at all, not even that of this machine; when
  the program ends, every process that it started ends, detached ones too.
- Landlock (Linux ≥ 5.13): files are made, changed and removed in the program's
  directory alone; no look into other processes; since version 6 (Linux 6.12)
  no signals to them.
- For root, a user of the program's own, who can do neither; where only root can
  reach Python's library, one who can read everything.

Without namespaces on Linux: orphans of the program become children of its
supervisor, which kills them all in the end; a program that first kills the
supervisor (only one without Landlock and user of its own can) leaves them
alive.  The number of processes is then limited by adding to those that the user
has.  Elsewhere (macOS) the process group is killed, a process that leaves it
lives on, and neither memory nor the number of processes is limited.  Where the
caller itself is killed, its programs end by their time limit and leave their
directories.

This is no security boundary.  The program runs on the same kernel, reads what
this user reads (with a user of its own: what everyone reads), and can fill the
disk with many files of permitted size, which take their time to remove.  Nor is
the verdict proof against an attacker: tests run in the program's process.  The
early ways out (`os._exit`, `SystemExit`, a printed or forged word of success),
built-in functions or `__main__` replaced, and results that claim to equal
everything fail; what methods return and attributes hold is not checked, and a
program that searches its own process for the harness, speaks its protocol, or
replaces parts of a module that the tests or harness import can still pass.
"""

import contextlib
import ctypes
import enum
import functools
import logging
import os
import pathlib
import platform
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
_CHILD = pathlib.Path(__file__).with_name('sandbox_child.py')
_NOBODY = 65534
# Seconds beyond the time limit: an interpreter starts, on a loaded machine.
_GRACE = 60.0
# Seconds from a verdict until all processes have ended by themselves.
_END = 10.0
_LEAST_MEMORY = 2**26


class Outcome(enum.Enum):
  """How a program ended."""

  PASSED = 'passed'
  FAILED = 'failed'
  TIMED_OUT = 'timed_out'
  OUT_OF_MEMORY = 'out_of_memory'
  CRASHED = 'crashed'


class Result(NamedTuple):
  """What became of a program.

  Attributes:
    outcome: `PASSED` if it ran to its end and no test raised.
    passed: a bool per test; all False where the tests did not run to their end.
    error: '' or one line: 'AssertionError: …' of the first test that failed or
      of the program, 'signal 11' where it crashed, the limit that it exceeded.
    output: the first bytes of standard output and error, as text.
  """

  outcome: Outcome
  passed: tuple[bool, ...]
  error: str
  output: str


class Isolation(NamedTuple):
  """What keeps a program from the rest of the machine.

  Attributes:
    namespaces: its own network, which is none, and its own processes.
    own_proc: /proc shows only these.
    own_user: it runs as a user of its own, in place of root.
    landlock: version of the kernel's Landlock; 0 for none.
  """

  namespaces: bool = False
  own_proc: bool = False
  own_user: bool = False
  landlock: int = 0

  @property
  def missing(self) -> tuple[str, ...]:
    """What a program can do here that it could not with full isolation."""
    linux = sys.platform == 'linux'
    root = os.geteuid() == 0 and not self.own_user
    other = self.namespaces or self.own_user
    kept = other or (linux and self.landlock >= 6)
    can = {
      'reach the network': not self.namespaces,
      'leave detached processes behind': not kept,
      'use any amount of memory': not linux,
      'start any number of processes': not linux or root,
      'act as root': root,
      'look into other processes': not (self.landlock or other),
      'change files of this user': not (self.landlock or self.own_user),
    }
    return tuple(what for what, able in can.items() if able)


@functools.cache
def isolation(interpreter: str = sys.executable) -> Isolation:
  """The best isolation that works here; tried once, then remembered.

  What is missing is logged as a warning.

  Args:
    interpreter: path of the Python that will run programs.

  Raises:
    UserError: not even a plain process of the interpreter works.
  """
  landlock = _landlock_version()
  spaces = [(True, True), (True, False), (False, False)]
  tries = [Isolation(*space, False, landlock) for space in spaces]
  if os.geteuid() == 0:
    tries = [each._replace(own_user=True) for each in tries] + tries
  if sys.platform != 'linux':
    tries = [Isolation()]
  for found in tries:
    try:
      result = run(
        'import random',  # Modules in Python and in C.
        timeout=_GRACE,
        isolated=found,
        interpreter=interpreter,
      )
    except UserError as error:
      obstacle = error
      continue
    if result.outcome is Outcome.PASSED:
      for what in found.missing:
        _log.warning('a program that is run as a reward can %s', what)
      return found
    obstacle = UserError(f'sandbox: {interpreter}: {result.error}.')
  raise obstacle


def run(
  program: str,
  tests: Sequence[str] = (),
  *,
  setup: str = '',
  entry_point: str = '',
  timeout: float = 10.0,
  memory: int = 2**29,
  processes: int = 16,
  files: int = 64,
  file_size: int = 2**24,
  output: int = 2**16,
  interpreter: str = sys.executable,
  isolated: Isolation | None = None,
) -> Result:
  """Runs a program, then its tests in the same process.

  The program is the module `program`, so that what it does only as `__main__`
  is not done.  Tests see its names; built-in functions they see as they were.
  A function that they call must return objects whose operators are Python's
  own: no class of the program that defines `__eq__`.  They run one after the
  other, also after one that failed.  Without tests a program passes that comes
  to its end.

  Thread-safe: any number of programs can run at a time.

  Args:
    program: Python source.
    tests: Python source; each fails if it raises.
    setup: Python source to run between program and tests, once.
    entry_point: name that the tests test.  If given, a name of the program that
      is also that of a built-in function is hidden from the tests, this one
      excepted: the program cannot bring an `abs` or `len` of its own.
    timeout: seconds of wall-clock time for program and tests, and of CPU time
      (rounded up) for each process.
    memory: bytes of address space of each process; all its processes together
      may take `processes` times as much.
    processes: processes and threads at a time.
    files: open at a time, in each process.
    file_size: bytes of each file.
    output: bytes to keep of what it prints; the rest is dropped.
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
  texts = program, entry_point, setup, *tests
  try:
    ended = _execute(isolated, interpreter, limits, texts, output)
  except OSError as error:
    raise UserError(f'sandbox: cannot start a program: {error}.') from error
  return _result(*ended, tests)


def _result(report, status, printed, tests) -> Result:
  """Reads what the supervisor said; see `sandbox_child`."""
  ready, _, verdict = report.partition('\n')
  text = printed.decode('utf-8', 'replace')
  if ready != 'ready':
    said = ready.removeprefix('broken - ') or ' '.join(text.split())[-200:]
    ended = 'had to be killed' if status is None else f'ended with {status}'
    raise UserError(
      f'sandbox: a program could not be run: {said or "no word"}.\n'
      f'The process that was to run it {ended}.'
    )
  none = (False,) * len(tests)
  if verdict.endswith('\n'):
    word, digits, error = verdict[:-1].split(' ', 2)
    if word == 'broken':
      raise UserError(f'sandbox: a program could not be run: {error}.')
    outcome = Outcome(word)
    passed = tuple(digit == '1' for digit in digits.strip('-'))
    if outcome is Outcome.OUT_OF_MEMORY or len(passed) != len(tests):
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


def _execute(isolated, interpreter, limits, texts, keep):
  """Starts the supervisor and waits until all has ended.

  Returns:
    What it reported, its status (None if it had to be killed), and the first
    `keep` bytes of what was printed.
  """
  directory = tempfile.mkdtemp(prefix='sandbox-')
  report, report_end = os.pipe()
  try:
    user = 0
    if isolated.own_user:
      # Of no other program's directory: inodes of one file system differ.
      user = 2**30 + os.stat(directory).st_ino % 2**30
      os.chown(directory, user, user)
    settings = [f'{name}={value}' for name, value in limits.items()]
    command = _command(isolated, interpreter)
    with tempfile.TemporaryFile() as payload:
      payload.write(b''.join(map(_frame, texts)))
      payload.seek(0)
      process = subprocess.Popen(
        [
          *command,
          str(_CHILD),
          f'report={report_end}',
          f'user={user}',
          *settings,
        ],
        stdin=payload,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=directory,
        env=_environment(directory),
        pass_fds=(report_end,),
        start_new_session=True,
      )
    os.close(report_end)
    report_end = None
    try:
      seconds = limits['timeout'] + _GRACE
      return _listen(process, report, seconds, keep)
    finally:
      _kill(process)
      process.stdout.close()
  finally:
    os.close(report)
    if report_end is not None:
      os.close(report_end)
    _remove(directory)


def _listen(process, report, seconds, keep):
  """Reads report and output until the first ends; then ends the processes."""
  said, printed = bytearray(), bytearray()
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
          said += chunk
          if said.count(b'\n') == 2:
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
  return said.decode('utf-8', 'replace'), status, bytes(printed)


def _kill(process):
  """Ends the process group, once; the leader is reaped after it."""
  if process.returncode is not None:
    return
  # On macOS, when nothing but zombies is left, the group is not there.
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _remove(directory):
  """Removes a directory, however deep and whatever its permissions."""
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
  }


def _command(isolated: Isolation, interpreter: str) -> list[str]:
  """What starts the interpreter."""
  command = []
  if isolated.namespaces:
    command += ['unshare', '--net', '--pid', '--fork', '--kill-child']
    command += ['--mount-proc'] if isolated.own_proc else []
    # In a user namespace anyone may; under another name than root's, without
    # its rights there.
    if not isolated.own_user:
      command += [f'--map-user={_NOBODY}', f'--map-group={_NOBODY}']
  return [*command, interpreter, '-s', '-S', '-P', '-B']


def _process_limit(isolated: Isolation, processes: int) -> int:
  """RLIMIT_NPROC that leaves the program so many; 0 where it has no effect.

  The kernel counts processes and threads per user; per user and namespace
  since Linux 5.14.  Root's it counts in vain.
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
  """Processes and threads of this user at present."""
  count = 0
  for process in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if process.stat().st_uid == os.geteuid():
        count += len(os.listdir(process / 'task'))
    except OSError:
      continue  # It has ended meanwhile.
  return count


def _landlock_version() -> int:
  """The kernel's version of Landlock; 0 where it has none."""
  if sys.platform != 'linux':
    return 0
  # landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
  return max(0, ctypes.CDLL(None).syscall(444, None, 0, 1))
