"""Runs a function in a process that ends together with all it has started.

Two processes: a supervisor, in which `run` is called and no foreign code runs,
and its child, which runs the function.  The supervisor ends the child, and what
the child has started, when the child ends, when SIGTERM comes, or when nobody
holds the other end of its standard input any more: that is, when the process
that started it is gone, however it went.

How it finds what the child has started, the strongest first:

  'namespace'  Linux, where the kernel allows it (as root, or where users may
               make namespaces of their own): the child lives in a pid namespace
               (a third process, number 1 of the namespace, stands between).
               When that ends the kernel kills all within.  Nothing is left, and
               from within no process outside can be signalled.  Process numbers
               are the namespace's own, and so is what /proc shows where the
               kernel lets it be mounted anew, which it does not in a container
               that covers parts of /proc.
  'subreaper'  any Linux: what the child leaves behind, also with setsid,
               becomes the supervisor's child and is killed by it.  Left is what
               forks faster than it is killed, and all that had left the group
               should the child kill the supervisor.
  'group'      elsewhere: the child's process group is killed.  What left the
               group (setsid) is left.

None is a sandbox: files and network are those of the user, and but for a
namespace so is the right to signal all other processes of the user's.

References:
  pid_namespaces(7), PR_SET_CHILD_SUBREAPER in prctl(2)
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator

KINDS = ('namespace', 'subreaper', 'group')

# Of linux/sched.h and linux/prctl.h.
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# Of linux/mount.h: mounts made outside show within, not the other way round;
# no set-user-id, no devices, no programs.
_MS_ALL_SLAVES = 1 << 19 | 1 << 14
_MS_OF_PROC = 1 << 1 | 1 << 2 | 1 << 3


def strongest() -> str:
  """The strongest kind that works here; tries whether namespaces do."""
  if not sys.platform.startswith('linux'):
    return 'group'
  return 'namespace' if _namespace_works() else 'subreaper'


def run(function: Callable[[], int], kind: str) -> int:
  """Runs `function` in a child of this process, which must have no threads.

  Args:
    function: gives an exit status.
    kind: one of `KINDS`.

  Returns:
    The child's exit status, 128 + n where signal n ended it.  By then all it
    had started is gone, as far as `kind` goes.

  Raises:
    OSError: the kind does not work here.
  """
  if kind == 'namespace':
    _enter_namespace()
  elif kind == 'subreaper':
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
  signals, written = _wakeups()

  def child() -> int:
    os.close(signals)
    os.close(written)
    return _init(function) if kind == 'namespace' else _lead(function)

  pid = _fork(child)
  status = _supervise(pid, signals)
  if kind == 'group':
    with contextlib.suppress(OSError):
      os.killpg(pid, signal.SIGKILL)
  _kill_children([pid] if status is None else [])
  return 128 + signal.SIGTERM if status is None else status


def _namespace_works() -> bool:
  def body() -> int:
    _enter_namespace()
    return _exit_status(os.waitpid(_fork(lambda: 0), 0)[1])

  return os.waitpid(_fork(body), 0)[1] == 0


def _enter_namespace() -> None:
  """Puts the children to come into a pid namespace; only one can be forked."""
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.unshare(_CLONE_NEWPID) == 0:
    return  # This is root, which needs no namespace of users.
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


def _prctl(option: int, value: int) -> None:
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
    number = ctypes.get_errno()
    raise OSError(number, f'prctl({option}): {os.strerror(number)}')


def _wakeups() -> tuple[int, int]:
  """A pipe from which the numbers of SIGCHLD and SIGTERM are read."""
  read, write = os.pipe()
  os.set_blocking(read, False)
  os.set_blocking(write, False)
  for number in (signal.SIGCHLD, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
  signal.set_wakeup_fd(write)
  return read, write


def _fork(body: Callable[[], int]) -> int:
  """The number of a child that exits with what `body` gives; 1 if it raises."""
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
      _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before; in another namespace it has number 0.
    if os.getppid() in (parent, 0):
      status = body()
  finally:
    os._exit(status)


def _init(function: Callable[[], int]) -> int:
  """Process 1 of a namespace: collects orphans, and ends with the function."""
  _hide_others()
  child = _fork(lambda: _lead(function))
  while True:
    pid, status = os.wait()
    if pid == child:
      return _exit_status(status)


def _hide_others() -> None:
  """Shows in /proc, where the kernel lets it, this namespace's processes alone.

  Hidden are the environments, memory and open files of all others.  This is no
  wall: who may unmount finds the former /proc below.
  """
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.unshare(_CLONE_NEWNS) != 0:
    return
  kind, flags = map(ctypes.c_ulong, (_MS_ALL_SLAVES, _MS_OF_PROC))
  # Unless the mounts are apart the other /proc would be that of all.
  if libc.mount(b'none', b'/', None, kind, None) == 0:
    libc.mount(b'proc', b'/proc', b'proc', flags, None)


def _lead(function: Callable[[], int]) -> int:
  """Runs the function as the head of a session, hence of a process group."""
  os.setsid()
  return function()


def _supervise(child: int, signals: int) -> int | None:
  """Waits for the child; None if it is to be ended before it ends by itself."""
  parent = os.getppid()
  poll = select.poll()
  poll.register(0, 0)  # Of a pipe this reports that its writers are gone.
  poll.register(signals, select.POLLIN)
  while True:
    # Now and then, as other children of the parent may hold the pipe, too.
    ready = [descriptor for descriptor, _ in poll.poll(1000)]
    if 0 in ready or os.getppid() != parent:
      return None
    if signals in ready and signal.SIGTERM in os.read(signals, 64):
      return None
    for pid, status in _ended():
      if pid == child:
        return status


def _ended() -> Iterator[tuple[int, int]]:
  """(number, exit status) of the children that have ended, collected."""
  with contextlib.suppress(ChildProcessError):
    while True:
      pid, status = os.waitpid(-1, os.WNOHANG)
      if not pid:
        return
      yield pid, _exit_status(status)


def _kill_children(known: list[int]) -> None:
  """Kills all children, those known and those found, until there are none."""
  while True:
    # The children of what is killed come to this process if it is a subreaper.
    for pid in {*known, *_children()}:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    known = []
    try:
      pid, _ = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
      return
    if not pid:
      time.sleep(0.001)


def _children() -> list[int]:
  """Numbers of this process's children; none known where there is no /proc."""
  found, own = [], os.getpid()
  if not os.path.isdir('/proc/self'):
    return found
  for name in filter(str.isdigit, os.listdir('/proc')):
    with contextlib.suppress(OSError), open(f'/proc/{name}/stat', 'rb') as file:
      # The name of the program, in brackets, may hold brackets and spaces.
      state, parent = file.read().rpartition(b')')[2].split()[:2]
      if int(parent) == own and state != b'Z':
        found.append(int(name))
  return found


def _exit_status(status: int) -> int:
  """0–127 as it exited, 128 + n where signal n ended it."""
  code = os.waitstatus_to_exitcode(status)
  return code if code >= 0 else 128 - code
