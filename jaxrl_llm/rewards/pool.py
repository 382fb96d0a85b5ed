"""Processes that score samples, a thread for each, and what waits for them."""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.worker_process import Ready, Reply, WorkerProcess

# After these the process is of no use.
_FATAL = ('timeout', 'crash', 'memory')

# Seconds that a thread has to end; its process has ended well before.
_JOIN_SECONDS = 15.0


class Job(NamedTuple):
  """A sample to score.

  Attributes:
    settle: called with what came of it, once.
    arguments: a JSON object.
  """

  settle: Callable[[Reply | Exception], None]
  arguments: bytes


class Pool:
  """Processes, a thread for each, and the samples that wait for them.

  Holds no reference to the `Workers`, whose end closes it.  A process that has
  ended is replaced when the next sample is there.

  Attributes:
    worked: whether the function has ever given a score.
  """

  def __init__(self, spec: dict[str, Any], load_timeout: float):
    self._jobs = queue.SimpleQueue()
    self.worked = False
    self._spec = spec
    self._load_timeout = load_timeout
    # Paths mean what they meant when the first process loaded the function.
    self._folder = os.getcwd()
    self._source = None
    self._owner = os.getpid()
    self._open = True
    self._processes = set()
    self._threads = []
    # Reentrant: a garbage collection within may close the pool.
    self._lock = threading.RLock()

  def launch(self) -> tuple[WorkerProcess, Ready]:
    """A process that has loaded the function, and what it says of itself."""
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
    """Starts a thread that has samples scored, at first by this process."""
    thread = threading.Thread(
      target=self._work, args=(process,), name='reward worker', daemon=True
    )
    with self._lock:
      thread.start()
      self._threads.append(thread)

  def put(self, jobs: Sequence[Job]) -> None:
    """Has samples scored when their turn comes."""
    with self._lock:
      self._check_open()
      for job in jobs:
        self._jobs.put(job)

  def close(self) -> None:
    """Ends processes and threads; samples that wait are settled as failed."""
    if os.getpid() != self._owner:
      return  # A forked copy of the process that started them.
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
    """Has samples scored one after another until the pool is closed."""
    while (job := self._jobs.get()) is not None:
      process, reply = self._score(process, job.arguments)
      job.settle(reply)
    if process is not None:
      self._end(process)

  def _score(
    self, process: WorkerProcess | None, arguments: bytes
  ) -> tuple[WorkerProcess | None, Reply | Exception]:
    """What came of a sample, and the process if it can go on."""
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
    # What earlier samples did to the process may be the reason.
    return self._score(None, arguments)

  def _end(self, process: WorkerProcess) -> None:
    process.close()
    with self._lock:
      self._processes.discard(process)

  def _check_open(self) -> None:
    if not self._open:
      raise UserError(f'reward {self._spec["name"]!r}: its workers are closed')

  def _check_source(self, source: str | None) -> None:
    """Refuses a file that is no longer the one that was loaded first."""
    self._source = self._source or source
    if source != self._source:
      raise UserError(
        f'{self._spec["field"]}: the file of {self._spec["name"]} has changed\n'
        'a worker that takes the place of another would score by other rules: '
        'put the file\nback, or begin anew'
      )
