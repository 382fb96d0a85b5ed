"""Reports a comparison: numbers of its runs, one table, one figure."""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import cli
from jaxrl_llm import evaluation, runs
from jaxrl_llm.atomic import as_json
from jaxrl_llm.errors import UserError


def read_run(folder: pathlib.Path, config: ConfigDict) -> dict[str, Any]:
  """Returns the numbers of one complete run.

  Args:
    folder: of the run, with `finished.json`.
    config: of the run.

  Returns:
    JSON values: the cost in `finished.json` (bytes, seconds), the total
    `tokens` and `updates`, `seconds_per_update` and the sampling's share of it,
    `rollout_share`, and `curve`: lists of `tokens`, `updates` and each number
    of the evaluations, from the start of RL on.
  """
  records = runs.read_metrics(folder / 'metrics.jsonl')
  timings = runs.read_metrics(folder / 'timings.jsonl')
  per_step = config.training.epochs * config.training.minibatches
  # Some steps of some methods only sample.
  learned = np.array([r['step'] for r in records if 'loss' in r])
  evaluated = [record for record in records if 'eval/reward' in record]
  names = {n for r in evaluated for n in r if n.startswith('eval/')}
  curve = {
    'tokens': [record['num_tokens'] for record in evaluated],
    'updates': [
      int((learned <= record['step']).sum()) * per_step for record in evaluated
    ],
  }
  for name in sorted(names):
    # The KL to the reference is not measured where the two are the same.
    curve[name] = [
      r.get(name, 0.0) if name == 'eval/kl' else r[name] for r in evaluated
    ]
  updates = len(learned) * per_step
  seconds = _usual_time(timings, learned, 'step_time')
  return {
    **json.loads((folder / 'finished.json').read_text(encoding='utf-8')),
    'tokens': records[-1]['num_tokens'],
    'updates': updates,
    'seconds_per_update': seconds / updates,
    'rollout_share': _usual_time(timings, learned, 'rollout_time') / seconds,
    'curve': curve,
  }


def _usual_time(timings: list[dict], learned: np.ndarray, name: str) -> float:
  """Returns a time of all steps, without the compilation in some of them.

  Every step counts with the median of its kind: those that learn, and those
  that only sample.
  """
  timed = [record for record in timings if 'step_time' in record]
  learns = np.isin([record['step'] for record in timed], learned)
  times = np.array([record.get(name, 0.0) for record in timed])
  kinds = times[learns], times[~learns]
  return float(sum(len(kind) * np.median(kind) for kind in kinds if len(kind)))


def collect(
  workdir: pathlib.Path, trained: Sequence, failures: dict[str, str]
) -> dict[str, Any]:
  """Returns the numbers of all runs, from folders and an earlier results.json.

  Args:
    workdir: of the comparison.
    trained: its `compare.Job`s, without that of the initial model.
    failures: name of a run → its error now.

  Returns:
    {'runs': {name: numbers}, 'failures': {name: {'why', 'digest'}}}, of the
    present configuration alone: earlier results of another one are left out.
  """
  path, earlier = workdir / 'results.json', {'runs': {}, 'failures': {}}
  if path.exists():
    try:
      earlier = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
      raise UserError(
        f'{path} is not JSON: {error}\nremove it: it is made again of the runs'
      ) from error
  results = {'runs': {}, 'failures': {}}
  for job in trained:
    run, failure = (earlier[kind].get(job.name, {}) for kind in results)
    if job.complete:
      run = {'label': job.label, 'seed': job.seed}
      run |= read_run(job.folder, job.config)
    if job.name in failures:
      failure = {'why': failures[job.name], 'digest': job.digest}
    if run.get('digest') == job.digest:
      results['runs'][job.name] = run
    elif failure.get('digest') == job.digest:
      results['failures'][job.name] = failure
  return results


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
  cli.write_files(
    workdir,
    {'results.json': json.dumps(results, indent=1) + '\n', 'table.md': text},
  )
  if drawn(config, results):
    figure(workdir / 'figure.png', config, results)
  return text


def by_method(config: ConfigDict, results: dict) -> dict[str, list[dict]]:
  """Returns title → complete runs by seed, in the configuration's order."""
  order = sorted(results['runs'].values(), key=lambda run: run['seed'])
  methods = {
    method['title']: [run for run in order if run['label'] == method['label']]
    for method in config.methods
  }
  return {title: found for title, found in methods.items() if found}


def drawn(config: ConfigDict, results: dict) -> dict[str, list[dict]]:
  """Returns `by_method` without methods that generate nothing."""
  return {
    title: found
    for title, found in by_method(config, results).items()
    if all(run['tokens'] for run in found)
  }


def table(config: ConfigDict, results: dict) -> str:
  """Returns the comparison as a Markdown table and a line on how to read it."""
  methods = by_method(config, results)
  first, *others = config.metrics
  header = ['method', 'seeds', first['title'], 'at half the tokens']
  header += [metric['title'] for metric in others]
  header += ['tokens / update', 'updates', 's / update', 'of it sampling']
  lines = [[*header, 'update, MiB'], ['---'] * (len(header) + 1)]
  if methods:
    # With one seed all methods evaluate the same model with the same key.
    seeds = {}
    for run in itertools.chain(*methods.values()):
      seeds.setdefault(run['seed'], run)
    cells = [_ends(seeds.values(), metric, 0) for metric in config.metrics]
    lines.append([config.init, '', cells[0], '', *cells[1:], *[''] * 5])
  for title, found in methods.items():
    ends = [_ends(found, metric, -1) for metric in config.metrics]
    half = _interval(
      [_at(run, first, config.tokens / 2) for run in found], first
    )
    median = lambda name, found=found: np.median([run[name] for run in found])
    tokens = np.mean([run['tokens'] / run['updates'] for run in found])
    lines.append(
      [title, f'{len(found)} of {len(config.seeds)}', ends[0], half, *ends[1:]]
      + [f'{tokens:,.0f}', f'{median("updates"):,.0f}']
      + [f'{median("seconds_per_update"):.3f}']
      + [f'{100 * median("rollout_share"):.0f} %']
      + [f'{median("update_bytes") / 2**20:,.1f}']
    )
  text = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  failed = ''.join(
    f'\nfailed: {name}: {failure["why"]}\n'
    for name, failure in results['failures'].items()
  )
  return f'{text}\n\n{_notes(config, results)}\n{failed}'


def _notes(config: ConfigDict, results: dict) -> str:
  cores = {run['cores'] for run in results['runs'].values()}
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


def _curve(run: dict, metric: dict) -> np.ndarray:
  """Returns a metric of a run's evaluations; NaN without it."""
  return metric['scale'] * np.array(run['curve'].get(metric['name'], [np.nan]))


def _at(run: dict, metric: dict, tokens: float) -> float:
  """Returns a metric after a number of tokens; NaN where it is not known."""
  values = _curve(run, metric)
  if not run['tokens'] or np.isnan(values).any():
    return np.nan
  return np.interp(tokens, run['curve']['tokens'], values)


def _ends(found, metric: dict, place: int) -> str:
  """Formats a metric of runs where they begin (0) or end (−1)."""
  return _interval([_curve(run, metric)[place] for run in found], metric)


def _interval(values: Sequence[float], metric: dict) -> str:
  """Formats mean and interval over seeds; equal values have no interval."""
  digits = metric['digits']
  if np.isnan(values).any():
    return '–'
  mean, low, high = evaluation.bootstrap_few(np.array(values))
  if np.isnan(low) or low == high:
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]'


def figure(path: pathlib.Path, config: ConfigDict, results: dict) -> None:
  """Draws the first metric against tokens and updates, of all that generate."""
  metric = config.metrics[0]
  methods = drawn(config, results)
  seeds = sorted({len(found) for found in methods.values()})
  runs.plot_bands(
    path,
    [
      {
        title: _band(found, metric, axis, config.evaluations, scale)
        for title, found in methods.items()
      }
      for axis, scale in (('tokens', 1e-3), ('updates', 1.0))
    ],
    xlabels=['generated tokens, thousands', 'updates'],
    ylabel=f'held-out {metric["title"]}',
    title=f'means of {"–".join(map(str, seeds))} seeds, 95 % intervals',
  )


def _band(
  found: list[dict], metric: dict, axis: str, points: int, scale: float
) -> runs.Band:
  """Returns mean and interval over runs, on a grid that all of them reach."""
  end = min(run['curve'][axis][-1] for run in found)
  grid = np.linspace(0, end, points + 1)
  values = np.array(
    [np.interp(grid, run['curve'][axis], _curve(run, metric)) for run in found]
  )
  intervals = [evaluation.bootstrap_few(column) for column in values.T]
  return runs.Band(scale * grid, *map(np.array, zip(*intervals, strict=True)))
