"""Bias, variance and signal per generated token of estimators on a real model.

    python -m experiments.studies.audit --run=runs/quickstart \\
      --estimators=experiments/configs/audit_estimators.py \\
      --workdir=runs/quickstart_audit
    python -m experiments.studies.audit --config=FILE.py …

The model and the task are those of a run, or of a configuration that names a
model.  Every estimator's gradient is drawn repeatedly, on the same fixed
prompts, through the code that trains, until it has cost --tokens generated
tokens; it is compared with the mean of a large sample of RLOO's.  The prompts
are fixed: the noise is that of responses and branches alone.

Values of states inside responses are compared with the mean return of very many
branches: those of few branches, of the prompt's other responses, of a critic.

  audit.json, audit.md, audit.png, values.png
  draws/            sketches of the gradients, used again by the next audit

--estimators names a file whose get_estimators() returns {label:
dict(algorithm=…, rollout=…)}: an algorithm as in configurations, and changes of
the sampling.  The label 'reference' replaces RLOO; it has to be unbiased.

The files of --config and --estimators are executed.  Functions that a run's
configuration names as file.py:function or module:function are executed with
--trust_code alone: read them first.
"""

import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from experiments import cli
from experiments.studies import audit_draws, audit_values
from jaxrl_llm import audit as gradients
from jaxrl_llm import naming, runs
from jaxrl_llm.atomic import as_json
from jaxrl_llm.errors import UserError

_REFERENCE = 'reference'
# A number from an estimator's, or a value's, part of the report.
_Getter = Callable[[dict[str, Any]], Any]


def read_estimators(path: str) -> dict[str, dict[str, Any]]:
  """Returns the checked result of a file's `get_estimators()`.

  Raises:
    UserError: no such file or function, or it does not return a dictionary from
      labels to algorithms.
  """
  flag = '--estimators'
  specs = naming.find((), f'{path}:get_estimators', flag)()
  if not isinstance(specs, dict) or not specs:
    raise UserError(
      f'{flag}: get_estimators() of {path} gives no dictionary\n'
      "return {'label': dict(algorithm=dict(name='rloo'))}"
    )
  for label, spec in specs.items():
    known = isinstance(spec, dict) and set(spec) <= {'algorithm', 'rollout'}
    if not known or not isinstance(spec.get('algorithm'), dict):
      raise UserError(
        f'{flag}: {label!r} of {path} is {spec!r}\n'
        "write dict(algorithm=dict(name='rloo'), rollout=dict(samples=8)); "
        'rollout may be left out'
      )
  if len({audit_draws.file_name(label) for label in specs}) < len(specs):
    raise UserError(f'{flag}: labels differ in punctuation only: {list(specs)}')
  return specs


def audit(
  subject: audit_draws.Subject,
  specs: dict[str, dict[str, Any]],
  workdir: pathlib.Path,
  *,
  tokens: int,
  reference_tokens: int,
  branches: int,
  dimension: int,
) -> dict[str, Any]:
  """Measures estimators and values; writes the report after each of them.

  Args:
    subject: the model, its task and the prompts.
    specs: label → algorithm and changes of the sampling.
    workdir: folder of the report and of the draws.
    tokens, reference_tokens: budgets of generated tokens, of each estimator and
      of the reference.
    branches: from each state, for its true value; 0 leaves values out.
    dimension: numbers kept of each gradient.

  Returns:
    The content of audit.json.
  """
  specs = {_REFERENCE: dict(algorithm=dict(name='rloo'))} | specs
  # All are checked before hours go into one of them.
  configs = {
    label: audit_draws.variant(subject, label, spec)
    for label, spec in specs.items()
  }

  def drawn(label: str, budget: int) -> audit_draws.Draws:
    start = time.perf_counter()
    draws, stored = audit_draws.load_or_draw(
      subject, configs[label], label, workdir / 'draws', budget, dimension
    )
    source = 'stored' if stored else f'{time.perf_counter() - start:.0f} s'
    total, count = draws.whole.tokens.sum(), len(draws.whole.tokens)
    print(
      f'{label}: {total:,.0f} tokens, {count} gradients, {source}', flush=True
    )
    return draws

  reference, rollout = (
    drawn(_REFERENCE, reference_tokens),
    subject.config.rollout,
  )
  result = {
    'subject': subject.title,
    'prompts': len(subject.rows),
    'samples': rollout.samples,
    'max_tokens': rollout.max_tokens,
    'temperature': float(rollout.temperature),
    'reference': {
      'spec': as_json(specs.pop(_REFERENCE), 'reference'),
      'draws': len(reference.whole.tokens),
      'tokens': float(reference.whole.tokens.sum()),
      'relative_error': gradients.relative_error(reference.whole),
      'equal_groups': float(reference.equal_groups.mean()),
    },
    'estimators': {},
  }
  for label, spec in specs.items():
    row = {
      'samples': spec.get('rollout', {}).get('samples', rollout.samples),
      'spec': as_json(spec, f'algorithm of {label}'),
    }
    row |= _numbers(drawn(label, tokens), reference)
    result['estimators'][label] = row
    write(workdir, result)
  if branches:
    start = time.perf_counter()
    values = audit_values.measure(subject, configs[_REFERENCE], branches)
    result['values'] = audit_values.report(values)
    print(f'values: {time.perf_counter() - start:.0f} s', flush=True)
  write(workdir, result)
  return result


def _numbers(
  draws: audit_draws.Draws, reference: audit_draws.Draws
) -> dict[str, Any]:
  """Returns an estimator's part of the report."""
  report = gradients.compare(draws.whole, reference.whole)
  part = gradients.share(draws.equal, draws.whole, reference.whole)
  numbers = {
    name: value._asdict() if isinstance(value, gradients.Estimate) else value
    for name, value in report._asdict().items()
  }
  equal = {name: value._asdict() for name, value in part._asdict().items()}
  return {
    'bias': audit_values.interval_of_root(report.squared_bias),
    'tilt': audit_values.interval_of_root(report.squared_tilt),
    **numbers,
    'equal_groups': {'share': float(draws.equal_groups.mean()), **equal},
  }


def write(workdir: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes audit.json, audit.md and the figures.

  Raises:
    UserError: the folder cannot be written.
  """
  text = json.dumps(_without_nan(result), indent=1, ensure_ascii=False) + '\n'
  files = {'audit.json': text, 'audit.md': to_markdown(result)}
  cli.write_files(workdir, files)
  title, values = result['subject'], result.get('values')
  if result['estimators']:
    _plot(workdir / 'audit.png', title, _PANELS, result['estimators'])
  if values:
    truth = values['sources']['truth']['explained']['value']
    panels = [
      (
        'root mean squared error\nof the value',
        _bounds('error'),
        {'line': 0.0},
      ),
      ('explained share of Var R', _margin('explained'), {'line': truth}),
    ]
    _plot(workdir / 'values.png', title, panels, values['sources'])


def to_markdown(result: dict[str, Any]) -> str:
  """Returns the numbers as tables."""
  reference = result['reference']
  lines = [
    f'{result["subject"]}: {result["prompts"]} prompts, '
    f'{result["samples"]} responses each, at most {result["max_tokens"]} '
    f'tokens, temperature {result["temperature"]:g}.  The reference is the '
    f'mean of {reference["draws"]} gradients of '
    f'{reference["spec"]["algorithm"]["name"]} '
    f'({reference["tokens"]:,.0f} tokens); its standard error is '
    f'{reference["relative_error"]:.1%} of its norm.  The prompts are the same '
    'in all draws: the noise is that of responses and branches, not of which '
    'prompts a step has.',
    '',
    *_table('estimator', _COLUMNS, result['estimators']),
    '',
    'Groups whose rewards are all equal: their share, and what they contribute',
    "to the estimator's gradient.",
    '',
    *_table('estimator', _EQUAL, result['estimators']),
  ]
  if 'values' in result:
    lines += ['', *_values_table(result['values'])]
  return '\n'.join(lines) + '\n'


def _estimate(x: dict[str, float]) -> str:
  """Formats value ± standard error, with the digits that the error allows."""
  value, error = x['value'], x['error']
  if not math.isfinite(value):
    return '—'
  if not math.isfinite(error) or error <= 0:
    return f'{value:.3g}'
  digits = max(1 - math.floor(math.log10(error)), 0)
  return f'{value:.{digits}f} ± {error:.{digits}f}'


def _cosine(x: dict[str, float]) -> str:
  """Formats a cosine, unless its error spans the whole range."""
  return _estimate(x) if x['error'] < 0.5 else '—'


def _interval(x: dict[str, float]) -> str:
  """Formats a number of at least 0 with its 95 % interval."""
  return f'{x["value"]:.3f} ({x["low"]:.3f} – {x["high"]:.3f})'


# Titles of columns, and their text from an estimator's part of the report.
_COLUMNS: list[tuple[str, _Getter]] = [
  ('tokens per gradient', lambda row: f'{row["tokens"]:,.0f}'),
  ('bias', lambda row: _interval(row['bias'])),
  ('scale', lambda row: _estimate(row['scale'])),
  ('cosine', lambda row: _estimate(row['cosine'])),
  ('bias at the best scale', lambda row: _interval(row['tilt'])),
  ('variance', lambda row: _estimate(row['variance'])),
  ('signal to noise per 1,000 tokens', lambda row: _estimate(row['signal'])),
]
_EQUAL: list[tuple[str, _Getter]] = [
  ('share of groups', lambda row: f'{row["equal_groups"]["share"]:.1%}'),
  ('progress', lambda row: _estimate(row['equal_groups']['progress'])),
  ('squared norm', lambda row: _estimate(row['equal_groups']['squared_norm'])),
  ('variance', lambda row: _estimate(row['equal_groups']['variance'])),
  ('cosine with G', lambda row: _cosine(row['equal_groups']['cosine'])),
]


def _table(
  first: str, columns: list[tuple[str, _Getter]], rows: dict[str, Any]
) -> list[str]:
  cells = [
    [first, *(title for title, _ in columns)],
    ['---', *['---:'] * len(columns)],
    *(
      [label, *(get(row) for _, get in columns)] for label, row in rows.items()
    ),
  ]
  return ['| ' + ' | '.join(row) + ' |' for row in cells]


def _values_table(values: dict[str, Any]) -> list[str]:
  doob = {name: _estimate(x) for name, x in values['doob'].items()}
  columns = [
    ('root mean squared error', lambda row: _interval(row['error'])),
    ('explains of Var R', lambda row: _estimate(row['explained'])),
  ]
  for place in values['by_place']:
    title = f'error after {place} tokens'
    columns.append((title, lambda row, at=place: f'{row[at]["value"]:.3f}'))
  rows = {
    name: row | {p: x[name]['error'] for p, x in values['by_place'].items()}
    for name, row in values['sources'].items()
  }
  return [
    f'Values of {values["states"]:,} states against '
    f'{values["branches"]} branches from each.',
    '',
    *_table('value of a state', columns, rows),
    '',
    f'Σ E A² = {doob["squares"]} and Var(R | prompt) = {doob["variance"]}: '
    f'their difference is {doob["difference"]}.',
  ]


def _bounds(name: str) -> _Getter:
  """Returns a getter of a number's value, low and high."""
  return lambda row: tuple(row[name].values())


def _margin(name: str) -> _Getter:
  """Returns a getter of an estimate's value and 95 % interval."""

  def get(row):
    x, margin = row[name]['value'], 1.96 * row[name]['error']
    return x, x - margin, x + margin

  return get


# Axis, (value, low, high), and further fields of `runs.Panel`.
_PANELS = [
  ('signal to noise\nper 1,000 tokens', _margin('signal'), {'log': True}),
  ('bias ‖E g − G‖ / ‖G‖', _bounds('bias'), {'line': 0.0}),
  ('bias at the best scale', _bounds('tilt'), {'line': 0.0}),
  (
    'progress made in groups\nof equal rewards',
    lambda row: _margin('progress')(row['equal_groups']),
    {'line': 0.0},
  ),
]


def _plot(
  path: pathlib.Path, title: str, panels: Sequence, rows: dict[str, Any]
) -> None:
  """Draws a point with its interval per row and panel."""
  drawn = [
    runs.Panel(name, {k: get(row) for k, row in rows.items()}, **more)
    for name, get, more in panels
  ]
  runs.plot_estimates(path, drawn, title=title)


def _without_nan(value: Any) -> Any:
  """Replaces NaN and infinities by None: JSON has neither."""
  if isinstance(value, dict):
    return {key: _without_nan(inner) for key, inner in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def main() -> None:
  """Audits what the flags name."""
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  values = flags.FLAGS
  cli.require(
    estimators='experiments/configs/audit_estimators.py', workdir='runs/audit'
  )
  if (values.run is None) == (values['config'].value is None):
    raise UserError(
      'name either a run with --run, or a configuration with --config and its '
      'model with --config.model.path'
    )
  if values.dimension & (values.dimension - 1):
    raise UserError(f'--dimension is {values.dimension}, not a power of two')
  specs = read_estimators(values.estimators)
  if values.run is not None:
    subject = audit_draws.of_run(
      values.run, values.step, values.prompts, values.trust_code
    )
  else:
    subject = audit_draws.of_config(cli.config(), values.prompts)
  names = 'tokens', 'reference_tokens', 'branches', 'dimension'
  settings = {name: values[name].value for name in names}
  result = audit(subject, specs, pathlib.Path(values.workdir), **settings)
  print(to_markdown(result))


if __name__ == '__main__':
  flags.DEFINE_string('run', None, 'Folder of a run.')
  flags.DEFINE_string('step', 'newest', "Of the run: 'newest', 'best', number.")
  flags.DEFINE_string('estimators', None, 'File with get_estimators().')
  flags.DEFINE_string('workdir', None, 'Folder of the report.')
  flags.DEFINE_integer('prompts', 32, 'Training prompts, the same for all.', 2)
  flags.DEFINE_integer('tokens', 300_000, 'Generated, of each estimator.', 1)
  flags.DEFINE_integer(
    'reference_tokens', 2_000_000, 'Generated, of the reference.', 1
  )
  flags.DEFINE_integer('branches', 256, 'For the true value of a state.', 0)
  flags.DEFINE_integer('dimension', 2**14, 'Numbers kept of a gradient.', 1)
  cli.define_trust_flag()
  cli.define_config_flag()
  cli.run(main)
