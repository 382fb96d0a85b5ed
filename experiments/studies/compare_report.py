"""What a comparison came to: numbers of its runs, one table, one figure."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxrl_llm import evaluation
from jaxrl_llm import runs as logging
from jaxrl_llm.atomic import as_json, write_atomically
from jaxrl_llm.errors import UserError

_MIB = 2**20


def read_run(folder: pathlib.Path, config: ConfigDict) -> dict[str, Any]:
  """The numbers of one complete run.

  Args:
    folder: of the run, with `finished.json`.
    config: of the run.

  Returns:
    JSON values: the cost as `finished.json` has it (bytes, seconds),
    `tokens` and `updates` in all, `seconds_per_update` (of medians, so that
    steps in which programs were compiled do not count) and `rollout_share`,
    the sampling's part of it, and `curve`: lists of `tokens`, `updates` and
    of each number of the evaluations, from the start of RL on.
  """
  records = logging.read_metrics(folder / 'metrics.jsonl')
  timings = logging.read_metrics(folder / 'timings.jsonl')
  per_step = config.training.epochs * config.training.minibatches
  # Some steps of some methods only sample.
  learning = [record for record in records if 'loss' in record]
  learned = np.array([record['step'] for record in learning])
  evaluated = [record for record in records if 'eval/reward' in record]
  names = {n for r in evaluated for n in r if n.startswith('eval/')}
  curve = {
    'tokens': [record['num_tokens'] for record in evaluated],
    'updates': [
      int((learned <= record['step']).sum()) * per_step for record in evaluated
    ],
    **{
      # The KL to the reference is not measured where they are the same.
      name: [
        r.get(name, 0.0) if name == 'eval/kl' else r[name] for r in evaluated
      ]
      for name in sorted(names)
    },
  }
  updates = len(learning) * per_step
  seconds = sampling = 0.0
  for steps in _kinds(timings, set(learned.tolist())):
    seconds += len(steps) * _median(steps, 'step_time')
    sampling += len(steps) * _median(steps, 'rollout_time')
  return {
    **json.loads((folder / 'finished.json').read_text(encoding='utf-8')),
    'tokens': records[-1]['num_tokens'],
    'updates': updates,
    'seconds_per_update': seconds / updates,
    'rollout_share': sampling / seconds,
    'curve': curve,
  }


def _kinds(timings: list[dict], learned: set[int]) -> list[list[dict]]:
  """Timings of steps that learn, and of those that only sample."""
  steps = [record for record in timings if 'step_time' in record]
  kinds = (
    [record for record in steps if (record['step'] in learned) == learns]
    for learns in (True, False)
  )
  return [kind for kind in kinds if kind]


def _median(steps: list[dict], name: str) -> float:
  """Of a time that all of the steps have, or none."""
  return float(np.median([step.get(name, 0.0) for step in steps]))


def collect(
  workdir: pathlib.Path, trained: Sequence, failures: dict[str, str]
) -> dict[str, Any]:
  """The numbers of all runs: of the folders, and of an earlier results.json.

  Args:
    workdir: of the comparison.
    trained: its `compare.Job`s, without that of the initial model.
    failures: name of a run → why it failed now.

  Returns:
    {'runs': {name: numbers}, 'failures': {name: {'why', 'digest'}}}, of the
    present configuration alone: an earlier result of another one is left out.
  """
  earlier = {'runs': {}, 'failures': {}}
  path = workdir / 'results.json'
  if path.exists():
    try:
      earlier = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
      raise UserError(
        f'{path} is not JSON: {error}\nremove it: it is made again of the runs'
      ) from error
  found = {'runs': {}, 'failures': {}}
  for job in trained:
    before = earlier['runs'].get(job.name, {})
    if job.complete:
      run = {'label': job.label, 'seed': job.seed}
      found['runs'][job.name] = run | read_run(job.folder, job.config)
    elif before.get('digest') == job.digest:
      found['runs'][job.name] = before
    elif why := failures.get(job.name):
      found['failures'][job.name] = {'why': why, 'digest': job.digest}
    elif earlier['failures'].get(job.name, {}).get('digest') == job.digest:
      found['failures'][job.name] = earlier['failures'][job.name]
  return found


def write(
  config: ConfigDict,
  workdir: pathlib.Path,
  trained: Sequence,
  failures: dict[str, str],
) -> str:
  """Writes results.json, table.md and figure.png; returns the table.

  Raises:
    UserError: the disk is full or the folder cannot be written.
  """
  results = collect(workdir, trained, failures)
  results['config'] = as_json(config.to_dict(), 'configuration')
  text = table(config, results)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(
      workdir / 'results.json', json.dumps(results, indent=1) + '\n'
    )
    write_atomically(workdir / 'table.md', text)
  except OSError as error:
    raise UserError(f'{workdir} cannot be written: {error.strerror}') from error
  if drawn(config, results):
    figure(workdir / 'figure.png', config, results)
  return text


def by_method(config: ConfigDict, results: dict) -> dict[str, list[dict]]:
  """Title → complete runs by seed, in the configuration's order."""
  found = {
    method['title']: sorted(
      (r for r in results['runs'].values() if r['label'] == method['label']),
      key=lambda run: run['seed'],
    )
    for method in config.methods
  }
  return {title: runs for title, runs in found.items() if runs}


def drawn(config: ConfigDict, results: dict) -> dict[str, list[dict]]:
  """`by_method` without those that generate nothing."""
  found = by_method(config, results)
  return {
    title: runs
    for title, runs in found.items()
    if all(run['tokens'] for run in runs)
  }


def table(config: ConfigDict, results: dict) -> str:
  """The comparison as a Markdown table with a line on how to read it."""
  methods = by_method(config, results)
  first, *others = config.metrics
  header = ['method', 'seeds', first['title'], 'at half the tokens']
  header += [metric['title'] for metric in others]
  header += ['tokens / update', 'updates', 's / update', 'of it sampling']
  header += ['update, MiB']
  rows = [_initial(config, methods)] if methods else []
  for title, runs in methods.items():
    ends = [_cell(runs, metric, None) for metric in config.metrics]
    half = _cell(runs, first, config.tokens / 2)
    medians = {
      name: float(np.median([run[name] for run in runs]))
      for name in (
        'seconds_per_update',
        'rollout_share',
        'updates',
        'update_bytes',
      )
    }
    tokens = np.mean([run['tokens'] / run['updates'] for run in runs])
    rows.append(
      [title, f'{len(runs)} of {len(config.seeds)}', ends[0], half, *ends[1:]]
      + [f'{tokens:,.0f}', f'{medians["updates"]:,.0f}']
      + [f'{medians["seconds_per_update"]:.3f}']
      + [f'{100 * medians["rollout_share"]:.0f} %']
      + [f'{medians["update_bytes"] / _MIB:,.1f}']
    )
  lines = [header, ['---'] * len(header), *rows]
  text = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  failed = ''.join(
    f'\nfailed: {name}: {failure["why"]}\n'
    for name, failure in results['failures'].items()
  )
  return f'{text}\n\n{_notes(config, methods)}\n{failed}'


def _notes(config: ConfigDict, methods: dict[str, list[dict]]) -> str:
  cores = {run['cores'] for runs in methods.values() for run in runs}
  count = ' or '.join(map(str, sorted(cores))) or 'no'
  return (
    f'Each run ends with the update that brings its generated tokens (greedy '
    f'responses and branches included) to {config.tokens:,}; '
    'at half of them its curve is interpolated. In brackets: 95 % bootstrap '
    'intervals over seeds, widened for their small number '
    '(`evaluation.bootstrap_few`). Seconds: medians over updates, so without '
    f'compilation, each run on {count} core(s) of its own. Update: peak bytes '
    'of the compiled update (`experiments.planning.memory`) of as many '
    'responses as the method trains on at one time.'
  )


def _initial(config: ConfigDict, methods: dict[str, list[dict]]) -> list[str]:
  """The row of the initial model: what the runs' first evaluations say."""
  seeds = {}
  for runs in methods.values():
    for run in runs:
      seeds.setdefault(run['seed'], []).append(run)
  cells = []
  for metric in config.metrics:
    # Of one seed all methods evaluate the same model with the same key.
    starts = [_first(runs[0], metric) for runs in seeds.values()]
    cells.append(_interval(starts, metric['digits']))
  return [config.init, '', cells[0], '', *cells[1:], *[''] * 5]


def _cell(runs: list[dict], metric: dict, tokens: float | None) -> str:
  """A metric after so many tokens, None for the end."""
  values = [
    _last(run, metric) if tokens is None else _at(run, metric, tokens)
    for run in runs
  ]
  return _interval(values, metric['digits'])


def _interval(values: Sequence[float], digits: int) -> str:
  """Mean and interval over seeds; equal ones have none."""
  if np.isnan(values).any():
    return '–'
  mean, low, high = evaluation.bootstrap_few(np.array(values))
  if np.isnan(low) or low == high:
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]'


def _first(run: dict, metric: dict) -> float:
  """A run's metric where it begins; NaN without it."""
  return metric['scale'] * run['curve'].get(metric['name'], [np.nan])[0]


def _last(run: dict, metric: dict) -> float:
  """A run's metric where it ends; NaN without it."""
  return metric['scale'] * run['curve'].get(metric['name'], [np.nan])[-1]


def _at(run: dict, metric: dict, tokens: float) -> float:
  """A run's metric after so many tokens; NaN where it is not known."""
  values = run['curve'].get(metric['name'])
  if values is None or not run['tokens']:
    return np.nan
  at = np.interp(tokens, run['curve']['tokens'], values)
  return metric['scale'] * float(at)


def figure(path: pathlib.Path, config: ConfigDict, results: dict) -> None:
  """Draws the first metric against tokens and against updates.

  A method that generates nothing has no place there and is left out.
  """
  metric = config.metrics[0]
  methods = drawn(config, results)
  seeds = sorted({len(runs) for runs in methods.values()})
  logging.plot_bands(
    path,
    [
      {
        title: _band(runs, metric, axis, config.evaluations, scale)
        for title, runs in methods.items()
      }
      for axis, scale in (('tokens', 1e-3), ('updates', 1.0))
    ],
    xlabels=['generated tokens, thousands', 'updates'],
    ylabel=f'held-out {metric["title"]}',
    title=f'means of {"–".join(map(str, seeds))} seeds, 95 % intervals',
  )


def _band(
  runs: list[dict], metric: dict, axis: str, points: int, scale: float
) -> logging.Band:
  """Mean and interval over runs, on a grid that all of them reach."""
  name = metric['name']
  end = min(run['curve'][axis][-1] for run in runs)
  grid = np.linspace(0, end, points + 1)
  values = metric['scale'] * np.array(
    [np.interp(grid, run['curve'][axis], run['curve'][name]) for run in runs]
  )
  intervals = [evaluation.bootstrap_few(column) for column in values.T]
  mean, low, high = (np.array(bound) for bound in zip(*intervals, strict=True))
  return logging.Band(scale * grid, mean, low, high)
