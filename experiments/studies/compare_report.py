"""Reports a comparison: numbers of its runs, one table, one figure."""

import bisect
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import cli
from jaxrl_llm import evaluation, runs

_NOTES = """
Each run ends with the update that brings its generated tokens (greedy \
responses and branches included) to {tokens:,}; at half of them its curve is \
interpolated. In brackets: 95 % bootstrap intervals over seeds, widened for \
their small number (`evaluation.bootstrap_few`). Seconds: medians over \
updates, so without compilation, each run on {cores} core(s) of its own. \
Update: peak bytes of the compiled update (`experiments.planning.memory`) of \
as many responses as the method trains on at one time.
"""


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
  # Some steps of some methods only sample.
  learned = [record['step'] for record in records if 'loss' in record]
  per_step = config.training.epochs * config.training.minibatches
  updates = lambda step: bisect.bisect(learned, step) * per_step
  evaluated = [record for record in records if 'eval/reward' in record]
  curve = {
    'tokens': [record['num_tokens'] for record in evaluated],
    'updates': [updates(record['step']) for record in evaluated],
  }
  for name in sorted(set().union(*evaluated)):
    if name.startswith('eval/'):
      # The KL to the reference is not measured where the two are the same.
      zero = {name: 0.0} if name == 'eval/kl' else {}
      curve[name] = [(zero | record)[name] for record in evaluated]
  total = updates(math.inf)
  seconds = _usual_time(timings, learned, 'step_time')
  return {
    **json.loads((folder / 'finished.json').read_text(encoding='utf-8')),
    'tokens': records[-1]['num_tokens'],
    'updates': total,
    'seconds_per_update': seconds / total,
    'rollout_share': _usual_time(timings, learned, 'rollout_time') / seconds,
    'curve': curve,
  }


def _usual_time(timings: list[dict], learned: list[int], name: str) -> float:
  """Returns a time of all steps, without the compilation in some of them.

  Every step counts with the median of its kind: those that learn, and those
  that only sample.
  """
  timed = [record for record in timings if 'step_time' in record]
  learns = np.isin([record['step'] for record in timed], learned)
  times = np.array([record.get(name, 0.0) for record in timed])
  kinds = times[learns], times[~learns]
  return float(sum(len(kind) * np.median(kind) for kind in kinds if len(kind)))


def write(
  config: ConfigDict,
  workdir: pathlib.Path,
  trained: Sequence,
  failures: dict[str, str],
  file: pathlib.Path,
) -> str:
  """Writes the results, table.md and figure.png; returns the table.

  The numbers are those of the runs' folders and of earlier results, as far as
  they belong to the present configuration.

  Args:
    config: of the comparison.
    workdir: its folder.
    trained: its `compare.Job`s, without that of the initial model.
    failures: name of a run → its error now.
    file: JSON lines of results, one per run; those of other configurations
      stay.

  Raises:
    UserError: the folder cannot be written.
  """
  results, known = {'runs': {}, 'failures': {}}, read_results(file)
  for job in trained:
    if job.complete:
      run = {'label': job.label, 'seed': job.seed}
      rate = float(job.config.optimizer.learning_rate)
      known[job.digest] = run | {
        'learning_rate': rate,
        **read_run(job.folder, job.config),
      }
    if job.digest in known:
      results['runs'][job.name] = known[job.digest]
    elif job.name in failures:
      results['failures'][job.name] = failures[job.name]
  text = table(config, results)
  lines = ''.join(json.dumps(run) + '\n' for run in known.values())
  cli.write_files(workdir, {'table.md': text})
  cli.write_output(file, lines)
  figure(workdir / 'figure.png', config, results)
  return text


def read_results(file: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns digest → numbers of a run, of all in a file, if there is one."""
  lines = file.read_text(encoding='utf-8').splitlines() if file.exists() else []
  return {run['digest']: run for run in map(json.loads, lines)}


def by_method(config: ConfigDict, results: dict) -> dict[str, list[dict]]:
  """Returns title → complete runs by seed, in the configuration's order."""
  order = sorted(results['runs'].values(), key=lambda run: run['seed'])
  methods = {
    method['title']: [run for run in order if run['label'] == method['label']]
    for method in config.methods
  }
  return {title: trained for title, trained in methods.items() if trained}


def table(config: ConfigDict, results: dict) -> str:
  """Returns the comparison as a Markdown table and a line on how to read it."""
  methods, first = by_method(config, results), config.metrics[0]
  titles = [metric['title'] for metric in config.metrics]
  titles[1:1] = ['at half the tokens']
  costs = ['tokens / update', 'updates', 's / update', 'share of sampling']
  header = ['method', 'seeds', *titles, *costs, 'update, MiB']
  lines = [header, ['---'] * len(header)]
  # With one seed all methods evaluate the same model with the same key.
  every = [run for trained in methods.values() for run in trained]
  seeds = {run['seed']: run for run in reversed(every)}
  if start := list(seeds.values())[::-1]:
    starts = [_text(start, metric, 0) for metric in config.metrics]
    starts[1:1] = ['']
    lines.append([config.init, '', *starts, *[''] * 5])
  for title, trained in methods.items():
    ends = [_text(trained, metric, math.inf) for metric in config.metrics]
    ends[1:1] = [_text(trained, first, config.tokens / 2)]
    tokens = np.mean([run['tokens'] / run['updates'] for run in trained])
    median = lambda name, trained=trained: np.median(
      [run[name] for run in trained]
    )
    lines.append(
      [title, f'{len(trained)} of {len(config.seeds)}', *ends]
      + [f'{tokens:,.0f}', f'{median("updates"):,.0f}']
      + [f'{median("seconds_per_update"):.3f}']
      + [f'{100 * median("rollout_share"):.0f} %']
      + [f'{median("update_bytes") / 2**20:,.1f}']
    )
  text = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  cores = ' or '.join(map(str, sorted({run['cores'] for run in every}))) or 'no'
  text += _NOTES.format(tokens=config.tokens, cores=cores)
  for name, failure in results['failures'].items():
    text += f'\nfailed: {name}: {failure}\n'
  return text


def _curve(run: dict, metric: dict, axis: str, points) -> np.ndarray:
  """Returns a metric at points of an axis, interpolated; NaNs without it."""
  if metric['name'] not in run['curve']:
    return np.full(np.shape(points), np.nan)
  values = metric['scale'] * np.array(run['curve'][metric['name']])
  return np.interp(points, run['curve'][axis], values)


def _text(trained, metric: dict, tokens: float) -> str:
  """Formats mean and interval over runs after a number of tokens.

  Equal values have no interval, and a run without tokens only start and end.
  """
  digits = metric['digits']
  values = np.array([_curve(run, metric, 'tokens', tokens) for run in trained])
  inside = 0 < tokens < math.inf and not all(run['tokens'] for run in trained)
  if inside or np.isnan(values).any():
    return '–'
  mean, low, high = evaluation.bootstrap_few(values)
  if np.isnan(low) or low == high:
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]'


def figure(path: pathlib.Path, config: ConfigDict, results: dict) -> None:
  """Draws the first metric against tokens and updates, of all that generate."""
  methods = {
    title: trained
    for title, trained in by_method(config, results).items()
    if all(run['tokens'] for run in trained)
  }
  if not methods:
    return
  seeds = sorted({len(trained) for trained in methods.values()})
  runs.plot_bands(
    path,
    [
      {
        title: _band(trained, config, axis, scale)
        for title, trained in methods.items()
      }
      for axis, scale in (('tokens', 1e-3), ('updates', 1.0))
    ],
    xlabels=['generated tokens, thousands', 'updates'],
    ylabel=f'held-out {config.metrics[0]["title"]}',
    title=f'means of {"–".join(map(str, seeds))} seeds, 95 % intervals',
  )


def _band(
  trained: list[dict], config: ConfigDict, axis: str, scale: float
) -> runs.Band:
  """Returns mean and interval over runs, on a grid that all of them reach."""
  end = min(run['curve'][axis][-1] for run in trained)
  grid = np.linspace(0, end, config.evaluations + 1)
  values = [_curve(run, config.metrics[0], axis, grid) for run in trained]
  intervals = [
    evaluation.bootstrap_few(column) for column in np.transpose(values)
  ]
  return runs.Band(scale * grid, *np.transpose(intervals))
