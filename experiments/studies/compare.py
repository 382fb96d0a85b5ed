"""Estimators side by side: one task, one model, equal generated tokens.

    python -m experiments.studies.compare --jobs=2 \\
      --config=experiments/configs/compare_arithmetic.py \\
      --workdir=runs/compare_arithmetic

First the common initial model is made, by the base configuration's supervised
warm start.  From it every method is trained with every seed until it has
generated the budget of tokens: each run is `experiments.train`, or the script
that the method names, in a process of its own, and with --jobs=N so many at a
time, each pinned to its own cores.  A method that generates nothing, `sft`,
ends after `steps` of its own.  The same command continues: what is complete is
skipped, what was cut short resumes, what failed is tried again.  --only and
--seeds choose what is trained now; --report trains nothing.  --run=METHOD-SEED
trains that one run in this process, for schedulers that bring their own.

  init/             the initial model's run
  runs/METHOD-SEED  a run's folder, as `experiments.train` leaves it
  logs/             what each run said
  results.json      what table and figure are made of; it outlives the runs
  table.md, figure.png
"""

import contextlib
import hashlib
import json
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Sequence
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

# What a comparison's configuration holds, and what a method brings to it.
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
# What a method's 'script' may be; without one it is `experiments.train`.
_SCRIPTS = {
  'train': train.SCRIPT,
  'sft': sft.SCRIPT,
  'preference': preference.SCRIPT,
  'rest_em': rest_em.SCRIPT,
}
_INIT = 'init'
# Set by the comparison: section and field.
_SET = (('tokens', None), ('evaluation', 'every_tokens'))


class Job(NamedTuple):
  """A run of `experiments.train` or of another script.

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
  def generates(self) -> bool:
    """Whether it samples responses, and so ends by tokens."""
    return _generates(self.script, self.config)

  @property
  def complete(self) -> bool:
    """Whether the folder holds the whole run of this very configuration."""
    with contextlib.suppress(FileNotFoundError):
      finished = json.loads((self.folder / 'finished.json').read_text())
      return finished['digest'] == self.digest
    return False


def check(config: ConfigDict) -> None:
  """Raises UserError for a comparison that cannot be begun."""
  for name in config:
    if name not in _FIELDS:
      raise UserError(
        f'nothing reads config.{name}\na comparison has {", ".join(_FIELDS)}'
      )
  for name, kind in _FIELDS.items():
    if not isinstance(config.get(name), kind):
      raise UserError(
        f'config.{name} is {config.get(name)!r}\nit must be a {kind.__name__}'
      )
  for name in ('tokens', 'evaluations'):
    if config[name] < 1:
      raise UserError(f'config.{name} is {config[name]}\nit must be above 0')
  for name, least in (('metrics', _METRIC), ('methods', _METHOD)):
    for entry in config[name]:
      if missing := sorted(least - set(entry)):
        raise UserError(f'config.{name}: {entry} has no {missing[0]!r}')
  labels = [method['label'] for method in config.methods]
  titles = [method['title'] for method in config.methods]
  for name, values in (
    ('seeds', config.seeds),
    ('methods', labels),
    ('methods', titles),
  ):
    if not values or len(set(values)) < len(values):
      raise UserError(f'config.{name} is empty or repeats itself: {values}')
  for name, entry in (
    ('base', config.base),
    *zip(labels, config.methods, strict=True),
  ):
    if given := _given(entry):
      raise UserError(
        f'{name} sets {given}, which a comparison sets itself\n'
        'config.tokens, config.seeds and config.evaluations say it for all'
      )
  for method in config.methods:
    script = method.get('script', 'train')
    if script not in _SCRIPTS:
      raise UserError(
        f'{method["label"]}: there is no script {script!r}\n'
        f'choose one of {", ".join(_SCRIPTS)}'
      )
  if _INIT in labels or not all(label.isidentifier() for label in labels):
    raise UserError(
      f"labels of methods are names such as 'grpo', not {_INIT!r}: {labels}"
    )


def _given(entry) -> str | None:
  """What a method's changes, or the base, set that they may not."""
  for section, field in _SET:
    found = entry.get(section)
    if field is not None:
      found = (found or {}).get(field)
    if found:
      return section if field is None else f'{section}.{field}'
  return None


def jobs(config: ConfigDict, workdir: pathlib.Path) -> list[Job]:
  """The initial model's run, if there is to be one, then seed by seed.

  Raises:
    UserError: a method's changes do not fit the base; names it.
  """
  check(config)
  found = []
  init = initial = config.base.copy_and_resolve_references()
  path = init.model.path
  if init.warm_start.steps:
    init.update(steps=0, tokens=0)
    path = str(workdir / _INIT / 'hf')
    digest = _digest(init)
    found.append(Job(_INIT, _INIT, init.seed, init, workdir / _INIT, digest))
  elif not path:
    raise UserError(
      'config.base has neither model.path nor warm_start.steps: there is '
      'nothing to begin with'
    )
  for seed in config.seeds:
    for method in config.methods:
      name = f'{method["label"]}-{seed}'
      built = _run_config(config, method, seed, path)
      # Where the initial model lies does not matter, how it was made does.
      moved = built.copy_and_resolve_references()
      moved.model.path = ''
      folder = workdir / 'runs' / name
      digest = _digest(moved, initial)
      label, script = method['label'], method.get('script', 'train')
      found.append(Job(name, label, seed, built, folder, digest, script))
  return found


def _run_config(
  config: ConfigDict, method: dict[str, Any], seed: int, path: str
) -> ConfigDict:
  """The configuration of one run."""
  built = config.base.copy_and_resolve_references().unlock()
  built.algorithm = ConfigDict(method['algorithm'])
  built.lock()
  left = {*_METHOD, 'script'}
  changes = {k: v for k, v in method.items() if k not in left}
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
  """Raises UserError if a run would not begin; names its method."""
  for job in {job.label: job for job in everything}.values():
    try:
      _SCRIPTS[job.script].check(job.config)
    except UserError as error:
      raise UserError(f'{job.label}: {error}') from error


def _digest(*configs: ConfigDict) -> str:
  """Of configurations and of the user's code that they name."""
  values = [as_json(config.to_dict(), 'configuration') for config in configs]
  files = [file for config in configs for file in build.code_files(config)]
  values += [pathlib.Path(file).read_text(encoding='utf-8') for file in files]
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def train_run(job: Job) -> int:
  """Trains one run in this process; returns the exit status.

  Beside what the training leaves, `finished.json` gets what it cost.
  """
  start = time.perf_counter()
  _claim(job)
  code = run.train(_SCRIPTS[job.script], job.config, job.folder, resume=True)
  if code:
    return code
  online = job.script == 'train'
  measure = memory.measure if online else memory.measure_offline
  cost = {
    'digest': job.digest,
    'peak_rss': _peak_rss(),
    'seconds': time.perf_counter() - start,
    'cores': len(processes.own_cores()),
    'update_bytes': measure(job.config).peak,
  }
  records = runs.read_metrics(job.folder / 'metrics.jsonl')
  if job.generates and records[-1]['num_tokens'] < job.config.tokens:
    raise UserError(
      f'{job.name} has ended with {records[-1]["num_tokens"]:,} of '
      f'{job.config.tokens:,} tokens\nraise config.base.steps: the budget of '
      'tokens is to end a run'
    )
  write_atomically(job.folder / 'finished.json', json.dumps(cost) + '\n')
  return 0


def _claim(job: Job) -> None:
  """Marks the run's folder as the job's.

  Raises:
    UserError: it holds a run of other settings, code or initial model.
  """
  path = job.folder / 'digest'
  if path.exists():
    if path.read_text() != job.digest:
      raise UserError(
        f'{job.folder} holds a run of other settings, code or initial model\n'
        'remove it, or name another --workdir'
      )
    return
  job.folder.mkdir(parents=True, exist_ok=True)
  write_atomically(path, job.digest)


def _peak_rss() -> int:
  """The largest resident set that this process has had, bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak


def compare(
  config: ConfigDict,
  workdir: pathlib.Path,
  chosen: Sequence[Job],
  places: Sequence[set[int]],
  command: Sequence[str],
) -> int:
  """Trains what is chosen and not complete, and reports all that there is.

  Returns:
    The exit status: 0, 1 if a run failed, 128 + the signal that stopped it.
  """
  everything = jobs(config, workdir)
  (workdir / 'runs').mkdir(parents=True, exist_ok=True)
  reported = [job for job in everything if job.label != _INIT]
  names = {job.name for job in chosen}
  todo = [j for j in everything if j.name in names and not j.complete]
  phases = (
    [j for j in todo if j.label == _INIT],
    [j for j in todo if j.label != _INIT],
  )
  print(
    f'{len(todo)} runs to do; {len(places)} at a time, on cores '
    f'{", ".join(map(str, places))}',
    flush=True,
  )
  failures, done = {}, 0
  with StopSignal() as stop:
    # The initial model has to be there before any other run begins.
    together = [set().union(*places)]
    for phase, where in zip(phases, (together, places), strict=True):
      if failures or stop.requested:
        break
      for job, code, seconds in processes.launch(
        phase, workdir, where, command, stop
      ):
        done += 1
        if code and not stop.requested:
          failures[job.name] = processes.why(workdir, job, code)
        told = failures.get(job.name, 'stopped' if code else 'done')
        print(
          f'[{done}/{len(todo)}] {job.name}: {told}, {seconds:.0f} s',
          flush=True,
        )
        compare_report.write(config, workdir, reported, failures)
  if _INIT in failures:
    raise UserError(
      f'the initial model could not be made: {failures[_INIT]}\n'
      f'see {workdir / "logs" / "init.log"}'
    )
  print(compare_report.write(config, workdir, reported, failures))
  if stop.requested:
    return 128 + signal.Signals[stop.name]
  return 1 if failures else 0


def choose(
  everything: Sequence[Job], only: Sequence[str], seeds: Sequence[str]
) -> list[Job]:
  """The jobs that --only and --seeds leave; the initial model always stays.

  Raises:
    UserError: a label or a seed that the configuration does not have.
  """
  rest = [job for job in everything if job.label != _INIT]
  for flag, given, known in (
    ('only', only, {job.label for job in rest}),
    ('seeds', seeds, {str(job.seed) for job in rest}),
  ):
    unknown = [value for value in given if value not in known]
    if unknown:
      raise UserError(
        f'--{flag} has {unknown[0]!r}\nthe configuration has '
        f'{", ".join(sorted(known))}'
      )
  return [
    job
    for job in everything
    if job.label == _INIT
    or (not only or job.label in only)
    and (not seeds or str(job.seed) in seeds)
  ]


def main() -> int:
  """Reads the flags and compares."""
  values = flags.FLAGS
  config = cli.config()
  name = pathlib.Path(values['config'].config_filename).stem
  workdir = pathlib.Path(values.workdir or pathlib.Path('runs') / name)
  everything = jobs(config, workdir)
  if values.run is not None:
    chosen = [job for job in everything if job.name == values.run]
    if not chosen:
      raise UserError(
        f'--run={values.run}: no such run\nwrite METHOD-SEED, such as '
        f'{everything[-1].name}'
      )
    return train_run(chosen[0])
  check_runs(everything)
  chosen = choose(everything, values.only, values.seeds)
  if values.report:
    chosen = []
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
