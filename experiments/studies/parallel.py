"""Runs jobs in parallel processes, each on its own cores."""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.signals import StopSignal

# macOS cannot pin.
_get_cores = getattr(
  os, 'sched_getaffinity', lambda pid: set(range(os.cpu_count()))
)
_pin = getattr(os, 'sched_setaffinity', lambda pid, cores: None)


def own_cores() -> set[int]:
  """Returns the cores that this process may use."""
  return _get_cores(0)


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
  waiting, running = list(jobs), {}
  try:
    while (waiting or running) and not stop.requested:
      for slot, cores in enumerate(slots):
        if waiting and slot not in running:
          job, start = waiting.pop(0), time.perf_counter()
          process = _start(job, workdir, slot, cores, command)
          running[slot] = job, process, start
      for slot, (job, process, start) in list(running.items()):
        if process.poll() is not None:
          del running[slot]
          yield job, process.returncode, time.perf_counter() - start
      time.sleep(0.05)
  finally:
    # The consumer may fail: no run outlives its comparison.
    for _, process, _ in running.values():
      process.terminate()
    for _, process, _ in running.values():
      process.wait()
  for job, process, start in running.values():
    yield job, process.returncode, time.perf_counter() - start


def _start(job, workdir, slot, cores, command) -> subprocess.Popen:
  former, log = own_cores(), _log(workdir, job)
  log.parent.mkdir(parents=True, exist_ok=True)
  # Programs are compiled once per slot, not once per seed; two processes never
  # write the same cache.
  environment = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(workdir / 'cache' / str(slot)),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  arguments = [*command, f'--run={job.name}']
  with open(log, 'w', encoding='utf-8') as out:
    # The child inherits the cores before it has any thread.
    _pin(0, cores)
    try:
      return subprocess.Popen(
        arguments, stdout=out, stderr=out, env=environment
      )
    finally:
      _pin(0, former)


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
