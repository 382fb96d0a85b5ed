"""The process side of `sandbox`: a program, its tests, and who watches them.

Imported by `_MAIN` of `sandbox`.  The supervisor forks two processes, limits
both, and waits for the verdict of the second or the end of the first:

  the program  forked before the tests are read, so nothing of them is in its
               memory; it answers requests (see `sandbox_harness`)
  the tests    never load the program

The supervisor reports 'ready', once limits hold, then a verdict (outcome, a
digit per test or -, the error) or 'broken'.  All processes end with it.
"""

import _signal  # `signal` would import enum: a third of the start-up time.
import ctypes
import os
import select
import sys
import time

import sandbox_harness as harness
import sandbox_landlock as landlock

_START = 45.0  # seconds to set limits
_PERIOD = 0.02  # seconds between looks at the program
_FILES = 64  # open at a time, in each process
_FILE_SIZE = 2**24  # bytes of each file and of printed output
_PR_SET_DUMPABLE = 4  # prctl(2)
# From unshare(2) and mount(2); private and bound with what is mounted below.
_CLONE_NEWNS = 0x20000
_MS_BIND = 4096 | 1 << 14
_MS_PRIVATE = 1 << 18 | 1 << 14


def main(settings):
  """Runs the supervisor.

  Args:
    settings: timeout, memory, processes (0 for no limit), landlock (its
      version), user (0 for the present one), pairs (True if tests are pairs of
      texts), packages (paths).

  Standard input holds frames: program, entry point, set-up, tests.
  """
  # The parent reads the report from standard output; nobody else writes there.
  report = os.dup(1)
  os.dup2(2, 1)
  _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # An init has no defaults.
  if sys.platform == 'linux':  # Nobody may look into these processes.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
  try:
    verdict = _supervise(settings, report)
  except OSError as error:
    verdict = f'broken - {error}\n'
  os.write(report, verdict.encode('utf-8', 'replace'))
  os._exit(0)


def _supervise(settings, report):
  """Runs program and tests; returns the verdict."""
  program = _receive()
  user, packages = settings['user'], settings['packages']
  for folder in packages[:1]:  # It holds links to the rest.
    sys.path.append(folder)
    harness.PACKAGES += os.listdir(folder)
  paths = landlock.readable(packages)
  if user:
    _uncover([*paths, os.getcwd()])
  requests, replies = os.pipe(), os.pipe()
  ready, begin, verdict = os.pipe(), os.pipe(), os.pipe()

  def serve():
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    _limit(settings, user, paths)
    os.write(ready[1], b'.')
    _keep(requests[0], replies[1])
    harness.serve(requests[0], replies[1], program)

  def judge():
    entry_point, setup, *tests = iter(_receive, None)
    # Another user than the program's, who owns nothing.
    _limit(settings, user and user + 1, paths)
    os.write(ready[1], b'.')
    os.read(begin[0], 1)  # The program may kill the supervisor.
    _keep(requests[1], replies[0], verdict[1])
    ends = replies[0], requests[1]
    if settings['pairs']:
      tests = list(zip(tests[::2], tests[1::2], strict=True))
      result = harness.judge_output(*ends, tests)
    else:
      result = harness.judge(*ends, entry_point, setup, tests)
    sys.stdout.flush()
    os.write(verdict[1], harness.verdict(*result).encode('utf-8', 'replace'))

  child = _fork(serve)
  _fork(judge)
  for descriptor in (*requests, *replies, ready[1], verdict[1]):
    os.close(descriptor)
  for _ in range(2):  # Each sends a byte, or ends.
    if not select.select([ready[0]], [], [], _START)[0]:
      return 'broken - the limits took too long\n'
    if not os.read(ready[0], 1):
      return 'broken - the limits could not be set\n'
  os.write(report, b'ready\n')
  os.write(begin[1], b'.')
  return _watch(child, verdict[0], time.monotonic() + settings['timeout'])


def _watch(child, verdict, deadline):
  """Waits for the verdict, or for the end of a program that leaves none."""
  status, sources = None, [verdict]
  while status is None and time.monotonic() < deadline:
    # What it has left may hold its pipes: then its tests do not notice the end.
    pid, code = os.waitpid(child, os.WNOHANG)
    status = code if pid else None
    if select.select(sources, [], [], 0 if pid else _PERIOD)[0]:
      text = os.read(verdict, 65536)
      if text and text != b'ended\n':
        return text.decode()
      sources = []
  if status is None:
    return 'timed_out - the time limit\n'
  if not os.WIFSIGNALED(status):
    code = os.waitstatus_to_exitcode(status)
    return f'failed - it ended its process with status {code}\n'
  number = os.WTERMSIG(status)
  if number == _signal.SIGXCPU:
    return 'timed_out - the limit of CPU time\n'
  return f'crashed - signal {number}\n'


def _uncover(paths):
  """Makes Python's library reachable for a user that is not root.

  A directory above it that only root may enter is covered by an empty one,
  visible to this process's descendants alone, that holds just these paths.
  """
  libc, covers = ctypes.CDLL(None, use_errno=True), {}
  for path in paths:
    parts = path.split('/')
    above = ('/'.join(parts[:i]) for i in range(2, len(parts)))
    closed = next((each for each in above if not os.stat(each).st_mode & 1), '')
    if closed:
      covers.setdefault(closed, []).append(path)

  def mount(source, target, kind, flags, data=None):
    arguments = [text and os.fsencode(text) for text in (source, target, kind)]
    if libc.mount(*arguments, ctypes.c_ulong(flags), data):
      raise OSError(ctypes.get_errno(), f'cannot mount {target}')

  if covers:
    if libc.unshare(_CLONE_NEWNS):
      raise OSError(ctypes.get_errno(), 'cannot unshare mounts')
    mount('none', '/', None, _MS_PRIVATE)
  for cover, covered in covers.items():
    descriptors = [os.open(path, os.O_PATH) for path in covered]
    mount('none', cover, 'tmpfs', 0, b'mode=755')
    for path, descriptor in zip(covered, descriptors, strict=True):
      source = f'/proc/self/fd/{descriptor}'
      if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
      else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT))
      mount(source, path, None, _MS_BIND)
      os.close(descriptor)


def _limit(settings, user, paths):
  """Limits this process and those that it starts."""
  import resource

  limits = {
    'RLIMIT_CPU': -int(-settings['timeout'] // 1),
    'RLIMIT_FSIZE': _FILE_SIZE,
    'RLIMIT_NOFILE': _FILES,
    'RLIMIT_CORE': 0,
  }
  if settings['processes']:
    limits['RLIMIT_NPROC'] = settings['processes']
  if sys.platform != 'darwin':  # macOS has the name, not the limit.
    limits['RLIMIT_AS'] = settings['memory']
  if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
  if settings['landlock']:
    landlock.restrict(settings['landlock'], paths)
  for name, limit in limits.items():
    kind = getattr(resource, name)
    highest = resource.getrlimit(kind)[1]
    if highest == resource.RLIM_INFINITY:
      highest = limit + 1  # At the hard limit of CPU time there is no SIGXCPU.
    resource.setrlimit(kind, (min(limit, highest), min(limit + 1, highest)))


def _fork(function):
  """Runs a function in a child, which ends with it."""
  pid = os.fork()
  if pid:
    return pid
  try:
    function()
    os._exit(0)
  except BaseException as error:
    os.write(2, f'{type(error).__name__}: {error}\n'.encode())
  finally:
    os._exit(1)


def _keep(*descriptors):
  """Closes all descriptors except the standard ones and these."""
  last = 2
  for descriptor in (*sorted(descriptors), 1024):
    os.closerange(last + 1, descriptor)
    last = descriptor


def _receive():
  """Returns the next text from standard input; None at its end."""
  size = harness.read(0, 4)
  text = harness.read(0, int.from_bytes(size, 'big'))
  return text.decode('utf-8', 'surrogatepass') if size else None
