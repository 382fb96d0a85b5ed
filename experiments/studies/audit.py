"""Bias, variance and signal per generated token of estimators on a real model.

    python -m experiments.studies.audit --run=runs/quickstart \\
      --estimators=experiments/configs/audit_estimators.py \\
      --workdir=runs/quickstart_audit
    python -m experiments.studies.audit --config=FILE.py …

The model and the task are those of a run, or of a configuration that names a
model.  Every estimator's gradient is drawn repeatedly, on the same fixed
prompts, through the code that trains, until it has cost --tokens generated
tokens; it is compared with the mean of a large sample of RLOO's.  The prompts
are fixed: the noise is that of responses and branches alone.  What the choice
of prompts adds is measured with the reference on others.

Values of states inside responses (means of few branches, means of the prompt's
other responses, a critic's) are compared with the mean return of many branches,
which also show what trees can gain.

  audit.json, audit.md, audit.png, values.png
  draws/            sketches of the gradients, used again by the next audit

--estimators names a file whose get_estimators() returns {label:
dict(algorithm=…, rollout=…, free=…)}: an algorithm as in configurations,
changes of the sampling, and whether the tokens of branches are not counted.
The label 'reference' replaces RLOO; it has to be unbiased.

The files of --config and --estimators are executed.  Functions that a run's
configuration names as file.py:function or module:function are executed with
--trust_code alone: read them first.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments import cli
from experiments.studies import audit_draws, audit_trees, audit_values
from jaxrl_llm import audit as gradients
from jaxrl_llm import naming, runs
from jaxrl_llm.atomic import as_json
from jaxrl_llm.errors import UserError

_REFERENCE = 'reference'


def read_estimators(path: str) -> dict[str, dict[str, Any]]:
  """Returns the result of a file's `get_estimators()`.

  Raises:
    UserError: no such file or function, or it does not return a dictionary.
  """
  specs = naming.find((), f'{path}:get_estimators', '--estimators')()
  if not isinstance(specs, dict) or not specs:
    raise UserError(
      f'--estimators: get_estimators() of {path} returns {specs!r}\n'
      "return {'label': dict(algorithm=dict(name='rloo'))}"
    )
  return specs


def audit(
  subject: audit_draws.Subject,
  specs: dict[str, dict[str, Any]],
  workdir: pathlib.Path,
  *,
  tokens: int,
  reference_tokens: int,
  branches: int,
) -> dict[str, Any]:
  """Measures estimators and values; writes the report after each of them.

  Args:
    subject: the model, its task and the prompts.
    specs: label → algorithm and changes of the sampling.
    workdir: folder of the report and of the draws.
    tokens, reference_tokens: budgets of generated tokens, of each estimator and
      of the reference.
    branches: from each state, for its true value; 0 leaves values out.

  Returns:
    The content of audit.json.
  """
  specs = {_REFERENCE: dict(algorithm=dict(name='rloo'))} | specs
  # All are checked before hours go into one of them.
  configs = {
    label: audit_draws.variant(subject, label, spec)
    for label, spec in specs.items()
  }

  def draw(label: str, budget: int) -> audit_draws.Draws:
    free = specs.get(label, {}).get('free', False)
    return audit_draws.load_or_draw(
      subject, configs[label], label, workdir / 'draws', budget, free
    )

  rollout = subject.config.rollout
  reference = draw(_REFERENCE, reference_tokens)
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
    draws = draw(label, tokens)
    result['estimators'][label] = {
      'samples': configs[label].rollout.samples,
      'spec': as_json(spec, f'algorithm of {label}'),
      **_numbers(draws, reference),
    }
    write(workdir, result)
  if branches:
    config = configs[_REFERENCE]
    values = audit_values.measure(subject, config, branches)
    result['values'] = audit_values.report(values)
    result['trees'] = audit_trees.measure(subject, config, branches)
    fresh = audit_draws.load_or_draw(
      subject._replace(rows=subject.pool),
      config,
      'other prompts',
      workdir / 'draws',
      reference_tokens,
    )
    between = gradients.between_prompts(
      fresh.whole, reference.whole, len(subject.rows)
    )
    audit_trees.over_prompts(result, between)
  write(workdir, result)
  return result


def _numbers(draws, reference) -> dict[str, Any]:
  """Returns the numbers of an estimator, of draws and the reference's."""
  report = gradients.compare(draws.whole, reference.whole)
  equal = gradients.share(draws.equal, draws.whole, reference.whole)
  share = float(draws.equal_groups.mean())
  return {
    'bias': audit_values.interval_of_root(report.squared_bias),
    'tilt': audit_values.interval_of_root(report.squared_tilt),
    **audit_values.to_json(report),
    'equal_groups': {'share': share, **audit_values.to_json(equal)},
  }


def write(workdir: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes audit.json, audit.md and the figures.

  Raises:
    UserError: the folder cannot be written.
  """
  # JSON has neither NaN nor infinities.
  numbers = json.loads(json.dumps(result), parse_constant=lambda name: None)
  text = json.dumps(numbers, indent=1, ensure_ascii=False) + '\n'
  files = {'audit.json': text, 'audit.md': to_markdown(result)}
  cli.write_files(workdir, files)
  if result['estimators']:
    rows = {
      label: row | {'progress': row['equal_groups']['progress']}
      for label, row in result['estimators'].items()
    }
    _plot(workdir / 'audit.png', result['subject'], _PANELS, rows)
  if 'values' in result:
    rows = result['values']['sources']
    truth = rows['truth']['explained']['value']
    panels = [
      ('root mean squared error\nof the value', 'error', False, 0.0),
      ('explained share of Var R', 'explained', False, truth),
    ]
    _plot(workdir / 'values.png', result['subject'], panels, rows)


def to_markdown(result: dict[str, Any]) -> str:
  """Returns the numbers as tables."""
  reference, rows = result['reference'], result['estimators']
  equal = {label: row['equal_groups'] for label, row in rows.items()}
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
    *_table('estimator', _COLUMNS, rows),
    '',
    'Groups whose rewards are all equal: their share, and what they contribute',
    "to the estimator's gradient.",
    '',
    *_table('estimator', _EQUAL, equal),
  ]
  if 'values' not in result:
    return '\n'.join(lines) + '\n'
  values = result['values']
  by_position = values['by_place']
  columns = [
    ('root mean squared error', 'error', _text),
    ('explains of Var R', 'explained', _text),
    *((f'error after {n} tokens', n, '{:.3f}'.format) for n in by_position),
  ]
  rows = {
    name: row | {n: x[name]['error']['value'] for n, x in by_position.items()}
    for name, row in values['sources'].items()
  }
  doob = {name: _text(x) for name, x in values['doob'].items()}
  lines += [
    '',
    f'Values of {values["states"]:,} states against '
    f'{values["branches"]} branches from each.',
    '',
    *_table('value of a state', columns, rows),
    '',
    f'Σ E A² = {doob["squares"]} and Var(R | prompt) = {doob["variance"]}: '
    f'their difference is {doob["difference"]}.',
    '',
    *audit_trees.to_markdown(result['trees']),
    '',
    *_table('estimator', _OVERALL, result['estimators']),
  ]
  return '\n'.join(lines) + '\n'


def _text(x: dict[str, float]) -> str:
  """Formats a number with its 95 % interval or its standard error."""
  value = x['value']
  if 'low' in x:
    return f'{value:.3f} ({x["low"]:.3f} – {x["high"]:.3f})'
  if not math.isfinite(value):
    return '—'
  if not 0 < x['error'] < math.inf:
    return f'{value:.3g}'
  # The digits that the error allows.
  digits = max(1 - math.floor(math.log10(x['error'])), 0)
  return f'{value:.{digits}f} ± {x["error"]:.{digits}f}'


# Titles of columns, the number's name in a part of the report, its format.
_COLUMNS = [
  ('tokens per gradient', 'tokens', '{:,.0f}'.format),
  ('bias', 'bias', _text),
  ('scale', 'scale', _text),
  ('cosine', 'cosine', _text),
  ('bias at the best scale', 'tilt', _text),
  ('variance', 'variance', _text),
  ('signal to noise per 1,000 tokens', 'signal', _text),
]
_EQUAL = [
  ('share of groups', 'share', '{:.1%}'.format),
  ('progress', 'progress', _text),
  ('squared norm', 'squared_norm', _text),
  ('variance', 'variance', _text),
  # Not where its error spans the whole range.
  ('cosine with G', 'cosine', lambda x: _text(x) if x['error'] < 0.5 else '—'),
]
_OVERALL = [
  ('variance within a prompt', 'within', '{:.3g}'.format),
  ('signal to noise, prompts drawn too', 'overall', '{:.4f}'.format),
]
# Axis, the number's name, whether the axis is logarithmic, a reference value.
_PANELS = [
  ('signal to noise\nper 1,000 tokens', 'signal', True, None),
  ('bias ‖E g − G‖ / ‖G‖', 'bias', False, 0.0),
  ('bias at the best scale', 'tilt', False, 0.0),
  ('progress made in groups\nof equal rewards', 'progress', False, 0.0),
]


def _table(first: str, columns: Sequence, rows: dict[str, Any]) -> list[str]:
  """Returns the lines of a Markdown table."""
  cells = [[first, *(title for title, _, _ in columns)]]
  cells += [['---', *['---:'] * len(columns)]]
  for label, row in rows.items():
    cells.append([label, *(text(row[name]) for _, name, text in columns)])
  return ['| ' + ' | '.join(line) + ' |' for line in cells]


def _plot(
  path: pathlib.Path, title: str, panels: Sequence, rows: dict[str, Any]
) -> None:
  """Draws a point with its 95 % interval per row and panel."""

  def point(x: dict[str, float]) -> tuple[float, float, float]:
    value, margin = x['value'], 1.96 * x.get('error', 0.0)
    return value, x.get('low', value - margin), x.get('high', value + margin)

  drawn = [
    runs.Panel(axis, {k: point(row[name]) for k, row in rows.items()}, *more)
    for axis, name, *more in panels
  ]
  runs.plot_estimates(path, drawn, title=title)


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
  specs = read_estimators(values.estimators)
  if values.run is not None:
    subject = audit_draws.of_run(
      values.run, values.step, values.prompts, values.trust_code
    )
  else:
    subject = audit_draws.of_config(cli.config(), values.prompts)
  result = audit(
    subject,
    specs,
    pathlib.Path(values.workdir),
    tokens=values.tokens,
    reference_tokens=values.reference_tokens,
    branches=values.branches,
  )
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
  cli.define_trust_flag()
  cli.define_config_flag()
  cli.run(main)
