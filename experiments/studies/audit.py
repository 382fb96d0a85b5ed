"""Bias, variance and signal per generated token of estimators on a real model.

    python -m experiments.studies.audit --run=runs/quickstart \\
      --estimators=experiments/configs/audit_estimators.py \\
      --workdir=runs/quickstart_audit
    python -m experiments.studies.audit --config=FILE.py …

The model and the task are those of a run, or of a configuration that names a
model.  Every estimator's gradient is drawn again and again, on the same fixed
prompts, through the code that trains, until it has cost --tokens generated
tokens; it is compared with the mean of a large sample of RLOO's.  The prompts
being fixed, the noise is that of responses and branches alone.

Values of states inside responses are compared with the mean return of very many
branches: those of few branches, of the prompt's other responses, of a critic.

  audit.json, audit.md, audit.png, values.png
  draws/            sketches of the gradients; what is there is not drawn again

--estimators names a file whose get_estimators() gives {label: dict(algorithm=…,
rollout=…)}: an algorithm as configurations have it, and what differs in the
sampling.  The label 'reference' replaces RLOO; it has to be unbiased.

The files of --config and --estimators are executed.  Functions that a run's
configuration names as file.py:function or module:function are executed with
--trust_code alone: read them first.
"""

import pathlib
import time
from typing import Any

import jax
from absl import flags

from experiments import cli
from experiments.studies import audit_draws, audit_report, audit_values
from jaxrl_llm import naming
from jaxrl_llm.errors import UserError

_REFERENCE = 'reference'


def read_estimators(path: str) -> dict[str, dict[str, Any]]:
  """What `get_estimators()` of a file gives, checked.

  Raises:
    UserError: no such file or function, or something else than a dictionary
      from labels to algorithms.
  """
  field = '--estimators'
  found = naming.find((), f'{path}:get_estimators', field)()
  if not isinstance(found, dict) or not found:
    raise UserError(
      f'{field}: get_estimators() of {path} gives no dictionary\n'
      "return {'label': dict(algorithm=dict(name='rloo'))}"
    )
  for label, spec in found.items():
    known = isinstance(spec, dict) and set(spec) <= {'algorithm', 'rollout'}
    if not known or not isinstance(spec.get('algorithm'), dict):
      raise UserError(
        f'{field}: {label!r} of {path} is {spec!r}\n'
        "write dict(algorithm=dict(name='rloo'), rollout=dict(samples=8)); "
        'rollout may be left out'
      )
  files = [audit_draws.file_name(label) for label in found]
  if len(set(files)) < len(files):
    raise UserError(
      f'{field}: labels differ in punctuation only: {list(found)}'
    )
  return found


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
    tokens: budget of generated tokens of each estimator.
    reference_tokens: of the reference.
    branches: from each state, for its true value; 0 leaves values out.
    dimension: numbers kept of each gradient.

  Returns:
    What audit.json holds.
  """
  specs = dict(specs)
  reference_spec = specs.pop(_REFERENCE, dict(algorithm=dict(name='rloo')))
  # What is wrong with one is said before hours go into the others.
  configs = {
    label: audit_draws.variant(subject, label, spec)
    for label, spec in {_REFERENCE: reference_spec, **specs}.items()
  }
  result = audit_report.begin(subject, reference_spec)

  def drawn(label: str, budget: int) -> audit_draws.Draws:
    start = time.perf_counter()
    draws, stored = audit_draws.load_or_draw(
      subject, configs[label], label, workdir / 'draws', budget, dimension
    )
    seconds = time.perf_counter() - start
    how = 'stored' if stored else f'{seconds:.0f} s'
    total, count = draws.whole.tokens.sum(), len(draws.whole.tokens)
    print(f'{label}: {total:,.0f} tokens, {count} gradients, {how}', flush=True)
    return draws

  reference = drawn(_REFERENCE, reference_tokens)
  audit_report.add_reference(result, reference)
  for label, spec in specs.items():
    draws = drawn(label, tokens)
    audit_report.add_estimator(result, label, spec, draws, reference)
    audit_report.write(workdir, result)
  if branches:
    start = time.perf_counter()
    values = audit_values.measure(subject, configs[_REFERENCE], branches)
    result['values'] = audit_values.report(values)
    print(f'values: {time.perf_counter() - start:.0f} s', flush=True)
  audit_report.write(workdir, result)
  return result


def define_flags() -> None:
  """Defines the flags of this script."""
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


def main() -> None:
  """Audits what the flags name."""
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  values = flags.FLAGS
  examples = {
    'estimators': 'experiments/configs/audit_estimators.py',
    'workdir': 'runs/audit',
  }
  for name, example in examples.items():
    if values[name].value is None:
      raise UserError(f'--{name} is missing\nfor example --{name}={example}')
  if (values.run is None) == (values['config'].value is None):
    raise UserError(
      'name either a run with --run, or a configuration with --config and its '
      'model with --config.model.path'
    )
  if values.dimension & (values.dimension - 1):
    raise UserError(f'--dimension is {values.dimension}, no power of two')
  specs = read_estimators(values.estimators)
  if values.run is not None:
    subject = audit_draws.of_run(
      values.run, values.step, values.prompts, values.trust_code
    )
  else:
    subject = audit_draws.of_config(cli.config(), values.prompts)
  workdir = pathlib.Path(values.workdir)
  result = audit(
    subject,
    specs,
    workdir,
    tokens=values.tokens,
    reference_tokens=values.reference_tokens,
    branches=values.branches,
    dimension=values.dimension,
  )
  print(audit_report.to_markdown(result))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
