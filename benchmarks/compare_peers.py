"""Compares this library with others on the same job, measured in turns.

    python -m benchmarks.compare_peers --environments=runs/peers

Generation is compared with transformers and Tunix, a GRPO step with TRL and
Tunix.  Every system runs in its own process, one at a time, in turns, with the
same environment variables; it warms up first and reports the median of its
rounds.  A ratio is that of two medians of one turn, so that a temporarily
slower machine affects all alike.  A run is repeated if other processes, or
other guests of the host, took more of the cores than `--disturbance`.

Prints a table and writes everything as JSON to `--output`.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import flags

from benchmarks import job, measuring
from benchmarks.peers import environments
from experiments import cli
from jaxrl_llm.errors import UserError

OURS = 'jaxrl_llm'
# Huge pages for fresh large buffers, which every system makes.
_TUNABLES = 'glibc.malloc.hugetlb=1'
_ROOT = pathlib.Path(__file__).parents[1]


class Job(NamedTuple):
  """A job and the systems that do it.

  Attributes:
    module: this library's module in `benchmarks`.
    peers: system → (environment, module of `benchmarks.peers`).
    prompts, samples, new_tokens: P, G, T.
    settings: vocabulary → flags of `module` that are fastest on two cores.
  """

  module: str
  peers: dict[str, tuple[str, str]]
  prompts: int
  samples: int
  new_tokens: int
  settings: dict[int, tuple[str, ...]]


JOBS = {
  'generate': Job(
    'generate',
    {
      'transformers': ('transformers', 'transformers_generate'),
      'tunix': ('tunix', 'tunix_generate'),
    },
    prompts=32,
    samples=1,
    new_tokens=128,
    settings={512: ('--devices=2',), 32_000: ('--devices=2',)},
  ),
  'grpo_step': Job(
    'grpo_step',
    {'trl': ('trl', 'trl_grpo'), 'tunix': ('tunix', 'tunix_grpo')},
    prompts=8,
    samples=4,
    new_tokens=64,
    settings={
      512: ('--devices=2', '--micro_prompts=0', '--chunk=1024', '--unroll=4'),
      32_000: ('--micro_prompts=2', '--chunk=512', '--unroll=4'),
    },
  ),
}
PEERS = sorted({peer for one in JOBS.values() for peer in one.peers})
_PROMPT_TOKENS = 64
_LEARNING_RATE = 1e-5


class Run(NamedTuple):
  """One process of one system.

  Attributes:
    seconds: the median of its rounds.
    peak_bytes: its largest resident set.
    versions: those of its packages.
    disturbance: share of the cores that others took meanwhile.
    roofline: as this library's benchmarks print it.
  """

  seconds: float
  peak_bytes: int
  versions: dict[str, str]
  disturbance: float
  roofline: dict[str, Any]


def compare(job_name: str, vocabulary: int, options) -> dict[str, Any]:
  """Measures all systems that do a job, in turns.

  Args:
    job_name: one of `JOBS`.
    vocabulary: V.
    options: flags.

  Returns:
    The result of `summary`, with the job and the number of discarded runs.
  """
  chosen, shape = JOBS[job_name], job.shape()._replace(vocabulary=vocabulary)
  turns, thrown = [], 0
  with tempfile.TemporaryDirectory() as temporary:
    work = pathlib.Path(temporary, 'work.json')
    work.write_text(json.dumps(_work(chosen, shape, options)), encoding='utf-8')
    for _ in range(options.turns):
      turn = {}
      for system in (OURS, *(p for p in chosen.peers if p in options.peers)):
        command = _command(system, chosen, shape, work, options)
        turn[system], again = _undisturbed(command, options)
        thrown += again
        print(job_name, vocabulary, system, turn[system], file=sys.stderr)
      turns.append(turn)
  return {
    'job': job_name,
    'vocabulary': vocabulary,
    'thrown_away': thrown,
    **summary(turns),
  }


def summary(turns: list[dict[str, Run]]) -> dict[str, Any]:
  """Returns medians over the turns, and ratios to this library's.

  Args:
    turns: the run of every system, by turn.

  Returns:
    'systems': system → seconds, peak_bytes, disturbance (the greatest),
    versions; for this library the rooflines of its runs; for a peer `ratio`,
    its time in units of this library's: median, least and most of the turns.
  """
  systems = {}
  for system in turns[0]:
    runs = [turn[system] for turn in turns]
    systems[system] = {
      'seconds': measuring.summary([run.seconds for run in runs]),
      'peak_bytes': max(run.peak_bytes for run in runs),
      'disturbance': max(run.disturbance for run in runs),
      'versions': runs[0].versions,
    }
    if system == OURS:
      systems[system]['roofline'] = [run.roofline for run in runs]
    else:
      ratios = [turn[system].seconds / turn[OURS].seconds for turn in turns]
      systems[system]['ratio'] = {
        'median': measuring.rounded(statistics.median(ratios)),
        'least': measuring.rounded(min(ratios)),
        'most': measuring.rounded(max(ratios)),
      }
  return {'systems': systems}


def table(results: list[dict[str, Any]]) -> str:
  """Formats a Markdown table with a row for each system and job."""
  lines = [
    '| job | V | system | seconds (quartiles) | peak, GB | times ours |',
    '|---|---|---|---|---|---|',
  ]
  for result in results:
    for system, fields in result['systems'].items():
      seconds = fields['seconds']
      low, high = seconds['quartiles']
      ratio = fields.get('ratio')
      shown = '1'
      if ratio:
        shown = f'{ratio["median"]} ({ratio["least"]}–{ratio["most"]})'
      cells = [
        result['job'],
        f'{result["vocabulary"]:,}',
        system,
        f'{seconds["median"]} ({low}–{high})',
        f'{fields["peak_bytes"] / 1e9:.2f}',
        shown,
      ]
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _work(chosen: Job, shape: job.Shape, options) -> dict[str, Any]:
  """Returns the fields of `peers.work.Work`."""
  return {
    'folder': str(job.folder(shape, options.models)),
    'texts': job.prompts(512, _PROMPT_TOKENS),
    'prompts': chosen.prompts,
    'samples': chosen.samples,
    'prompt_tokens': _PROMPT_TOKENS,
    'new_tokens': chosen.new_tokens,
    'end_id': job.end_id(shape),
    'learning_rate': _LEARNING_RATE,
    'warmup': 2,
    'rounds': options.rounds,
  }


def _command(
  system: str, chosen: Job, shape: job.Shape, work: pathlib.Path, options
) -> list[str]:
  if system == OURS:
    return [
      sys.executable,
      '-m',
      f'benchmarks.{chosen.module}',
      *(f'--{name}={value}' for name, value in shape._asdict().items()),
      f'--models={options.models}',
      f'--rounds={options.rounds}',
      *chosen.settings.get(shape.vocabulary, ()),
    ]
  environment, module = chosen.peers[system]
  python = environments.python(environment, pathlib.Path(options.environments))
  return [str(python), '-m', f'benchmarks.peers.{module}', str(work)]


def _undisturbed(command: list[str], options) -> tuple[Run, int]:
  """Returns a run, and the number of runs discarded before it.

  Raises:
    UserError: the machine does not become quiet, or the command fails.
  """
  for thrown in range(options.tries):
    with _alone(options.lock):
      run = _run(command)
    if run.disturbance <= options.disturbance:
      return run, thrown
    print(f'disturbed: {run.disturbance:.0%}, again', file=sys.stderr)
  raise UserError(
    f'others took {run.disturbance:.0%} of the cores in {options.tries} runs\n'
    'wait until the machine is quiet, or raise --disturbance'
  )


@contextlib.contextmanager
def _alone(lock: str) -> Iterator[None]:
  """Holds the lock file, if there is one."""
  with contextlib.ExitStack() as files:
    if lock:
      file = files.enter_context(open(lock, 'a', encoding='utf-8'))
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _run(command: list[str]) -> Run:
  """Starts a process and waits for it.

  Raises:
    UserError: the process fails.
  """
  path = os.pathsep.join(
    filter(None, (str(_ROOT), os.environ.get('PYTHONPATH')))
  )
  variables = {
    'PYTHONPATH': path,
    'GLIBC_TUNABLES': _TUNABLES,
    'HF_HUB_OFFLINE': '1',
  }
  before = _busy_seconds(), _own_seconds(), time.perf_counter()
  done = subprocess.run(
    command, env=os.environ | variables, capture_output=True, text=True
  )
  after = _busy_seconds(), _own_seconds(), time.perf_counter()
  busy, used, passed = (b - a for a, b in zip(before, after, strict=True))
  if done.returncode:
    print(done.stderr, file=sys.stderr)
    raise UserError(f'the command failed: {" ".join(command)}')
  answer = json.loads(done.stdout.strip().splitlines()[-1])
  return Run(
    answer['seconds']['median'],
    answer['peak_bytes'],
    answer['versions'],
    max(busy - used, 0.0) / (passed * os.cpu_count()),
    answer.get('roofline', {}),
  )


def _busy_seconds() -> float:
  """Returns seconds of work of all cores, plus those that the host took."""
  with open('/proc/stat', encoding='utf-8') as file:
    ticks = [int(field) for field in file.readline().split()[1:9]]
  user, nice, system, _, _, irq, soft_irq, stolen = ticks
  total = user + nice + system + irq + soft_irq + stolen
  return total / os.sysconf('SC_CLK_TCK')


def _own_seconds() -> float:
  """Returns seconds of work of this process and its finished children."""
  kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
  used = [resource.getrusage(kind) for kind in kinds]
  return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
  """Measures as the flags specify."""
  options = flags.FLAGS
  for flag, taken, known in (
    ('jobs', options.jobs, list(JOBS)),
    ('peers', options.peers, PEERS),
  ):
    unknown = sorted(set(taken) - set(known))
    if unknown:
      raise UserError(f'--{flag}: no {unknown[0]!r}\nchoose from {known}')
  results = [
    compare(name, int(vocabulary), options)
    for name in options.jobs
    for vocabulary in options.vocabularies
  ]
  print(table(results))
  report = {'machine': measuring.machine(), 'results': results}
  path = pathlib.Path(options.output)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
  job.define_flags()
  flags.DEFINE_string('environments', 'runs/peers', 'Folder of environments.')
  flags.DEFINE_list('jobs', list(JOBS), 'Jobs to measure.')
  flags.DEFINE_list('peers', PEERS, 'Peers to measure.')
  flags.DEFINE_list('vocabularies', ['512', '32000'], 'Vocabulary sizes.')
  flags.DEFINE_integer('turns', 3, 'Processes of each system.', 1)
  flags.DEFINE_integer('rounds', 5, 'Timed rounds in each process.', 1)
  flags.DEFINE_float(
    'disturbance', 0.1, "Others' greatest share of cores.", 0.0
  )
  flags.DEFINE_integer('tries', 5, 'Attempts at a disturbed run.', 1)
  flags.DEFINE_string('lock', '', 'A file to hold while a process runs.')
  flags.DEFINE_string('output', 'runs/benchmarks/peers.json', 'JSON file.')
  cli.run(main)
