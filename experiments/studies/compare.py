"""Estimators side by side: one task, one model, equal generated tokens.

    python -m experiments.studies.compare --jobs=2 \\
      --config=experiments/configs/compare_arithmetic.py \\
      --workdir=runs/compare_arithmetic

First the common initial model is made, by the base configuration's supervised
warm start.  From it every method is trained with every seed until it has
generated the budget of tokens: each run is `experiments.train`, or the script
of the method's algorithm, in a process of its own.  --jobs=N processes run at a
time, each pinned to its own cores.  A method that generates nothing, `sft`,
ends after `steps` of its own.  The same command continues: complete runs are
skipped, interrupted ones resume, failed ones are tried again.  --only and
--seeds choose what is trained now; --report trains nothing.  --results=FILE
extends results that are kept elsewhere: runs that it holds are not trained
again.  --run=METHOD-SEED trains one run in this process, for external
schedulers.

  init/             the initial model's run
  runs/METHOD-SEED  a run's folder, as `experiments.train` leaves it
  logs/             the output of each run's last attempt
  results.jsonl     a line of numbers per run; they outlive the runs
  table.md, figure.png
"""

import hashlib
import itertools
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from experiments import build, cli, replay, run, train
from experiments.planning import memory
from experiments.studies import compare_report, parallel
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
_METRIC = ('name', 'title', 'scale', 'digits')
_METHOD = ('label', 'title', 'algorithm')
_INIT = 'init'


class Job(NamedTuple):
  """A run of a script.

  Attributes:
    label: of its method; 'init' for the initial model.
    seed: of the run.
    config: of the script.
    folder: the run's folder, called METHOD-SEED or 'init'.
    digest: of everything that its result depends on.
  """

  label: str
  seed: int
  config: ConfigDict
  folder: pathlib.Path
  digest: str

  @property
  def name(self) -> str:
    return self.folder.name

  @property
  def complete(self) -> bool:
    """True if the folder holds the whole run of this very configuration."""
    path = self.folder / 'finished.json'
    cost = json.loads(path.read_text()) if path.exists() else {}
    return cost.get('digest') == self.digest


def _problems(config: ConfigDict) -> Iterator[str]:
  """Yields reasons why a comparison cannot begin."""
  for name in set(config) - set(_FIELDS):
    yield f'nothing reads config.{name}\na comparison has {", ".join(_FIELDS)}'
  for name, kind in _FIELDS.items():
    if not isinstance(value := config.get(name), kind):
      yield f'config.{name} is {value!r}\nit must be a {kind.__name__}'
    if kind is int and value < 1:
      yield f'config.{name} is {value}\nit must be above 0'
  for name, least in (('metrics', _METRIC), ('methods', _METHOD)):
    for entry in config[name]:
      if missing := sorted(set(least) - set(entry)):
        yield f'config.{name}: {entry} has no {missing[0]!r}'
  unique = {'seeds': config.seeds} | {
    f'methods, {key}': [method[key] for method in config.methods]
    for key in ('label', 'title')
  }
  for name, values in unique.items():
    if not values or len(set(values)) < len(values):
      yield f'config.{name} is empty or repeats itself: {values}'
  base = config.base.to_dict() | {'label': 'base'}
  for entry in (base, *config.methods):
    label = entry['label']
    if label == _INIT or not label.isidentifier():
      yield f"a method's label is a name such as 'grpo', not {label!r}"
    every = entry.get('evaluation', {}).get('every_tokens')
    if entry.get('tokens') or every:
      yield (
        f'{label} sets tokens or evaluation.every_tokens\n'
        'config.tokens and config.evaluations set them for all'
      )


def jobs(config: ConfigDict, workdir: pathlib.Path) -> list[Job]:
  """Returns the initial model's run, if it needs one, then seed by seed.

  Raises:
    UserError: the comparison cannot begin, or a method's changes do not fit the
      base; names it.
  """
  for problem in _problems(config):
    raise UserError(problem)
  planned = []
  init = config.base.copy_and_resolve_references()
  path = init.model.path
  if init.warm_start.steps:
    init.update(steps=0, tokens=0)
    folder = workdir / _INIT
    path = str(folder / 'hf')
    planned.append(Job(_INIT, init.seed, init, folder, _digest(init)))
  elif not path:
    raise UserError(
      'config.base has neither model.path nor warm_start.steps: there is '
      'nothing to begin with'
    )
  for seed, method in itertools.product(config.seeds, config.methods):
    changes = dict(method)
    label, _, algorithm = (changes.pop(key) for key in _METHOD)
    built = config.base.copy_and_resolve_references().unlock()
    built.algorithm = ConfigDict(algorithm)
    built.lock()
    try:
      built.update(ConfigDict(changes))
    except (KeyError, TypeError) as error:
      raise UserError(
        f'the changes of method {label} do not fit config.base\n'
        f'{" ".join(str(error.args[0]).split())}'
      ) from error
    online = replay.script(built) is train.SCRIPT
    generates = online or built.rounds.sampling > 0
    built.update(seed=seed, tokens=config.tokens if generates else 0)
    built.evaluation.every_tokens = max(config.tokens // config.evaluations, 1)
    built.warm_start.steps = 0
    # The digest depends on the initial model's settings, not on its path.
    built.model.path = ''
    digest = _digest(built, init)
    built.model.path = path
    folder = workdir / 'runs' / f'{label}-{seed}'
    planned.append(Job(label, seed, built, folder, digest))
  return planned


def check_runs(everything: Sequence[Job]) -> None:
  """Raises UserError if a run could not begin; names its method."""
  for job in {job.label: job for job in everything}.values():
    try:
      replay.script(job.config).check(job.config)
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
  script = replay.script(job.config)
  if code := run.train(script, job.config, job.folder, resume=True):
    return code
  online = script is train.SCRIPT
  measure = memory.measure if online else memory.measure_offline
  cost = {
    'digest': job.digest,
    'seconds': time.perf_counter() - start,
    'cores': len(parallel.own_cores()),
    'update_bytes': measure(job.config).peak,
  }
  spent = runs.read_metrics(job.folder / 'metrics.jsonl')[-1]['num_tokens']
  if spent < job.config.tokens:
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
  file: pathlib.Path,
) -> int:
  """Trains the chosen runs that have no result, and reports all runs.

  Returns:
    The exit status: 0, 1 if a run failed, 128 + the signal that stopped it.
  """
  known = compare_report.read_results(file)
  todo = [job for job in chosen if not job.complete and job.digest not in known]
  if all(job.label == _INIT for job in todo):
    todo = []
  print(
    f'{len(todo)} runs to do; {len(slots)} at a time, on cores '
    f'{", ".join(map(str, slots))}',
    flush=True,
  )
  reported = [job for job in jobs(config, workdir) if job.label != _INIT]
  failures = {}
  first = [job for job in todo if job.label == _INIT]
  rest, every_core = todo[len(first) :], set().union(*slots)
  with StopSignal() as stop:
    # The initial model has to be there before any other run begins.
    ended = itertools.chain(
      parallel.launch(first, workdir, [every_core], command, stop),
      parallel.launch(rest, workdir, slots, command, stop),
    )
    for number, (job, code, seconds) in enumerate(ended, 1):
      word = 'stopped' if code else 'done'
      if code and not stop.requested:
        word = failures[job.name] = parallel.failure(workdir, job, code)
      print(
        f'[{number}/{len(todo)}] {job.name}: {word}, {seconds:.0f} s',
        flush=True,
      )
      if _INIT in failures:  # Nothing can begin without it.
        return 1
      compare_report.write(config, workdir, reported, failures, file)
  print(compare_report.write(config, workdir, reported, failures, file))
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
  chosen = [job for job in everything if job.label != _INIT]
  for field, values in (('label', only), ('seed', seeds)):
    known = {str(getattr(job, field)): None for job in chosen}
    if missing := sorted(set(values) - set(known)):
      raise UserError(
        f'no run has the {field} {missing[0]!r}\n'
        f'the configuration has {", ".join(known)}'
      )
    chosen = [j for j in chosen if str(getattr(j, field)) in (values or known)]
  return [job for job in everything if job.label == _INIT or job in chosen]


def main() -> int:
  """Reads the flags and compares."""
  values, config = flags.FLAGS, cli.config()
  name = pathlib.Path('runs') / cli.config_name()
  workdir = pathlib.Path(values.workdir or name)
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
  slots = parallel.slots(values.jobs)
  command = [sys.executable, '-m', 'experiments.studies.compare', *sys.argv[1:]]
  file = pathlib.Path(values.results or workdir / 'results.jsonl')
  return compare(config, workdir, chosen, slots, command, file)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of the comparison.')
  flags.DEFINE_integer('jobs', 1, 'Runs at a time.')
  flags.DEFINE_list('only', [], 'Labels of the methods to train now.')
  flags.DEFINE_list('seeds', [], 'Seeds to train now.')
  flags.DEFINE_string('results', None, 'File of results to extend.')
  flags.DEFINE_bool('report', False, 'Only make table and figure again.')
  flags.DEFINE_string('run', None, 'Train one run in this process.')
  cli.define_config_flag()
  cli.run(main)
