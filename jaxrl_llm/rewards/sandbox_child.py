"""The process side of `sandbox`: limits one program and waits for its end.

A script for `python -sSPB`; nothing imports it.  The supervisor, which trusts
nothing that it receives, forks a worker and waits for it.  The worker puts
limits on itself, runs the program and, once that has finished, asks for the
tests.  They come with a secret that the verdict must repeat: a program that
ends early has never seen it.  The supervisor reports the outcome to `sandbox`
and kills all processes that the program started.

  the worker sends      ready, loaded, then the secret and a verdict; a verdict
                        of failure may replace the last two
  the supervisor sends  ready (limits hold), then a verdict or broken
  a verdict             outcome, a digit per test or -, the error
"""

import _signal  # `signal` would import enum: a third of the start-up time.
import builtins
import os
import select
import sys
import time

# As in `sandbox_harness`: code that runs after the program keeps these.
__builtins__ = dict(vars(builtins))

# Seconds for the worker to put limits on itself.
_START = 45.0
# Seconds between checks that the worker is alive.
_PERIOD = 0.1
# A worker that sends more than this, in bytes, is not one of ours.
_LONGEST = 2**20
_PIPE_BUF = 512  # bytes; what POSIX guarantees

# From Linux: prctl(2), capabilities(7).
_PR_SET_KEEPCAPS = 8
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CAP_DAC_READ_SEARCH = 1 << 2


class _Ended(Exception):
  """The worker ended without a verdict: outcome, error."""


class _Worker:
  """The supervisor's end of the worker: its process and two pipes."""

  def __init__(self, pid, replies, requests):
    self._pid = pid
    self._replies = replies
    self._requests = requests
    self._deadline = time.monotonic() + _START
    self._buffer = bytearray()
    self._ready = False
    self._status = None

  def begin(self, timeout):
    """Starts the time limit, in seconds."""
    self._deadline = time.monotonic() + timeout
    self._ready = True

  def line(self):
    """Returns the next line without its end; raises _Ended if there is none."""
    open_ = True
    while b'\n' not in self._buffer:
      pause = min(self._deadline - time.monotonic(), _PERIOD)
      if pause <= 0:
        raise self._late()
      ended = self._status is not None
      # Reads what it sent before its end, too.
      if (
        open_
        and select.select([self._replies], [], [], 0 if ended else pause)[0]
      ):
        chunk = os.read(self._replies, 65536)
        self._buffer += chunk
        open_ = bool(chunk)
        if len(self._buffer) > _LONGEST:
          raise _Ended('failed', 'it wrote into the pipe of its verdict')
        continue
      if ended:
        raise self._ended()
      if not open_:
        time.sleep(min(pause, 0.002))
      pid, status = os.waitpid(self._pid, os.WNOHANG)
      self._status = status if pid else None
    line, _, self._buffer = self._buffer.partition(b'\n')
    return bytes(line)

  def send(self, *texts):
    """Sends texts to `_receive`; `line` later reports a worker that is gone."""
    data = b''.join(map(_frame, texts))
    while data:
      pause = max(0, self._deadline - time.monotonic())
      if not select.select([], [self._requests], [], pause)[1]:
        raise self._late()
      try:
        # Few enough bytes that a pipe with room never blocks.
        data = data[os.write(self._requests, data[:_PIPE_BUF]) :]
      except BrokenPipeError:
        break
    os.close(self._requests)

  def kill(self):
    """Kills the worker itself."""
    if self._status is None:
      os.kill(self._pid, _signal.SIGKILL)

  def _late(self):
    if not self._ready:
      return _Ended('broken', 'the limits took too long')
    return _Ended('timed_out', 'the time limit')

  def _ended(self):
    status = self._status
    if not self._ready:
      return _Ended('broken', f'status {status} while limits were set')
    if not os.WIFSIGNALED(status):
      code = os.waitstatus_to_exitcode(status)
      return _Ended('failed', f'it ended its process with status {code}')
    number = os.WTERMSIG(status)
    if number == _signal.SIGXCPU:
      return _Ended('timed_out', 'the limit of CPU time')
    return _Ended('crashed', f'signal {number}')


def main(settings):
  """Runs the supervisor.

  Args:
    settings: 'name=number' each: report (a file descriptor), timeout, memory,
      processes (0 for no limit), files, file_size, namespaces (0 or 1),
      landlock (its version), user (0 for the present one).

  Standard input holds frames: program, entry point, set-up, tests.
  """
  values = {name: float(n) for name, n in (s.split('=') for s in settings)}
  report = int(values['report'])
  os.set_inheritable(report, False)
  # An init has no default actions; elsewhere SIGINT must end it.
  _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
  if sys.platform == 'linux' and not values['namespaces']:
    _adopt_orphans()
  verdict = _supervise(values, report)
  if not values['namespaces']:
    _kill_descendants()
  # No waiting: the end of a namespace's init ends everything in it.
  os.write(report, verdict.encode() + b'\n')
  os._exit(0)


def _supervise(values, report):
  """Runs the program in a worker; returns the verdict or why there is none."""
  program, harness = _receive(0), _harness()
  to_worker, requests = os.pipe()
  replies, from_worker = os.pipe()
  pid = os.fork()
  if not pid:
    for descriptor in (report, requests, replies):
      os.close(descriptor)
    try:
      _work(program, to_worker, from_worker, values, harness)
    finally:
      os._exit(1)
  os.close(to_worker)
  os.close(from_worker)
  worker = _Worker(pid, replies, requests)
  try:
    line = worker.line()
    if line != b'ready':
      return 'broken - ' + line.decode(errors='replace')
    worker.begin(values['timeout'])
    os.write(report, b'ready\n')
    return _judge(worker)
  except _Ended as ended:
    outcome, error = ended.args
    return f'{outcome} - {error}'
  finally:
    worker.kill()


def _judge(worker):
  """Sends the tests once the program is loaded; returns the verdict."""
  line, allowed = worker.line(), ('failed', 'out_of_memory')
  if line == b'loaded':
    secret = os.urandom(16).hex()
    worker.send(secret, *_receive_all(0))
    line = worker.line()
    if line.startswith(secret.encode()):
      line, allowed = line[len(secret) :], ('passed', *allowed)
  outcome, _, rest = line.decode(errors='replace').partition(' ')
  digits, space, error = rest.partition(' ')
  if outcome in allowed and space and not set(digits) - set('01-'):
    return f'{outcome} {digits} {error}'
  return 'failed - it wrote into the pipe of its verdict'


def _harness():
  """Loads the module that runs programs, out of reach of their imports."""
  folder, name = os.path.dirname(os.path.abspath(__file__)), 'sandbox_harness'
  sys.path.insert(0, folder)
  try:
    return __import__(name)
  finally:
    sys.path.remove(folder)
    sys.modules.pop(name, None)


def _frame(text):
  data = text.encode('utf-8', 'surrogatepass')
  return len(data).to_bytes(4, 'big') + data


def _receive(descriptor):
  """Returns the next text from a pipe or file; None at its end."""
  size = _read(descriptor, 4)
  if len(size) < 4:
    return None
  data = _read(descriptor, int.from_bytes(size, 'big'))
  return data.decode('utf-8', 'surrogatepass')


def _receive_all(descriptor):
  texts = []
  while (text := _receive(descriptor)) is not None:
    texts.append(text)
  return texts


def _read(descriptor, size, read=os.read):
  """Reads `size` bytes, fewer at the end; the program can replace `os.read`."""
  data = b''
  while len(data) < size:
    chunk = read(descriptor, size - len(data))
    if not chunk:
      break
    data += chunk
  return data


def _adopt_orphans():
  """Makes this process adopt descendants that lose their parents."""
  import ctypes

  ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _descendants():
  """Returns the numbers of the living processes below this one, from /proc."""
  children, numbers = {}, []
  try:
    family = [int(os.readlink('/proc/self'))]
    numbers = [name for name in os.listdir('/proc') if name.isdigit()]
  except OSError:
    return []  # No /proc.
  for number in numbers:
    try:
      with open(f'/proc/{number}/stat', 'rb') as file:
        state, parent = file.read().rpartition(b')')[2].split()[:2]
    except OSError:
      continue  # It has ended meanwhile.
    if state != b'Z':
      children.setdefault(int(parent), []).append(int(number))
  for number in family:
    family += children.get(number, ())
  return family[1:]


def _kill_descendants():
  """Kills descendants until none is left: one may have forked in between."""
  deadline = time.monotonic() + 5
  while time.monotonic() < deadline:
    for number in _descendants():
      try:
        os.kill(number, _signal.SIGKILL)
      except OSError:
        continue
    try:
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass
    except ChildProcessError:
      return
    time.sleep(0.002)


def _work(program, requests, replies, values, harness):
  """Runs the worker: limits, program, tests, verdict."""
  # Bound now: the program could replace what is looked up later.
  write, end, streams = os.write, os._exit, (sys.stdout, sys.stderr)
  trace, profile, receive_all = sys.settrace, sys.setprofile, _receive_all
  try:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    _limit(values)
  except Exception as error:
    write(replies, f'{type(error).__name__}: {error}\n'.encode())
    end(1)
  write(replies, b'ready\n')
  module, failure = harness.load_program(program)
  secret, passed = '', []
  if failure is None:
    write(replies, b'loaded\n')
    secret, entry_point, setup, *tests = receive_all(requests)
    trace(None)
    profile(None)
    failure, passed = harness.test(module, entry_point, setup, tests)
  for stream in streams:
    try:
      stream.flush()
    except BaseException:
      continue
  # Without a secret it can only be a failure.
  write(replies, (secret + harness.verdict(failure, passed)).encode())
  end(0)


def _limit(values):
  """Limits this process and the processes that it starts."""
  import resource

  seconds = int(-(-values['timeout'] // 1))
  limits = {
    'RLIMIT_CPU': (seconds, seconds + 1),
    'RLIMIT_FSIZE': values['file_size'],
    'RLIMIT_NOFILE': values['files'],
    'RLIMIT_CORE': 0,
  }
  if values['processes']:
    limits['RLIMIT_NPROC'] = values['processes']
  if sys.platform != 'darwin':  # macOS has the name, not the limit.
    limits['RLIMIT_AS'] = values['memory']
  if values['user']:
    _become(int(values['user']))
  if values['landlock']:
    _read_only(int(values['landlock']))
  for name, wanted in limits.items():
    kind = getattr(resource, name)
    soft, hard = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    highest = resource.getrlimit(kind)[1]
    if highest != resource.RLIM_INFINITY:
      soft, hard = min(soft, highest), min(hard, highest)
    resource.setrlimit(kind, (int(soft), int(hard)))


def _become(user):
  """Turns root into a user who owns nothing but the working directory.

  If only root can reach the standard library, the right to read everything
  stays; programs that this process starts do not inherit it.
  """
  import ctypes

  libc = ctypes.CDLL(None, use_errno=True)
  path, closed = os.path.realpath(os.__file__), False
  while path != os.path.dirname(path):
    path = os.path.dirname(path)
    closed |= not os.stat(path).st_mode & 1
  libc.prctl(_PR_SET_KEEPCAPS, int(closed), 0, 0, 0)
  os.setgroups([])
  os.setresgid(user, user, user)
  os.setresuid(user, user, user)
  if closed:
    # Version 3, this process; effective, permitted, inheritable, in halves.
    numbers = [0x20080522, 0], [_CAP_DAC_READ_SEARCH] * 2 + [0] * 4
    header, rights = (
      b''.join(n.to_bytes(4, sys.byteorder) for n in half) for half in numbers
    )
    if libc.capset(header, rights):
      raise OSError(ctypes.get_errno(), 'capset')


def _read_only(version):
  """Applies Landlock: writes in the working directory only, no TCP, no signals.

  Raises:
    OSError: the kernel refuses.
  """
  import ctypes

  libc = ctypes.CDLL(None, use_errno=True)

  def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
      code = ctypes.get_errno()
      raise OSError(code, f'Landlock: {os.strerror(code)}')
    return result

  write, truncate = 1 << 1, 1 << 14
  # Writing, removing and making files; since 2 moving; since 3 truncating.
  changes = write | sum(1 << bit for bit in range(4, 13))
  changes |= (1 << 13) * (version >= 2) | truncate * (version >= 3)
  # TCP since 4, both ways; abstract sockets and signals to others since 6.
  handled = [changes, 3 * (version >= 4), 3 * (version >= 6)]
  size = 24 if version >= 6 else 16 if version >= 4 else 8
  attributes = b''.join(n.to_bytes(8, sys.byteorder) for n in handled)[:size]
  rules = call(444, attributes, size, 0)
  for path, allowed in (('.', changes), (os.devnull, write | truncate)):
    descriptor = os.open(path, os.O_PATH)
    rule = (allowed & changes).to_bytes(8, sys.byteorder)
    rule += descriptor.to_bytes(4, sys.byteorder)
    call(445, rules, 1, rule, 0)
    os.close(descriptor)
  libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  call(446, rules, 0)
  os.close(rules)


if __name__ == '__main__':
  main(sys.argv[1:])
