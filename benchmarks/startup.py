"""Time of a training from its command to its first finished step.

    python -m benchmarks.startup --config=experiments/configs/quickstart.py

Every round starts `experiments.train` twice: with an empty cache of compiled
programs, and with the one that the first start has filled.  The process is
ended as soon as `metrics.jsonl` has the record of step 1.  Besides the fields
of `measuring` it prints:

  seconds: with the cache warm; cold_seconds: with it empty.
  compile_seconds: time that the cache saves, the difference of the medians.
  peak_bytes: that of the processes up to then.
"""

import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import flags

from benchmarks import measuring
from experiments import cli
from jaxrl_llm.errors import UserError

_POLL = 0.01  # seconds


def first_step(config: str, cache: str, limit: float) -> float:
  """Returns the seconds until a new run has finished its first step.

  Args:
    config: path of the configuration.
    cache: folder used as the user's own cache folder.
    limit: seconds after which to give up.

  Raises:
    UserError: the run ends or takes too long.
  """
  environment = dict(os.environ) | {'XDG_CACHE_HOME': cache}
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  with tempfile.TemporaryDirectory() as folder:
    run = pathlib.Path(folder, 'run')
    command = [sys.executable, '-m', 'experiments.train', f'--config={config}']
    start = time.perf_counter()
    with subprocess.Popen(
      [*command, f'--workdir={run}'],
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    ) as process:
      try:
        while not _finished_one(run / 'metrics.jsonl'):
          if process.poll() is not None:
            raise UserError(f'experiments.train ended early with {config}')
          if time.perf_counter() - start > limit:
            raise UserError(f'no step in {limit:g} s with {config}')
          time.sleep(_POLL)
        return time.perf_counter() - start
      finally:
        process.kill()


def _finished_one(records: pathlib.Path) -> bool:
  """Returns True if there is a record of step 1, after that of step 0."""
  return records.is_file() and records.read_bytes().count(b'\n') > 1


def main() -> None:
  """Measures as the flags specify."""
  options = flags.FLAGS
  cold, warm = [], []
  for _ in range(options.rounds):
    with tempfile.TemporaryDirectory() as cache:
      cold.append(first_step(options.config, cache, options.limit))
      warm.append(first_step(options.config, cache, options.limit))
  cold = measuring.summary(cold)
  saved = cold['median'] - measuring.summary(warm)['median']
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  fields, _ = measuring.report(
    'startup',
    warm,
    {'compile_seconds': measuring.rounded(saved)},
    peak=(peak, 'process'),
    config=options.config,
    cold_seconds=cold,
  )
  measuring.show(fields)


if __name__ == '__main__':
  flags.DEFINE_string(
    'config', 'experiments/configs/quickstart.py', 'Its path.'
  )
  flags.DEFINE_integer('rounds', 3, 'Cold and warm starts.', 1)
  flags.DEFINE_float('limit', 300.0, 'Seconds that a start may take.', 1.0)
  cli.run(main)
