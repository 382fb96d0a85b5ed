"""Runs tiny configurations on two commits and compares what they write.

    python -m benchmarks.freeze OLD [NEW] [--only=grpo,trepo] [--keep=FOLDER]

OLD and NEW are commits, each checked out in a `git worktree`; without NEW the
other side is a copy of the working tree.  Every run is a process on CPUs with
its side's code, and both sides run at the same time.  grpo runs once more, is
killed and resumed.  `metrics.jsonl`, `samples.jsonl` and the exported weights
must be equal, bit for bit.  The status is 1 if anything differs.

XLA compiles with few optimizations, which saves most of the time: differences
come from the program, not from its compilation.  --optimized compiles as users
do and takes three times as long.

A side supplies `experiments.configs.base.get_config` and the command line of
`experiments`, nothing else, so it may be older or newer than this file.  Fields
that its configuration lacks are left out there, and reported.
"""

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks import differences, freeze_config
from benchmarks.freeze_config import CONFIGURATIONS, MARK

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = 'experiments', 'jaxrl_llm'
KILLED = 'grpo_killed'
_KILL_AFTER = 11  # records: in RL, between two checkpoints
_QUICK = dict(  # as the tests compile
  JAX_DISABLE_MOST_OPTIMIZATIONS='1',
  XLA_FLAGS='--xla_cpu_use_fusion_emitters=false'
  ' --xla_cpu_parallel_codegen_split_count=1',
)


class RunError(Exception):
  """A run that did not end as it should."""


def run(name: str, code, folder, variables) -> pathlib.Path:
  """Runs one configuration to its end, and returns its run folder.

  Args:
    name: one of `CONFIGURATIONS`, or `KILLED`.
    code: the packages' folder.
    folder: holds the side's run folders; configurations are beside it.
    variables: environment variables, added to this process's.

  Raises:
    RunError: it fails, or is not resumed.
  """
  config, path = name.removesuffix('_killed'), folder / name
  script = f'experiments.{CONFIGURATIONS[config][0]}'
  files = f'--config={folder.parent / config}.py', f'--workdir={path}'
  with open(f'{path}.log', 'w', encoding='utf-8') as log:
    start = lambda *flags: subprocess.Popen(
      [sys.executable, '-m', script, *files, *flags],
      cwd=code,
      env=os.environ | variables,
      stdout=log,
      stderr=log,
    )
    if name == KILLED:
      with start() as process:
        while process.poll() is None:
          if len(_lines(path / 'metrics.jsonl')) >= _KILL_AFTER:
            process.kill()
          time.sleep(0.002)
      if process.returncode != -signal.SIGKILL:
        raise RunError(f'{name} ended before it was killed')
    clock = _lines(path / 'timings.jsonl')[:1]
    with start(*['--resume'] * (name == KILLED)) as process:
      status = process.wait()
  if status:
    last = ' | '.join(line[:200] for line in _lines(f'{path}.log')[-3:])
    raise RunError(f'{name} ended with status {status}: {last}')
  # A repeated step takes another time.
  if _lines(path / 'timings.jsonl')[: len(clock)] != clock:
    raise RunError(f'{name} was not resumed, but started again')
  return path


def _lines(path) -> list[str]:
  path = pathlib.Path(path)
  return path.read_text(encoding='utf-8').splitlines() if path.exists() else []


@contextlib.contextmanager
def checkout(revision: str | None, folder: pathlib.Path):
  """Puts a commit, or for None the working tree as it is, into a new folder."""
  if revision is None:
    ignore = shutil.ignore_patterns('__pycache__')
    for package in PACKAGES:
      shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    yield
    return
  git = ['git', '-C', str(ROOT), 'worktree']
  command = [*git, 'add', '--quiet', '--detach', str(folder), revision]
  subprocess.run(command, check=True)
  try:
    yield
  finally:
    subprocess.run([*git, 'remove', '--force', str(folder)], check=True)


def freeze(revisions, names, folder, quick=True, **options) -> bool:
  """Runs both sides, prints the differences; returns whether there are none.

  Args:
    revisions: the old and the new commit; None for the working tree.
    names: names of configurations.
    folder: an empty folder for the run folders.
    quick: compile with few optimizations.
    **options: as in `differences.compare`.
  """
  for name in names:
    shutil.copy(freeze_config.__file__, folder / f'{name}.py')
  plan = [x for n in names for x in ([n, KILLED] if n == 'grpo' else [n])]
  equal = True
  with contextlib.ExitStack() as stack:
    made = tempfile.TemporaryDirectory(prefix='freeze_')
    temporary = pathlib.Path(stack.enter_context(made))
    jobs = []
    for side, revision in zip(differences.SIDES, revisions, strict=True):
      code = temporary / side
      stack.enter_context(checkout(revision, code))
      (folder / side).mkdir()
      pool = concurrent.futures.ThreadPoolExecutor(1)
      stack.callback(pool.shutdown, cancel_futures=True)
      variables = dict(
        JAX_COMPILATION_CACHE_DIR=str(temporary / f'{side}_programs'),
        JAX_PLATFORMS='cpu',
        PYTHONPATH=str(code),
        **_QUICK if quick else {},
      )
      arguments = code, folder / side, variables
      jobs.append([pool.submit(run, name, *arguments) for name in plan])
    for name, *pair in zip(plan, *jobs, strict=True):
      concurrent.futures.wait(pair)
      lines, notes = report(name, folder, pair, options)
      equal &= not lines
      print(f'{name}: {"differs" if lines else "identical"}')
      print(
        ''.join(f'  {line}\n' for line in lines + notes), end='', flush=True
      )
  return equal


def report(name: str, folder, pair, options) -> tuple[list[str], list[str]]:
  """Returns lines about differences and failures, and about missing fields."""
  lines, notes = [], []
  for side, job in zip(differences.SIDES, pair, strict=True):
    if job.exception():
      lines.append(f'{side}: {job.exception()}')
    elif name == KILLED:
      whole, sides = folder / side / 'grpo', ('grpo', KILLED)
      changes = differences.compare(whole, job.result(), sides=sides)
      lines += [f'{side}, killed or not: {line}' for line in changes]
    log = _lines(folder / side / f'{name}.log')
    marked = {line.removeprefix(MARK) for line in log if line.startswith(MARK)}
    notes += [f'{side}: {line}' for line in sorted(marked)]
  if not any(job.exception() for job in pair):
    folders = [job.result() for job in pair]
    lines += differences.compare(*folders, **options)
  return lines, notes


def commit(revision: str) -> str:
  """Returns the hash of a commit."""
  name = f'{revision}^{{commit}}'
  command = ['git', '-C', str(ROOT), 'rev-parse', '--verify', '--quiet', name]
  result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  if result.returncode:
    raise argparse.ArgumentTypeError(f'{revision} is not a commit')
  return result.stdout.strip()


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  split = lambda text: text.split(',')
  add('old', type=commit, help='a commit')
  add('new', type=commit, nargs='?', help='a commit')
  add('--only', type=split, default=list(CONFIGURATIONS), help='configurations')
  add('--keep', type=pathlib.Path, help='a new folder for the run folders')
  add('--tolerance', type=float, default=0.0, help='relative, of floats')
  add('--allow', type=split, default=[], help='metrics:FIELD,samples:FIELD')
  add('--optimized', action='store_true', help='compile as users do')
  values = parser.parse_args()
  if unknown := [x for x in values.only if x not in CONFIGURATIONS]:
    parser.error(f'--only: {unknown} are not among {list(CONFIGURATIONS)}')
  if values.keep and values.keep.exists():
    parser.error(f'--keep: {values.keep} exists')
  # Worktrees are removed then, too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  start = time.monotonic()
  with tempfile.TemporaryDirectory(prefix='freeze_runs_') as temporary:
    folder = (values.keep or pathlib.Path(temporary, 'runs')).absolute()
    folder.mkdir(parents=True)
    equal = freeze(
      (values.old, values.new),
      values.only,
      folder,
      quick=not values.optimized,
      tolerance=values.tolerance,
      allowed=values.allow,
    )
  print(f'{time.monotonic() - start:.0f} s')
  return 0 if equal else 1


if __name__ == '__main__':
  sys.exit(main())
