"""A pool of worker processes with a thread each, and a queue of samples."""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.worker_process import Ready, Reply, WorkerProcess

# Failures after which the process is unusable.
_FATAL = ('timeout', 'crash', 'memory')

# Seconds for a thread to end; its process has ended well before.
_JOIN_SECONDS = 15.0


class Job(NamedTuple):
  """A sample to score.

  Attributes:
    settle: called once, with the outcome.
    arguments: a JSON object.
  """

  settle: Callable[[Reply | Exception], None]
  arguments: bytes


class Pool:
  """Processes, a thread for each, and the queue of samples.

  It holds no reference to the `Workers`, whose end closes it.  A process that
  has ended is replaced when the next sample arrives.

  Attributes:
    worked: True once the function has given a score.
  """

  def __init__(self, spec: dict[str, Any], load_timeout: float):
    self._jobs = queue.SimpleQueue()
    self.worked = False
    self._spec = spec
    self._load_timeout = load_timeout
    # Paths keep the meaning they had when the first process loaded the
    # function.
    self._folder = os.getcwd()
    self._source = None
    self._owner = os.getpid()
    self._open = True
    self._processes = set()
    self._threads = []
    # Reentrant: a garbage collection while it is held may close the pool.
    self._lock = threading.RLock()

  def launch(self) -> tuple[WorkerProcess, Ready]:
    """Starts a process that loads the function; returns it and its report."""
    with self._lock:
      self._check_open()
      process = WorkerProcess(self._spec, self._folder)
      self._processes.add(process)
    try:
      ready = process.wait_ready(self._load_timeout)
      self._check_source(ready.source)
    except BaseException:
      self._end(process)
      raise
    return process, ready

  def serve(self, process: WorkerProcess | None) -> None:
    """Starts a thread that scores samples, first with this process."""
    thread = threading.Thread(
      target=self._work, args=(process,), name='reward worker', daemon=True
    )
    with self._lock:
      thread.start()
      self._threads.append(thread)

  def put(self, jobs: Sequence[Job]) -> None:
    """Queues samples for scoring."""
    with self._lock:
      self._check_open()
      for job in jobs:
        self._jobs.put(job)

  def close(self) -> None:
    """Ends processes and threads; settles waiting samples as failed."""
    if os.getpid() != self._owner:
      return  # This is a forked copy of the process that started them.
    with self._lock:
      self._open = False
      processes, threads = list(self._processes), list(self._threads)
      for _ in threads:
        self._jobs.put(None)
    for process in processes:
      process.terminate()
    for thread in threads:
      if thread is not threading.current_thread():
        thread.join(_JOIN_SECONDS)

  def _work(self, process: WorkerProcess | None) -> None:
    """Scores samples one after another until the pool is closed."""
    while (job := self._jobs.get()) is not None:
      process, reply = self._score(process, job.arguments)
      job.settle(reply)
    if process is not None:
      self._end(process)

  def _score(
    self, process: WorkerProcess | None, arguments: bytes
  ) -> tuple[WorkerProcess | None, Reply | Exception]:
    """Scores a sample; returns the process, if usable, and the outcome."""
    try:
      self._check_open()
      if process is None:
        process, _ = self.launch()
      fresh = not process.asked
      reply = process.ask(arguments, self._spec['timeout'])
      self._check_open()
      if reply.kind not in _FATAL:
        self.worked = self.worked or reply.kind == 'score'
        return process, reply
      self._end(process)
      if fresh or reply.kind == 'timeout':
        return None, reply
    except Exception as error:
      if process is not None:
        self._end(process)
      return None, error
    # Earlier samples may have damaged the process.
    return self._score(None, arguments)

  def _end(self, process: WorkerProcess) -> None:
    process.close()
    with self._lock:
      self._processes.discard(process)

  def _check_open(self) -> None:
    if not self._open:
      raise UserError(f'reward {self._spec["name"]!r}: its workers are closed')

  def _check_source(self, source: str | None) -> None:
    """Refuses a file that differs from the one loaded first."""
    self._source = self._source or source
    if source != self._source:
      raise UserError(
        f'{self._spec["field"]}: the file of {self._spec["name"]} has changed\n'
        'a replacement worker would score by other rules: restore the file or '
        'restart'
      )
