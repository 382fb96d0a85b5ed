"""Reward functions in worker processes that can be killed.

Math parsers hang in C code, and generated programs do anything.  A time-out by
signal fails in threads, and a pool's `future.result(timeout)` does not free the
worker.  So each process (see `worker`) scores one sample at a time, and one
that does not answer is killed with all that it started (see `containment`); a
new process replaces it while the others continue.
"""

import json
import math
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import calling, interruptible, learned
from jaxrl_llm.rewards.containment import KINDS

# Kinds of failures.  After the last three the process is unusable.
FAILURES = ('error', 'timeout', 'crash', 'memory')
FATAL = FAILURES[1:]

# Bytes.  The interpreter alone takes 10 MB.
_LEAST_MEMORY = 1 << 26
_MAX_LINE = 1 << 16  # bytes of a reply
# Seconds for a process to load the function.
_LOADING = 120.0
# Seconds for a supervisor to end with all processes that it watches.
_GRACE = 5.0
# Whatever can be imported here, or from the working folder, can be there.
_BOOT = (
  'import sys; sys.path[:], sys.argv[1:] = sys.argv[1:], []; '
  'import jaxrl_llm.rewards.worker as worker; worker.main()'
)
# Environment variables that a worker gets: those that locate files and devices.
# A secret's name need not reveal it, so this lists what is kept.
_KEPT = re.compile(
  'HOME|LANG|LANGUAGE|LOGNAME|PATH|SHELL|TERM|TZ|USER|TE?MP|TMPDIR|VIRTUAL_ENV'
  '|CONDA_PREFIX|GLIBC_TUNABLES|(DY)?LD_.*|(CUDA|JAX|LC|NVIDIA|XLA)_.*'
  '|PYTHON[A-Z0-9]*|XDG_.*_HOME|(CURL|REQUESTS)_CA_BUNDLE|SSL_CERT_(DIR|FILE)'
  '|(HF|JAVA|TORCH)_HOME|(HF_HUB|HF_DATASETS|TRANSFORMERS)_(CACHE|OFFLINE)'
)
# A worker computes on one core and leaves accelerators alone.
_THREADS = 'MKL_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'
_SET = {'JAX_PLATFORMS': 'cpu'} | dict.fromkeys(_THREADS, '1')


class Workers:
  """A reward function that runs in its own processes, sample by sample.

    with Workers('mine.py:verify', workers=4, timeout=2.0) as workers:
      pending = workers.submit(prompts, completions, {'answer': answers})
      ...  # The device computes meanwhile.
      scores = pending.result()

  It is itself a reward function.  Each sample is a separate call with lists of
  length 1; state (caches, an open program) persists in a process.  A sample
  fails if it takes more than `timeout` seconds (h that hang delay a batch by
  ⌈h / workers⌉ time-outs), crashes its process, needs more memory, raises, or
  returns anything but a finite number or None.  If its process crashed or
  exceeded its memory after it had served others, it is tried once more.

  Printed output is discarded.  This is not a sandbox: the function keeps full
  access to files and network.  Processes survive Ctrl-C and end with `close`,
  with the last reference, and when this process ends for any reason.

  Args:
    name: a function or factory of `rewards.functions` or `.code`,
      'file.py:function', or 'module:function', loaded only in the workers.  Its
      attribute `warm_up`, if any, is called before the first sample.
    settings: arguments of a factory, JSON values.
    workers: number of processes.
    timeout: seconds of wall time per sample, from when a process takes it.
    memory: bytes that a process, and each that the function starts, may write
      to (macOS does not enforce it); the interpreter takes 10 MB.
    containment: a kind of `containment.KINDS`; the strongest by default.
    environment: names of variables that the function reads besides those that
      locate files and devices, such as ('OPENAI_API_KEY',).
    field: prefix of messages about name and settings.

  Attributes:
    name, containment: as given, and the kind in use.

  Raises:
    UserError: the function cannot be loaded, or an argument is invalid.
  """

  def __init__(
    self,
    name: str,
    settings: Mapping[str, Any] | None = None,
    *,
    workers: int = 2,
    timeout: float = 5.0,
    memory: int = 2 << 30,
    containment: str | None = None,
    environment: Sequence[str] = (),
    field: str | None = None,
  ):
    self.name = name
    spec = dict(name=name, settings=dict(settings or {}), timeout=timeout)
    spec |= dict(memory=memory, containment=containment)
    spec |= dict(field=field or f'reward {name!r}')
    _check(spec, workers, environment)
    self._pool = _Pool(spec, environment)
    self._finalizer = weakref.finalize(self, self._pool.close)
    try:
      ready = self._pool.start(workers)
    except BaseException:
      self.close()
      raise
    self._parameters = calling.Parameters(*ready['parameters'])
    self.containment = ready['containment']

  def submit(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
  ) -> 'Pending':
    """Starts scoring N responses and returns at once.

    Raises:
      UserError: a column that the function names is missing or holds values
        that JSON cannot express, or the workers are closed.
    """
    arguments = {'prompts': prompts, 'completions': completions, **columns}
    arguments = calling.select_arguments(self.name, self._parameters, arguments)
    samples = calling.encode_each(self.name, arguments)
    return Pending(self.name, completions, self._pool, self._pool.put(samples))

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], **columns
  ) -> list[float | None]:
    """Scores N responses; raises as `submit` and `Pending.result` do."""
    return self.submit(prompts, completions, columns).result()

  def close(self) -> None:
    """Ends the processes.  Pending scores then raise UserError."""
    self._finalizer()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


class Pending:
  """Scores that workers have not yet delivered."""

  def __init__(self, name, completions, pool: '_Pool', outcomes: list[Future]):
    self._name, self._completions = name, list(completions)
    self._pool, self._outcomes = pool, outcomes

  def done(self) -> bool:
    """Returns True if `result` would return, or raise, at once."""
    return all(outcome.done() for outcome in self._outcomes)

  def result(self) -> list[float | None]:
    """Waits for the N scores; None where there is none.

    Raises:
      UserError: the function raised one, or an error for every sample before
        there was any score; or the workers were closed or cannot be restarted.
    """
    replies = self._replies()
    for i, (kind, content) in enumerate(replies):
      if kind == 'user':
        raise UserError(f'reward {self._name!r}, sample {i} alone: {content}')
    useless = not self._pool.worked and {kind for kind, _ in replies}
    if useless == {'error'}:
      raise UserError(
        f'reward {self._name!r} fails on every sample of the first batch:\n'
        f'{self.failures()[0][1]}'
      )
    return [content if kind == 'score' else None for kind, content in replies]

  def failures(self) -> dict[int, tuple[str, str]]:
    """Waits for all samples; returns kind and message of those that failed."""
    failures = {}
    for i, (kind, content) in enumerate(self._replies()):
      if kind in FAILURES:
        text = calling.shortened(self._completions[i])
        failures[i] = kind, f'{content} (sample {i}, completion {text!r})'
    return failures

  def _replies(self) -> list[tuple[str, Any]]:
    _wait(self._outcomes)
    return [outcome.result() for outcome in self._outcomes]


class _Pool:
  """Threads with a process each, and their queue of samples.

  It holds no reference to the `Workers`, whose end closes it.  A process that
  has ended is replaced when the next sample arrives.  `worked` becomes True
  with the first score.
  """

  def __init__(self, spec: dict, environment: Sequence[str]):
    self.worked = False
    self._spec, self._environment = spec, environment
    # Paths keep the meaning that they had for the first process.
    self._folder, self._source = os.getcwd(), None
    self._owner, self._open = os.getpid(), True
    self._jobs, self._processes, self._threads = queue.SimpleQueue(), set(), []

  def start(self, workers: int) -> dict[str, Any]:
    """Starts threads and a process; returns what it reports when ready."""
    for _ in range(workers):
      self._threads.append(threading.Thread(target=self._work, daemon=True))
      self._threads[-1].start()
    loaded = self.put([None])
    _wait(loaded)
    _, ready = loaded[0].result()
    # The first process has found out what works here.
    self._spec['containment'] = ready['containment']
    return ready

  def put(self, samples: Sequence[bytes | None]) -> list[Future]:
    """Queues samples, or None to load the function; returns their replies."""
    replies = [Future() for _ in samples]
    for job in zip(replies, samples, strict=True):
      self._jobs.put(job)
    self._check_open()
    return replies

  def close(self) -> None:
    """Ends processes and threads; samples that wait raise UserError."""
    if os.getpid() != self._owner:
      return  # This is a forked copy of the process that started them.
    self._open = False
    for _ in self._threads:
      self._jobs.put(None)
    for process in list(self._processes):
      process.popen.terminate()
    for thread in self._threads:
      if thread is not threading.current_thread():
        thread.join(3 * _GRACE)

  def _work(self) -> None:
    """Answers one job after another until the pool is closed."""
    process = None
    while (job := self._jobs.get()) is not None:
      future, sample = job
      while not future.done():
        try:
          process = process or self._launch()
          used, reply = process.used, process.ready
          if sample is not None:
            reply = process.ask(sample, self._spec['timeout'])
            process.used = True
          self._check_open()
        except Exception as error:
          process = self._end(process)
          future.set_exception(error)
          break
        self.worked |= reply[0] == 'score'
        if reply[0] in FATAL:
          process = self._end(process)
          if used and reply[0] != 'timeout':
            continue  # Earlier samples may have damaged it: once more.
        future.set_result(reply)
    self._end(process)

  def _launch(self) -> '_Process':
    """Starts a process that loads the function."""
    name, field, memory = (self._spec[k] for k in ('name', 'field', 'memory'))
    process = _Process(self._folder, self._environment)
    self._processes.add(process)
    kind, content = process.ask(json.dumps(self._spec).encode(), _LOADING)
    if kind == 'ready' and self._open:
      self._source = self._source or content['source']
      if content['source'] == self._source:
        process.ready = kind, content
        return process
      content = (
        f'{field}: the file of {name} has changed\n'
        'new workers would score by other rules: restore the file or restart'
      )
    elif kind != 'user':
      content = (
        f'{field}: the process that loads {name} {content}\nimporting the '
        f'function ends or blocks it, or needs more memory than {memory} bytes'
      )
    self._end(process)
    self._check_open()
    raise UserError(content)

  def _end(self, process: '_Process | None') -> None:
    if process is not None:
      process.close()
      self._processes.discard(process)

  def _check_open(self) -> None:
    if not self._open:
      raise UserError(f'reward {self._spec["name"]!r}: its workers are closed')


class _Process:
  """A worker's process and the channel to it; one thread at a time asks.

  A reply is a kind, of `worker` or of `FAILURES`, and its content.  `ready` is
  the one about the loaded function; `used` becomes True with the first sample.
  """

  def __init__(self, folder: str, environment: Sequence[str]):
    self.ready, self.used = None, False
    copied = {
      name: value
      for name, value in os.environ.items()
      if name in environment or _KEPT.fullmatch(name) and name not in _SET
    }
    self._channel, theirs = socket.socketpair()
    self._lines = self._channel.makefile('rb')
    with theirs:
      self.popen = subprocess.Popen(
        # Settings are sent: all users can read a command line.
        [sys.executable, '-c', _BOOT, folder, *filter(None, sys.path)],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        cwd=folder,
        env=_SET | copied,
        start_new_session=True,  # The parent decides about Ctrl-C.
      )

  def close(self) -> None:
    """Ends the process and waits until it and all that it started are gone."""
    self._lines.close()
    self._channel.close()
    self.popen.terminate()
    try:
      self.popen.wait(_GRACE)
    except subprocess.TimeoutExpired:
      # The supervisor is stuck; the kernel ends its children with it.
      self.popen.kill()
      self.popen.wait()

  def ask(self, content: bytes, seconds: float) -> tuple[str, Any]:
    """Sends JSON, and returns the reply; after a `FATAL` one it is unusable."""
    token = secrets.token_hex(8)
    request = b'["%s", %s]\n' % (token.encode(), content)
    try:
      self._channel.settimeout(seconds)
      self._channel.sendall(request)
      line = self._lines.readline(_MAX_LINE)
      if not line:
        return self._ending()
      answered, kind, content = json.loads(line)
      # What an earlier sample wrote does not know the token.
      if answered == token:
        return kind, content
    except TimeoutError:
      return 'timeout', f'gave no answer in {seconds:g} s'
    except OSError:
      return self._ending()
    except (TypeError, ValueError, RecursionError):
      pass
    return 'crash', 'wrote to the channel of its worker'

  def _ending(self) -> tuple[str, str]:
    """Returns the cause of the process's end."""
    try:
      status = self.popen.wait(_GRACE)
    except subprocess.TimeoutExpired:
      return 'crash', 'closed its channel'
    ways = {128 + n: f'was killed by {n.name}' for n in signal.Signals}
    return 'crash', ways.get(status, f'ended with status {status}')


def _wait(futures: Sequence[Future]) -> None:
  interruptible.wait(lambda seconds: not wait(futures, seconds).not_done)


def _check(spec: Mapping[str, Any], workers: int, environment) -> None:
  """Raises UserError for an invalid argument."""
  whole = lambda value, least: type(value) is int and value >= least
  name, timeout, memory = (spec[k] for k in ('name', 'timeout', 'memory'))
  timed = type(timeout) in (int, float) and 0 < timeout < math.inf
  # Values of the environment are not shown: they may be the secret itself.
  set_names = isinstance(environment, list | tuple) and all(
    isinstance(each, str) and each in os.environ for each in environment
  )
  kind, kinds = spec['containment'], ', '.join(KINDS)
  valid = {
    f'workers is {workers!r}, not a positive integer': whole(workers, 1),
    f'timeout is {timeout!r}, not a number of seconds': timed,
    f'memory is {memory!r}\nit is a number of bytes, at least '
    f'{_LEAST_MEMORY}': whole(memory, _LEAST_MEMORY),
    f"{name} computes on this process's devices\nleave out workers": (
      name not in learned.__all__
    ),
    'environment must list names of variables that are set\nexport them in the '
    "shell and write environment=('OPENAI_API_KEY',)": set_names,
    f'containment is {kind!r}\nchoose one of {kinds}': kind in (None, *KINDS),
  }
  valid |= {
    f'{key} is {value!r}, which is not a JSON value\n'
    'it is sent to worker processes; write a list for a tuple': (
      calling.is_json(value)
    )
    for key, value in spec['settings'].items()
  }
  for problem, holds in valid.items():
    if not holds:
      raise UserError(f'{spec["field"]}: {problem}')
