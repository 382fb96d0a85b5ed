"""What an audit came to: JSON, a table and two figures."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.studies import audit_draws
from jaxrl_llm import audit, runs
from jaxrl_llm.atomic import as_json, write_atomically
from jaxrl_llm.errors import UserError

_PER_TOKENS = 'signal to noise\nper 1,000 tokens'


def begin(
  subject: audit_draws.Subject, reference: dict[str, Any]
) -> dict[str, Any]:
  """What is the same for all estimators."""
  rollout = subject.config.rollout
  return {
    'subject': subject.title,
    'prompts': len(subject.rows),
    'samples': rollout.samples,
    'max_tokens': rollout.max_tokens,
    'temperature': float(rollout.temperature),
    'reference': {'spec': as_json(reference, 'reference')},
    'estimators': {},
  }


def add_reference(result: dict[str, Any], draws: audit_draws.Draws) -> None:
  """Adds the reference's size and its own standard error."""
  result['reference'] |= {
    'draws': len(draws.whole.tokens),
    'tokens': float(draws.whole.tokens.sum()),
    'relative_error': audit.relative_error(draws.whole),
    'equal_groups': float(draws.equal_groups.mean()),
  }


def add_estimator(
  result: dict[str, Any],
  label: str,
  spec: dict[str, Any],
  draws: audit_draws.Draws,
  reference: audit_draws.Draws,
) -> None:
  """Adds an estimator's row."""
  report = audit.compare(draws.whole, reference.whole)
  part = audit.share(draws.equal, draws.whole, reference.whole)
  numbers = {
    name: value._asdict() if isinstance(value, audit.Estimate) else value
    for name, value in report._asdict().items()
  }
  result['estimators'][label] = {
    'samples': spec.get('rollout', {}).get('samples', result['samples']),
    'spec': as_json(spec, f'algorithm of {label}'),
    'bias': interval_of_root(report.squared_bias),
    'tilt': interval_of_root(report.squared_tilt),
    **numbers,
    'equal_groups': {
      'share': float(draws.equal_groups.mean()),
      **{name: value._asdict() for name, value in part._asdict().items()},
    },
  }


def interval_of_root(square: audit.Estimate) -> dict[str, float]:
  """`audit.root` as JSON values."""
  names = ('value', 'low', 'high')
  return dict(zip(names, audit.root(square), strict=True))


def write(workdir: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes audit.json, audit.md and the figures.

  Raises:
    UserError: the folder cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(result), indent=1, ensure_ascii=False)
    write_atomically(workdir / 'audit.json', text + '\n')
    write_atomically(workdir / 'audit.md', to_markdown(result))
  except OSError as error:
    raise UserError(f'{workdir} cannot be written: {error.strerror}') from error
  if result['estimators']:
    _plot_estimators(workdir / 'audit.png', result)
  if 'values' in result:
    _plot_values(workdir / 'values.png', result)


def to_markdown(result: dict[str, Any]) -> str:
  """The numbers as tables."""
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
    *_table(_COLUMNS, result['estimators']),
    '',
    'Groups whose rewards are all equal: their share, and what they contribute',
    "to the estimator's gradient.",
    '',
    *_table(_EQUAL, result['estimators']),
  ]
  if 'values' in result:
    lines += ['', *_values_table(result['values'])]
  return '\n'.join(lines) + '\n'


def _estimate(x: dict[str, float]) -> str:
  """Value ± standard error, as far as the error lets one see."""
  value, error = x['value'], x['error']
  if not math.isfinite(value):
    return '—'
  if not math.isfinite(error) or error <= 0:
    return f'{value:.3g}'
  digits = max(1 - math.floor(math.log10(error)), 0)
  return f'{value:.{digits}f} ± {error:.{digits}f}'


def _cosine(x: dict[str, float]) -> str:
  """A cosine, unless all that is known of it is that it is one."""
  return _estimate(x) if x['error'] < 0.5 else '—'


def _interval(x: dict[str, float]) -> str:
  """A number of at least 0 and its 95 % interval."""
  return f'{x["value"]:.3f} ({x["low"]:.3f} – {x["high"]:.3f})'


# Title of the column, and its text from an estimator's row.
_Column = tuple[str, Callable[[dict[str, Any]], str]]
_COLUMNS: list[_Column] = [
  ('tokens per gradient', lambda row: f'{row["tokens"]:,.0f}'),
  ('bias', lambda row: _interval(row['bias'])),
  ('scale', lambda row: _estimate(row['scale'])),
  ('cosine', lambda row: _estimate(row['cosine'])),
  ('bias at the best scale', lambda row: _interval(row['tilt'])),
  ('variance', lambda row: _estimate(row['variance'])),
  ('signal to noise per 1,000 tokens', lambda row: _estimate(row['signal'])),
]
_EQUAL: list[_Column] = [
  ('share of groups', lambda row: f'{row["equal_groups"]["share"]:.1%}'),
  *(
    (title, lambda row, name=name: _estimate(row['equal_groups'][name]))
    for title, name in (
      ('progress', 'progress'),
      ('squared norm', 'squared_norm'),
      ('variance', 'variance'),
    )
  ),
  ('cosine with G', lambda row: _cosine(row['equal_groups']['cosine'])),
]


def _table(columns: list[_Column], rows: dict[str, Any]) -> list[str]:
  titles = ['estimator', *(title for title, _ in columns)]
  found = [titles, ['---', *['---:'] * len(columns)]]
  found += [
    [label, *(f(row) for _, f in columns)] for label, row in rows.items()
  ]
  return ['| ' + ' | '.join(cells) + ' |' for cells in found]


def _values_table(values: dict[str, Any]) -> list[str]:
  places = list(values['by_place'])
  doob = {name: _estimate(x) for name, x in values['doob'].items()}
  columns = [
    ('root mean squared error', lambda row: _interval(row['all']['error'])),
    ('explains of Var R', lambda row: _estimate(row['all']['explained'])),
    *(
      (
        f'error after {place} tokens',
        lambda row, place=place: f'{row[place]["error"]["value"]:.3f}',
      )
      for place in places
    ),
  ]
  rows = {
    name: {'all': row} | {p: values['by_place'][p][name] for p in places}
    for name, row in values['sources'].items()
  }
  table = _table(columns, rows)
  table[0] = table[0].replace('estimator', 'value of a state', 1)
  return [
    f'Values of {values["states"]:,} states against '
    f'{values["branches"]} branches from each.',
    '',
    *table,
    '',
    f'Σ E A² = {doob["squares"]} and Var(R | prompt) = {doob["variance"]}: '
    f'their difference is {doob["difference"]}.',
  ]


def _plot_estimators(path: pathlib.Path, result: dict[str, Any]) -> None:
  rows = result['estimators']
  every = lambda f: {label: f(row) for label, row in rows.items()}
  panels = [
    runs.Panel(_PER_TOKENS, every(lambda row: _range(row['signal'])), log=True),
    runs.Panel(
      'bias ‖E g − G‖ / ‖G‖',
      every(lambda row: tuple(row['bias'].values())),
      line=0.0,
    ),
    runs.Panel(
      'bias at the best scale',
      every(lambda row: tuple(row['tilt'].values())),
      line=0.0,
    ),
    runs.Panel(
      'progress made in groups\nof equal rewards',
      every(lambda row: _range(row['equal_groups']['progress'])),
      line=0.0,
    ),
  ]
  runs.plot_estimates(path, panels, title=result['subject'])


def _plot_values(path: pathlib.Path, result: dict[str, Any]) -> None:
  sources = result['values']['sources']
  every = lambda f: {name: f(row) for name, row in sources.items()}
  panels = [
    runs.Panel(
      'root mean squared error\nof the value',
      every(lambda row: tuple(row['error'].values())),
      line=0.0,
    ),
    runs.Panel(
      'explained share of Var R',
      every(lambda row: _range(row['explained'])),
      line=sources['truth']['explained']['value'],
    ),
  ]
  runs.plot_estimates(path, panels, title=result['subject'])


def _range(x: dict[str, float]) -> tuple[float, float, float]:
  """(value, low, high) of a 95 % interval."""
  margin = 1.96 * x['error']
  return x['value'], x['value'] - margin, x['value'] + margin


def _without_nan(value: Any) -> Any:
  """JSON has no NaN: null."""
  if isinstance(value, dict):
    return {key: _without_nan(inner) for key, inner in value.items()}
  if isinstance(value, float | np.floating) and not math.isfinite(value):
    return None
  return value
