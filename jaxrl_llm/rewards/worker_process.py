"""One worker, seen from the process that started it."""

import contextlib
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import interruptible
from jaxrl_llm.rewards.calling import Parameters

_WROTE = 'wrote to the channel of its worker'
# Most bytes in a line from a worker; anything longer is not a reply.
_MAX_LINE = 1 << 16
# Seconds for a supervisor to end with all processes that it watches.
_GRACE = 5.0

# Environment variables that a worker gets: those that locate files and devices.
# A secret's name need not reveal it, so this lists what is kept.
_KEPT = re.compile(
  'HOME|LANG|LANGUAGE|LOGNAME|PATH|SHELL|TERM|TZ|USER|TE?MP|TMPDIR|VIRTUAL_ENV'
  '|CONDA_PREFIX|GLIBC_TUNABLES|(DY)?LD_.*|(CUDA|JAX|LC|NVIDIA|XLA)_.*'
  '|PYTHON[A-Z0-9]*|XDG_.*_HOME|(CURL|REQUESTS)_CA_BUNDLE|SSL_CERT_(DIR|FILE)'
  '|(HF|JAVA|TORCH)_HOME|(HF_HUB|HF_DATASETS|TRANSFORMERS)_(CACHE|OFFLINE)'
)
# A worker computes on one core and leaves accelerators alone.
_SET = {'JAX_PLATFORMS': 'cpu', 'MKL_NUM_THREADS': '1'}
_SET |= {'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}


class Ready(NamedTuple):
  """A worker's report once it has loaded the function.

  Attributes:
    containment: a kind of `containment.KINDS`.
    memory_limited: True if the system enforces the limit.
    parameters: those of the function.
    source: sha256 of the user's file that defines it; None without one.
  """

  containment: str
  memory_limited: bool
  parameters: Parameters
  source: str | None


class Reply(NamedTuple):
  """The outcome of one sample.

  Attributes:
    kind: 'score', 'user' for a UserError of the function, or one of
      `workers.FAILURES`.
    score: the score, if there is one; also None if the function returned None.
    message: the reason for a missing score.
  """

  kind: str
  score: float | None = None
  message: str = ''


class WorkerProcess:
  """A process that loads a reward function and scores samples one by one.

  Used by one thread at a time, except for `terminate`.

  Args:
    spec: as `worker` reads it, without 'pythonpath', which is added.
    folder: its working directory.

  Attributes:
    asked: number of samples sent to it.

  Raises:
    UserError: the process cannot be started.
  """

  def __init__(self, spec: Mapping[str, Any], folder: str):
    self.asked = 0
    self._spec = spec
    self._received = b''
    # Whatever can be imported here can be imported there.
    path = os.pathsep.join(entry or folder for entry in sys.path)
    kept = {n: value for n, value in os.environ.items() if _KEPT.fullmatch(n)}
    named = {n: os.environ[n] for n in spec['environment'] if n in os.environ}
    # Not on the command line, which all users of the machine can read.
    sent = {**spec, 'pythonpath': os.environ.get('PYTHONPATH')}
    self._unsent = json.dumps(sent).encode() + b'\n'
    try:
      self._process = subprocess.Popen(
        [sys.executable, '-m', 'jaxrl_llm.rewards.worker'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=folder,
        env=kept | _SET | named | {'PYTHONPATH': path},
        start_new_session=True,  # The parent decides about Ctrl-C.
      )
    except OSError as error:
      raise UserError(
        f'{spec["field"]}: no worker process can be started: {error}'
      ) from error
    self._requests = self._process.stdin.fileno()
    self._replies = self._process.stdout.fileno()
    os.set_blocking(self._requests, False)

  def wait_ready(self, seconds: float) -> Ready:
    """Waits until the function is loaded.

    A check set by `interruptible.checked` may end the wait.

    Raises:
      UserError: loading fails or takes too long.
    """
    field, name = self._spec['field'], self._spec['name']
    try:
      kind, content = json.loads(self._first_line(seconds))
    except TimeoutError as error:
      raise UserError(
        f'{field}: {name} does not load within {seconds:g} s'
      ) from error
    except (EOFError, ValueError) as error:
      raise UserError(
        f'{field}: the process that loads {name} {self._ending().message}\n'
        'either importing the function ends the process, or it needs more '
        f'memory than {self._spec["memory"]} bytes'
      ) from error
    if kind == 'failed':
      raise UserError(content)
    named, required, rest = content.pop('parameters')
    taken = Parameters(tuple(named), tuple(required), rest)
    return Ready(**content, parameters=taken)

  def ask(self, arguments: bytes, seconds: float) -> Reply:
    """Scores one sample.

    Args:
      arguments: a JSON object.
      seconds: wall time allowed.

    Returns:
      A reply.  After 'timeout', 'crash' and 'memory' the process is unusable
      and must be closed.
    """
    self.asked += 1
    line = b'[%d, %s]\n' % (self.asked, arguments)
    try:
      self._check_silent()
      received = self._exchange(line, seconds)
    except TimeoutError:
      return Reply('timeout', message=f'no answer in {seconds:g} s')
    except EOFError:
      return self._ending()
    except ValueError as error:
      return Reply('crash', message=str(error))
    return _parsed(received, self.asked)

  def terminate(self) -> None:
    """Asks the process to end with all that it started; does not wait."""
    self._process.terminate()

  def close(self) -> None:
    """Ends the process and waits until it and all that it started are gone."""
    self._process.stdin.close()
    self._process.terminate()
    try:
      self._process.wait(_GRACE)
    except subprocess.TimeoutExpired:
      # The supervisor is stuck; the kernel ends its children with it.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, signal.SIGKILL)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(_GRACE)
    self._process.stdout.close()

  def _first_line(self, seconds: float) -> bytes:
    """Returns the worker's first line; raises as `_exchange` does."""
    deadline, lines = time.monotonic() + seconds, []

    def has_line(pause: float | None) -> bool:
      left = deadline - time.monotonic()
      try:
        lines.append(self._exchange(b'', min(left, pause or left)))
      except TimeoutError:
        if time.monotonic() >= deadline:
          raise
      return bool(lines)

    interruptible.wait(has_line)
    return lines[0]

  def _exchange(self, request: bytes, seconds: float) -> bytes:
    """Sends a line, if any, and returns the reply.

    Raises:
      TimeoutError: no reply came in time; the next call continues from here.
      EOFError: the process has ended.
      ValueError: it is not a reply.
    """
    poll = select.poll()
    poll.register(self._replies, select.POLLIN)
    self._unsent += request
    self._send()
    if self._unsent:
      poll.register(self._requests, select.POLLOUT)
    deadline = time.monotonic() + seconds
    while b'\n' not in self._received:
      left = deadline - time.monotonic()
      ready = poll.poll(math.ceil(max(left, 0.0) * 1000))
      # A reply in time counts, even if this thread was kept from seeing it.
      if left <= 0 and not ready:
        raise TimeoutError
      for descriptor, _ in ready:
        if descriptor == self._replies:
          self._receive()
          continue
        self._send()
        if not self._unsent:
          poll.unregister(self._requests)
    line, _, self._received = self._received.partition(b'\n')
    if self._received:
      raise ValueError(_WROTE)
    return line

  def _check_silent(self) -> None:
    """Raises as `_exchange` does if anything came after the last reply."""
    poll = select.poll()
    poll.register(self._replies, select.POLLIN)
    if poll.poll(0):
      self._receive()
      raise ValueError(_WROTE)

  def _receive(self) -> None:
    received = os.read(self._replies, _MAX_LINE)
    if not received:
      raise EOFError
    self._received += received
    if len(self._received) > _MAX_LINE:
      raise ValueError(_WROTE)

  def _send(self) -> None:
    """Sends what the channel takes."""
    if not self._unsent:
      return
    try:
      sent = os.write(self._requests, self._unsent)
      self._unsent = self._unsent[sent:]
    except BlockingIOError:
      pass
    except BrokenPipeError as error:
      raise EOFError from error

  def _ending(self) -> Reply:
    """Returns the cause of the process's end."""
    try:
      status = self._process.wait(_GRACE)
    except subprocess.TimeoutExpired:
      return Reply('crash', message='closed its channel')
    number = status - 128 if status > 128 else -status
    if number == signal.SIGXCPU:
      return Reply('timeout', message='used up its CPU time')
    if number <= 0 or number not in set(signal.Signals):
      return Reply('crash', message=f'ended with status {status}')
    return Reply(
      'crash', message=f'was killed by {signal.Signals(number).name}'
    )


def _parsed(line: bytes, number: int) -> Reply:
  """Parses a line as the reply to the request with this number."""
  try:
    answered, kind, content = json.loads(line)
    if answered == number:
      if kind == 'score' and (content is None or math.isfinite(content)):
        return Reply('score', score=content)
      if kind in ('error', 'memory', 'user') and isinstance(content, str):
        return Reply(kind, message=content)
  except (TypeError, ValueError, RecursionError, OverflowError):
    pass
  return Reply('crash', message=_WROTE)
