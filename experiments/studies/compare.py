"""Estimators side by side: one task, one model, equal generated tokens.

    python -m experiments.studies.compare --jobs=2 \\
      --config=experiments/configs/compare_arithmetic.py \\
      --workdir=runs/compare_arithmetic

First the common initial model is made, by the base configuration's supervised
warm start.  From it every method is trained with every seed until it has
generated the budget of tokens: each run is `experiments.train`, or the script
that the method names, in a process of its own.  --jobs=N processes run at a
time, each pinned to its own cores.  A method that generates nothing, `sft`,
ends after `steps` of its own.  The same command continues: complete runs are
skipped, interrupted ones resume, failed ones are tried again.  --only and
--seeds choose what is trained now; --report trains nothing.  --run=METHOD-SEED
trains one run in this process, for external schedulers.

  init/             the initial model's run
  runs/METHOD-SEED  a run's folder, as `experiments.train` leaves it
  logs/             the output of each run
  results.json      the numbers of table and figure; they outlive the runs
  table.md, figure.png
"""

import contextlib
import functools
import hashlib
import itertools
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from experiments import (
  build,
  cli,
  preference,
  processes,
  rest_em,
  run,
  sft,
  train,
)
from experiments.planning import memory
from experiments.studies import compare_report
from jaxrl_llm import runs
from jaxrl_llm.atomic import as_json, write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.signals import StopSignal

# The fields of a comparison's configuration.
_FIELDS = {
  'base': ConfigDict,  # of `experiments.train`, with the warm start
  'init': str,  # title of the initial model's row
  'tokens': int,  # the budget of one run
  'evaluations': int,  # between the start and the end of RL
  'seeds': tuple,
  'metrics': tuple,  # of dicts with _METRIC; the first is drawn
  'methods': tuple,  # of dicts with _METHOD and changes of other sections
}
_METRIC = {'name', 'title', 'scale', 'digits'}
_METHOD = {'label', 'title', 'algorithm'}
# By a method's 'script', which defaults to train.
_SCRIPTS = {
  'train': train.SCRIPT,
  'sft': sft.SCRIPT,
  'preference': preference.SCRIPT,
  'rest_em': rest_em.SCRIPT,
}
_INIT = 'init'


class Job(NamedTuple):
  """A run of a script.

  Attributes:
    name: METHOD-SEED, or 'init'.
    label: of its method; 'init' for the initial model.
    seed: of the run.
    config: of the script.
    folder: the run's folder.
    digest: of everything that its result depends on.
    script: its name.
  """

  name: str
  label: str
  seed: int
  config: ConfigDict
  folder: pathlib.Path
  digest: str
  script: str = 'train'

  @property
  def complete(self) -> bool:
    """True if the folder holds the whole run of this very configuration."""
    with contextlib.suppress(FileNotFoundError):
      finished = json.loads((self.folder / 'finished.json').read_text())
      return finished['digest'] == self.digest
    return False


def check(config: ConfigDict) -> None:
  """Raises UserError for a comparison that cannot begin."""
  for problem in _problems(config):
    raise UserError(problem)


def _problems(config: ConfigDict) -> Iterator[str]:
  for name in set(config) - set(_FIELDS):
    known = ', '.join(_FIELDS)
    yield f'nothing reads config.{name}\na comparison has {known}'
  for name, kind in _FIELDS.items():
    if not isinstance(value := config.get(name), kind):
      yield f'config.{name} is {value!r}\nit must be a {kind.__name__}'
  for name in ('tokens', 'evaluations'):
    if config[name] < 1:
      yield f'config.{name} is {config[name]}\nit must be above 0'
  for name, least in (('metrics', _METRIC), ('methods', _METHOD)):
    for entry in config[name]:
      for missing in sorted(least - set(entry)):
        yield f'config.{name}: {entry} has no {missing!r}'
  labels = [method['label'] for method in config.methods]
  titles = [method['title'] for method in config.methods]
  for name, values in (
    ('seeds', config.seeds),
    ('methods', labels),
    ('methods', titles),
  ):
    if not values or len(set(values)) < len(values):
      yield f'config.{name} is empty or repeats itself: {values}'
  for name, entry in zip(
    ['base', *labels], [config.base, *config.methods], strict=True
  ):
    every = entry.get('evaluation', {}).get('every_tokens')
    shared = {'tokens': entry.get('tokens'), 'evaluation.every_tokens': every}
    for field in (field for field, value in shared.items() if value):
      yield (
        f'{name} sets {field}, which a comparison sets itself\n'
        'config.tokens, config.seeds and config.evaluations say it for all'
      )
    if (script := entry.get('script', 'train')) not in _SCRIPTS:
      known = ', '.join(_SCRIPTS)
      yield f'{name}: there is no script {script!r}\nchoose one of {known}'
  if _INIT in labels or not all(label.isidentifier() for label in labels):
    yield f"labels of methods are names such as 'grpo', not {_INIT!r}: {labels}"


def jobs(config: ConfigDict, workdir: pathlib.Path) -> list[Job]:
  """Returns the initial model's run, if it needs one, then seed by seed.

  Raises:
    UserError: a method's changes do not fit the base; names it.
  """
  check(config)
  planned = []
  init = initial = config.base.copy_and_resolve_references()
  path = init.model.path
  if init.warm_start.steps:
    init.update(steps=0, tokens=0)
    path = str(workdir / _INIT / 'hf')
    digest = _digest(init)
    planned.append(Job(_INIT, _INIT, init.seed, init, workdir / _INIT, digest))
  elif not path:
    raise UserError(
      'config.base has neither model.path nor warm_start.steps: there is '
      'nothing to begin with'
    )
  for seed in config.seeds:
    for method in config.methods:
      label, script = method['label'], method.get('script', 'train')
      built = _run_config(config, method, seed, path)
      # The initial model's making matters, not its place.
      moved = built.copy_and_resolve_references()
      moved.model.path = ''
      name = f'{label}-{seed}'
      folder, digest = workdir / 'runs' / name, _digest(moved, initial)
      planned.append(Job(name, label, seed, built, folder, digest, script))
  return planned


def _run_config(
  config: ConfigDict, method: dict[str, Any], seed: int, path: str
) -> ConfigDict:
  """Returns the configuration of one run."""
  built = config.base.copy_and_resolve_references().unlock()
  built.algorithm = ConfigDict(method['algorithm'])
  built.lock()
  changes = {k: method[k] for k in set(method) - {*_METHOD, 'script'}}
  try:
    built.update(ConfigDict(changes))
  except (KeyError, TypeError) as error:
    reason = ' '.join(str(error.args[0]).split())
    raise UserError(
      f'the changes of method {method["label"]} do not fit config.base\n'
      f'{reason}'
    ) from error
  generates = _generates(method.get('script', 'train'), built)
  built.update(seed=seed, tokens=config.tokens if generates else 0)
  built.model.path = path
  built.warm_start.steps = 0
  built.evaluation.every_tokens = max(config.tokens // config.evaluations, 1)
  return built


def _generates(script: str, config: ConfigDict) -> bool:
  return script == 'train' or config.rounds.sampling > 0


def check_runs(everything: Sequence[Job]) -> None:
  """Raises UserError if a run could not begin; names its method."""
  for job in {job.label: job for job in everything}.values():
    try:
      _SCRIPTS[job.script].check(job.config)
    except UserError as error:
      raise UserError(f'{job.label}: {error}') from error


def _digest(*configs: ConfigDict) -> str:
  """Hashes configurations and the user's code that they name."""
  values = [as_json(config.to_dict(), 'configuration') for config in configs]
  files = [file for config in configs for file in build.code_files(config)]
  values += [pathlib.Path(file).read_text(encoding='utf-8') for file in files]
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def train_run(job: Job) -> int:
  """Trains one run in this process; returns the exit status.

  Adds `finished.json`, with the cost, to what the training leaves.

  Raises:
    UserError: the folder holds a run of other settings, code or initial model,
      or the run ended before its budget of tokens.
  """
  start = time.perf_counter()
  claim = job.folder / 'digest'
  if not claim.exists():
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(claim, job.digest)
  elif claim.read_text() != job.digest:
    raise UserError(
      f'{job.folder} holds a run of other settings, code or initial model\n'
      'remove it, or name another --workdir'
    )
  code = run.train(_SCRIPTS[job.script], job.config, job.folder, resume=True)
  if code:
    return code
  online = job.script == 'train'
  measure = memory.measure if online else memory.measure_offline
  cost = {
    'digest': job.digest,
    'seconds': time.perf_counter() - start,
    'cores': len(processes.own_cores()),
    'update_bytes': measure(job.config).peak,
  }
  spent = runs.read_metrics(job.folder / 'metrics.jsonl')[-1].get('num_tokens')
  if _generates(job.script, job.config) and spent < job.config.tokens:
    raise UserError(
      f'{job.name} has ended with {spent:,} of {job.config.tokens:,} tokens\n'
      'raise config.base.steps: the budget of tokens is to end a run'
    )
  write_atomically(job.folder / 'finished.json', json.dumps(cost) + '\n')
  return 0


def compare(
  config: ConfigDict,
  workdir: pathlib.Path,
  chosen: Sequence[Job],
  slots: Sequence[set[int]],
  command: Sequence[str],
) -> int:
  """Trains the chosen runs that are not complete, and reports all runs.

  Returns:
    The exit status: 0, 1 if a run failed, 128 + the signal that stopped it.
  """
  everything = jobs(config, workdir)
  (workdir / 'runs').mkdir(parents=True, exist_ok=True)
  names = {job.name for job in chosen}
  todo = [job for job in everything if job.name in names and not job.complete]
  is_init = lambda job: job.label == _INIT
  reported = list(itertools.filterfalse(is_init, everything))
  report = functools.partial(compare_report.write, config, workdir, reported)
  print(
    f'{len(todo)} runs to do; {len(slots)} at a time, on cores '
    f'{", ".join(map(str, slots))}',
    flush=True,
  )
  failures, done = {}, 0
  with StopSignal() as stop:
    # The initial model has to be there before any other run begins.
    for phase, places in (
      (filter(is_init, todo), [set().union(*slots)]),
      (itertools.filterfalse(is_init, todo), slots),
    ):
      if failures or stop.requested:
        break
      for job, code, seconds in processes.launch(
        phase, workdir, places, command, stop
      ):
        done += 1
        if code and not stop.requested:
          failures[job.name] = processes.why(workdir, job, code)
        word = failures.get(job.name, 'stopped' if code else 'done')
        print(
          f'[{done}/{len(todo)}] {job.name}: {word}, {seconds:.0f} s',
          flush=True,
        )
        report(failures)
  if _INIT in failures:
    raise UserError(
      f'the initial model could not be made: {failures[_INIT]}\n'
      f'see {workdir / "logs" / "init.log"}'
    )
  print(report(failures))
  if stop.requested:
    return 128 + signal.Signals[stop.name]
  return 1 if failures else 0


def choose(
  everything: Sequence[Job], only: Sequence[str], seeds: Sequence[str]
) -> list[Job]:
  """Returns the jobs of --only and --seeds, and the initial model's.

  Raises:
    UserError: the configuration does not have a label or a seed.
  """
  rest = [job for job in everything if job.label != _INIT]
  for flag, field, given in (('only', 'label', only), ('seeds', 'seed', seeds)):
    known = {str(getattr(job, field)) for job in rest}
    for value in sorted(set(given) - known):
      raise UserError(
        f'--{flag} has {value!r}\nthe configuration has '
        f'{", ".join(sorted(known))}'
      )
    if given:
      rest = [job for job in rest if str(getattr(job, field)) in given]
  return [job for job in everything if job.label == _INIT or job in rest]


def main() -> int:
  """Reads the flags and compares."""
  values = flags.FLAGS
  config = cli.config()
  name = pathlib.Path(values['config'].config_filename).stem
  workdir = pathlib.Path(values.workdir or pathlib.Path('runs') / name)
  everything = jobs(config, workdir)
  if values.run is not None:
    for job in everything:
      if job.name == values.run:
        return train_run(job)
    raise UserError(
      f'--run={values.run}: no such run\nwrite METHOD-SEED, such as '
      f'{everything[-1].name}'
    )
  check_runs(everything)
  chosen = choose(everything, values.only, values.seeds)
  chosen = [] if values.report else chosen
  command = [sys.executable, '-m', 'experiments.studies.compare', *sys.argv[1:]]
  return compare(config, workdir, chosen, processes.slots(values.jobs), command)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of the comparison.')
  flags.DEFINE_integer('jobs', 1, 'Runs at a time.')
  flags.DEFINE_list('only', [], 'Labels of the methods to train now.')
  flags.DEFINE_list('seeds', [], 'Seeds to train now.')
  flags.DEFINE_bool('report', False, 'Only make table and figure again.')
  flags.DEFINE_string('run', None, 'Train one run in this process.')
  cli.define_config_flag()
  cli.run(main)
