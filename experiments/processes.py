"""Runs jobs in processes, a few at a time, each on its own cores."""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.signals import StopSignal

_ATTEMPT = '--- an attempt begins\n'


def own_cores() -> set[int]:
  """Returns the cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return os.sched_getaffinity(0)
  return set(range(os.cpu_count()))  # macOS cannot pin


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
  return [set(cores[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def launch(
  waiting: Iterable[Any],
  workdir: pathlib.Path,
  places: Sequence[set[int]],
  command: Sequence[str],
  stop: StopSignal,
) -> Iterator[tuple[Any, int, float]]:
  """Runs jobs, one process per place, in order.

  Args:
    waiting: jobs, with a `name`.
    workdir: of the comparison; logs and compiled programs go there.
    places: cores of each simultaneous process.
    command: trains the run that `--run` at its end names.
    stop: when it is requested, running jobs are asked to save and to end, and
      no other one begins.

  Yields:
    (job, exit status, seconds) as jobs end.
  """
  waiting, running, stopping = list(waiting), {}, False
  try:
    while running or (waiting and not stopping):
      for place, cores in enumerate(places):
        if place not in running and waiting and not stopping:
          job = waiting.pop(0)
          process = _start(job, workdir, cores, place, command)
          running[place] = job, process, time.perf_counter()
      if stop.requested and not stopping:
        stopping = True
        for _, process, _ in running.values():
          process.send_signal(signal.SIGTERM)
      for place, (job, process, start) in list(running.items()):
        if process.poll() is not None:
          del running[place]
          yield job, process.returncode, time.perf_counter() - start
      time.sleep(0.05)
  finally:
    # The consumer may fail: no run outlives its comparison.
    for _, process, _ in running.values():
      process.terminate()
    for _, process, _ in running.values():
      process.wait()


def _start(job, workdir, cores, place, command) -> subprocess.Popen:
  (workdir / 'logs').mkdir(exist_ok=True)
  # Programs are compiled once per place, not once per seed; two processes never
  # write the same cache.
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(workdir / 'cache' / str(place)),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  own, pinned = own_cores(), hasattr(os, 'sched_setaffinity')
  with open(_log(workdir, job), 'a', encoding='utf-8') as log:
    log.write(_ATTEMPT)
    log.flush()
    # The child inherits the cores before it has any thread.
    if pinned:
      os.sched_setaffinity(0, cores)
    try:
      return subprocess.Popen(
        [*command, f'--run={job.name}'],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
      )
    finally:
      if pinned:
        os.sched_setaffinity(0, own)


def _log(workdir: pathlib.Path, job: Any) -> pathlib.Path:
  return workdir / 'logs' / f'{job.name}.log'


def why(workdir: pathlib.Path, job: Any, code: int) -> str:
  """Returns the last error of a run in one line."""
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  text = _log(workdir, job).read_text(encoding='utf-8')
  lines = text.rpartition(_ATTEMPT)[2].splitlines()
  errors = [line for line in lines if line.startswith('error: ')]
  shown = errors or [line for line in lines if line.strip()] or ['no word']
  return f'{shown[-1].removeprefix("error: ")} (status {code})'
