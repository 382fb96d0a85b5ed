"""Growth of a long run: memory, files, disk, time per step.

    python -m benchmarks.soak --minutes=30

Trains the quickstart's model with checkpoints, evaluation and a reward in
worker processes, looks at the process every few seconds, and prints one JSON
line.  Each field is {'first', 'last', 'slope'}: the means of the first and the
last tenth of the looks, and the slope of a line through all, per 1,000 steps.
What happens before the first looks (compilation) does not count.

  steps: number of steps that were taken meanwhile.
  memory: resident bytes of the run, of its workers together in `workers`.
  descriptors: open files of the run.
  folder: bytes of the run's folder.
  cpu: seconds of processor time per step, of the run and its workers.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from experiments import cli
from jaxrl_llm.errors import UserError

# Seconds between looks.
_INTERVAL = 5.0
_FIRST_STEPS = 100  # not looked at
_CONFIG = """
from experiments.configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.rewards.correct.workers = 2
  config.warm_start.steps = 40
  config.steps = 10_000_000
  config.rollout.update(prompts=8, samples=4)
  config.evaluation.update(every=20, prompts=64, batch=64)
  config.checkpoints.every = 10
  return config
"""


def main() -> None:
  """Runs the soak and prints its report."""
  with tempfile.TemporaryDirectory() as folder:
    config, workdir = pathlib.Path(folder, 'soak.py'), pathlib.Path(folder, 'r')
    config.write_text(_CONFIG, encoding='utf-8')
    command = [sys.executable, '-m', 'experiments.train']
    flag = [f'--config={config}', f'--workdir={workdir}']
    with open(pathlib.Path(folder, 'log'), 'w+') as log:
      process = subprocess.Popen([*command, *flag], stdout=log, stderr=log)
      try:
        looks = _follow(process, workdir, flags.FLAGS.minutes * 60)
        process.send_signal(signal.SIGTERM)
        status = process.wait(600)
      finally:
        process.kill()
      if status != 128 + signal.SIGTERM:
        log.seek(0)
        raise UserError(f'the run ended with {status}:\n{log.read()[-500:]}')
  print(json.dumps({'benchmark': 'soak', **report(looks)}))


def _follow(process, workdir, seconds: float) -> list[dict]:
  """Looks at a run until so many seconds after its first steps."""
  looks, end = [], None
  while end is None or time.monotonic() < end:
    time.sleep(_INTERVAL)
    if process.poll() is not None:
      break
    step = _lines(workdir / 'metrics.jsonl')
    if step < _FIRST_STEPS:
      continue
    end = end or time.monotonic() + seconds
    looks.append({'step': step, **_look(process.pid, workdir)})
  return looks


def _look(pid: int, workdir) -> dict:
  """Returns what a run uses just now."""
  workers = _below(pid)
  return {
    'memory': _resident(pid),
    'workers': sum(map(_resident, workers)),
    'descriptors': len(list(pathlib.Path(f'/proc/{pid}/fd').iterdir())),
    'folder': _size(workdir),
    'cpu': {each: _seconds(each) for each in [pid, *workers]},
  }


def report(looks: list[dict]) -> dict:
  """Returns the fields of the line that is printed."""
  steps = np.array([look['step'] for look in looks], float)
  # A worker that has been replaced takes its time with it.
  spent = [
    sum(
      new['cpu'][each] - old['cpu'][each]
      for each in new['cpu'].keys() & old['cpu'].keys()
    )
    for old, new in itertools.pairwise(looks)
  ]
  cpu = np.array(spent) / np.maximum(np.diff(steps), 1)
  names = looks[0].keys() - {'cpu', 'step'}
  fields = {
    name: _trend(steps, np.array([look[name] for look in looks]))
    for name in sorted(names)
  }
  return {
    'steps': int(steps[-1] - steps[0]),
    **fields,
    'cpu': _trend(steps[1:], cpu),
  }


def _trend(steps, values) -> dict[str, float]:
  tenth = max(len(values) // 10, 1)
  slope = np.polyfit(steps, values, 1)[0] * 1000
  found = values[:tenth].mean(), values[-tenth:].mean(), slope
  names = 'first', 'last', 'slope'
  return {name: float(f'{x:.5g}') for name, x in zip(names, found, strict=True)}


def _below(pid: int) -> list[int]:
  """Returns the process's children and theirs."""
  try:
    listed = pathlib.Path(f'/proc/{pid}/task').glob('*/children')
    children = [int(x) for path in listed for x in path.read_text().split()]
  except OSError:
    return []
  return children + [x for child in children for x in _below(child)]


def _resident(pid: int) -> int:
  try:
    pages = pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1]
  except OSError:  # It has ended.
    return 0
  return int(pages) * 4096


def _seconds(pid: int) -> float:
  """Returns the processor time of a process and its ended children."""
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return 0.0
  return sum(map(int, text.rpartition(')')[2].split()[11:15])) / 100


def _size(folder) -> int:
  total = 0
  # Steps are saved and removed meanwhile.
  for parent, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(OSError):
        total += os.stat(os.path.join(parent, name)).st_size
  return total


def _lines(path) -> int:
  return path.read_bytes().count(b'\n') if path.exists() else 0


if __name__ == '__main__':
  flags.DEFINE_float('minutes', 30.0, 'How long to look at the run.', 0.2)
  cli.run(main)
