"""Runs jobs in parallel processes, each on its own cores."""

import itertools
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.signals import StopSignal


def own_cores() -> set[int]:
  """Returns the cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return os.sched_getaffinity(0)
  return set(range(os.cpu_count()))  # macOS cannot pin.


def slots(count: int) -> list[set[int]]:
  """Returns cores for each of `count` simultaneous processes, shared evenly.

  Raises:
    UserError: there are fewer cores.
  """
  cores = sorted(own_cores())
  if not 1 <= count <= len(cores):
    raise UserError(
      f'--jobs is {count}, but there are {len(cores)} cores: times would not '
      'be comparable'
    )
  bounds = [i * len(cores) // count for i in range(count + 1)]
  return [set(cores[a:b]) for a, b in itertools.pairwise(bounds)]


def launch(
  jobs: Iterable[Any],
  workdir: pathlib.Path,
  slots: Sequence[set[int]],
  command: Sequence[str],
  stop: StopSignal,
) -> Iterator[tuple[Any, int, float]]:
  """Runs jobs, one process per slot, in order.

  Args:
    jobs: objects with a `name`.
    workdir: of the comparison; logs and compiled programs go there.
    slots: cores of each simultaneous process.
    command: trains the run that `--run` at its end names.
    stop: when it is requested, running jobs are asked to save and to end, and
      no other one begins.

  Yields:
    (job, exit status, seconds) as jobs end.
  """
  (workdir / 'logs').mkdir(parents=True, exist_ok=True)
  own, numbers = threading.local(), itertools.count()
  closed = threading.Event()
  over = lambda: stop.requested or closed.is_set()

  def pin():
    own.slot = next(numbers)
    if hasattr(os, 'sched_setaffinity'):
      # Of this thread, and of the processes that it starts.
      os.sched_setaffinity(0, slots[own.slot])

  def run(job):
    if over():
      return None
    # Programs are compiled once per slot, not once per seed; two processes
    # never write the same cache.
    environment = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': str(workdir / 'cache' / str(own.slot)),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    arguments, start = [*command, f'--run={job.name}'], time.perf_counter()
    with open(_log(workdir, job), 'w', encoding='utf-8') as out:
      process = subprocess.Popen(
        arguments, stdout=out, stderr=out, env=environment
      )
    while process.poll() is None and not over():
      time.sleep(0.05)
    process.terminate()  # unless it has ended
    return job, process.wait(), time.perf_counter() - start

  with futures.ThreadPoolExecutor(len(slots), initializer=pin) as threads:
    try:
      runs = [threads.submit(run, job) for job in jobs]
      yield from filter(None, (x.result() for x in futures.as_completed(runs)))
    finally:
      closed.set()  # The consumer may fail: no run outlives it.


def _log(workdir: pathlib.Path, job: Any) -> pathlib.Path:
  return workdir / 'logs' / f'{job.name}.log'


def failure(workdir: pathlib.Path, job: Any, code: int) -> str:
  """Returns the last error of a run in one line."""
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  lines = _log(workdir, job).read_text(encoding='utf-8').splitlines()
  errors = [line for line in lines if line.startswith('error: ')]
  shown = errors or [line for line in lines if line.strip()] or ['no output']
  return f'{shown[-1].removeprefix("error: ")} (status {code})'
