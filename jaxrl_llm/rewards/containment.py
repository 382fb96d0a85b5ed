"""Runs a function in a process that ends with every process it started.

`run` supervises a child, in which alone foreign code runs.  It kills the child
and its descendants when the child ends, on SIGTERM, or when the other end of
its standard input is closed: when the process that started it is gone.

  'namespace'  Linux, as root or where users may create namespaces: the child
               lives in a pid namespace, below a process with number 1, with
               which the kernel ends all others.  None survives, and none can
               signal a process outside.  Where the kernel allows it to be
               mounted again, /proc shows the namespace alone.
  'group'      elsewhere: the child's process group is killed.  Processes that
               left it (setsid) survive.

Neither is a sandbox: files and network are the user's, and so, without a
namespace, is the right to signal all the user's other processes.

References:
  pid_namespaces(7)
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable

KINDS = ('namespace', 'group')

# From linux/sched.h and linux/prctl.h.
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_PR_SET_PDEATHSIG = 1

# From linux/mount.h: mounts propagate inwards only; no set-user-id, devices or
# programs.
_MS_ALL_SLAVES = 1 << 19 | 1 << 14
_MS_OF_PROC = 1 << 1 | 1 << 2 | 1 << 3


def strongest() -> str:
  """Returns the strongest kind that works here; tests whether namespaces do."""
  linux = sys.platform.startswith('linux')
  return 'namespace' if linux and _namespace_works() else 'group'


def run(function: Callable[[], int], kind: str) -> int:
  """Runs `function` in a child of this process, which must have no threads.

  Args:
    function: returns an exit status.
    kind: one of `KINDS`.

  Returns:
    The child's exit status; 128 + n if signal n ended it.  By then its
    descendants are gone, as far as `kind` guarantees.

  Raises:
    OSError: the kind does not work here.
  """
  if kind == 'namespace':
    _enter_namespace()
  signals, written = _wakeups()

  def lead() -> int:
    os.setsid()  # Hence it leads a process group.
    return function()

  def child() -> int:
    os.close(signals)
    os.close(written)
    return _init(lead) if kind == 'namespace' else lead()

  pid = _fork(child)
  status = _supervise(pid, signals)
  if kind == 'group':
    with contextlib.suppress(OSError):
      os.killpg(pid, signal.SIGKILL)
  if status is None:
    # It may not lead a group yet; of a namespace it is the first process.
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 128 + signal.SIGTERM
  return status


def _namespace_works() -> bool:
  def body() -> int:
    _enter_namespace()
    return _exit_status(os.waitpid(_fork(lambda: 0), 0)[1])

  return os.waitpid(_fork(body), 0)[1] == 0


def _enter_namespace() -> None:
  """Puts the next child into a pid namespace; only one can be forked."""
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.unshare(_CLONE_NEWPID) == 0:
    return  # Root needs no user namespace.
  user, group = os.geteuid(), os.getegid()
  if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWPID) != 0:
    number = ctypes.get_errno()
    raise OSError(number, f'no pid namespace: {os.strerror(number)}')
  for name, text in (
    ('setgroups', 'deny'),
    ('uid_map', f'{user} {user} 1'),
    ('gid_map', f'{group} {group} 1'),
  ):
    with open(f'/proc/self/{name}', 'w', encoding='ascii') as file:
      file.write(text)


def _wakeups() -> tuple[int, int]:
  """Creates a pipe that yields the numbers of SIGCHLD and SIGTERM."""
  read, write = os.pipe()
  os.set_blocking(read, False)
  os.set_blocking(write, False)
  for number in (signal.SIGCHLD, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
  signal.set_wakeup_fd(write)
  return read, write


def _fork(body: Callable[[], int]) -> int:
  """Forks a child that exits with the result of `body`; 1 if it raises."""
  parent = os.getpid()
  pid = os.fork()
  if pid:
    return pid
  status = 1
  try:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
      signal.signal(number, signal.SIG_DFL)
    if sys.platform.startswith('linux'):
      ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may already have died; in another namespace its number is 0.
    if os.getppid() in (parent, 0):
      status = body()
  finally:
    os._exit(status)


def _init(function: Callable[[], int]) -> int:
  """Acts as process 1 of a namespace: reaps orphans, ends with the function."""
  _hide_others()
  child = _fork(function)
  while True:
    pid, status = os.wait()
    if pid == child:
      return _exit_status(status)


def _hide_others() -> None:
  """Limits /proc to this namespace's processes, where the kernel allows it.

  It is not a barrier: a process that may unmount finds the original /proc.
  """
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.unshare(_CLONE_NEWNS) != 0:
    return
  kind, flags = map(ctypes.c_ulong, (_MS_ALL_SLAVES, _MS_OF_PROC))
  # With shared mounts this would replace /proc for everyone.
  if libc.mount(b'none', b'/', None, kind, None) == 0:
    libc.mount(b'proc', b'/proc', b'proc', flags, None)


def _supervise(child: int, signals: int) -> int | None:
  """Waits for the child; returns None if it must be killed instead."""
  parent = os.getppid()
  poll = select.poll()
  poll.register(0, 0)  # Reports that a pipe's writers are gone.
  poll.register(signals, select.POLLIN)
  while True:
    # Polls, as other children of the parent may hold the pipe too.
    ready = [descriptor for descriptor, _ in poll.poll(1000)]
    if 0 in ready or os.getppid() != parent:
      return None
    if signals in ready and signal.SIGTERM in os.read(signals, 64):
      return None
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
      return _exit_status(status)


def _exit_status(status: int) -> int:
  """Converts a wait status: 0–127 for an exit, 128 + n for signal n."""
  code = os.waitstatus_to_exitcode(status)
  return code if code >= 0 else 128 - code
