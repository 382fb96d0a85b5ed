"""Runs in processes of their own, so many at a time, each on its own cores."""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.signals import StopSignal

_ATTEMPT = '--- an attempt begins\n'


def own_cores() -> set[int]:
  """The cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return os.sched_getaffinity(0)
  return set(range(os.cpu_count()))  # macOS cannot pin


def slots(count: int) -> list[set[int]]:
  """Cores for each of `count` processes at a time, shared out evenly.

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
  waiting: Sequence[Any],
  workdir: pathlib.Path,
  places: Sequence[set[int]],
  command: Sequence[str],
  stop: StopSignal,
) -> Iterator[tuple[Any, int, float]]:
  """Runs jobs, one process per place, in order.

  Args:
    waiting: what to run.
    workdir: of the comparison; logs and compiled programs go there.
    places: cores of each process that runs at a time.
    command: trains the run that `--run` at its end names.
    stop: when it is requested, running jobs are asked to save and to end, and
      no further one begins.

  Yields:
    (job, exit status, seconds) as jobs end.
  """
  waiting, running = list(waiting), {}
  asked = False
  try:
    while running or (waiting and not asked):
      for place, cores in enumerate(places):
        if place not in running and waiting and not asked:
          job = waiting.pop(0)
          process = _start(job, workdir, cores, place, command)
          running[place] = job, process, time.perf_counter()
      if stop.requested and not asked:
        asked = True
        for _, process, _ in running.values():
          process.send_signal(signal.SIGTERM)
      for place, (job, process, start) in list(running.items()):
        if process.poll() is not None:
          del running[place]
          yield job, process.returncode, time.perf_counter() - start
      time.sleep(0.05)
  finally:
    # Whoever reads may fail: no run goes on without its comparison.
    for _, process, _ in running.values():
      process.terminate()
    for _, process, _ in running.values():
      process.wait()


def _start(job, workdir, cores, place, command) -> subprocess.Popen:
  (workdir / 'logs').mkdir(exist_ok=True)
  # A run's programs are compiled once per place, not once per seed; two
  # processes never write one cache.
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(workdir / 'cache' / str(place)),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  own = own_cores()
  with open(_log(workdir, job), 'a', encoding='utf-8') as log:
    log.write(_ATTEMPT)
    log.flush()
    # The child inherits them, before it has any thread.
    if hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(0, cores)
    try:
      return subprocess.Popen(
        [*command, f'--run={job.name}'],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
      )
    finally:
      if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, own)


def _log(workdir: pathlib.Path, job: Any) -> pathlib.Path:
  return workdir / 'logs' / f'{job.name}.log'


def why(workdir: pathlib.Path, job: Any, code: int) -> str:
  """One line for what a run said last."""
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  said = _log(workdir, job).read_text(encoding='utf-8')
  lines = said.rpartition(_ATTEMPT)[2].splitlines()
  errors = [line for line in lines if line.startswith('error: ')]
  said = errors or [line for line in lines if line.strip()] or ['no word']
  return f'{said[-1].removeprefix("error: ")} (status {code})'
