"""Computes a step of a run again, alone, and compares it with its record.

    python -m experiments.replay --workdir=RUN --step=N [--output=FOLDER]

The newest checkpoint before the step that verifies is taken, or the run's
beginning if there is none; from there the run goes on to the step, and neither
evaluates nor saves.  Then every number that the step computed is compared with
what `metrics.jsonl` has, bit for bit: status 0 if all are equal, else 1.  In
the run's folder nothing is written, and the run may go on meanwhile.

With --output what one needs to find out what is wrong with the step:

  record.json       the numbers, as recorded and as computed now
  parameters.jsonl  norm of each parameter before it, and of its change
  batch.npz         prompts, responses, rewards, advantages
  samples.jsonl     the same as text, every response
  samples.html      the same as a page

A step that samples nothing (a warm start's, or one that learns from what is
given) leaves the first two.

Functions that the run's configuration names as file.py:function or
module:function are executed with --trust_code alone: read them first.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import (
  build,
  checks,
  cli,
  preference,
  rest_em,
  reward_model,
  sft,
  stored_runs,
  train,
)
from experiments.loop import Run
from experiments.schedule import Result, Script
from experiments.validation import failure_messages, to_samples
from jaxrl_llm import runs, sharding
from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import folder as run_folder
from jaxrl_llm.runs.digests import named_leaves
from jaxrl_llm.runs.records import number

_SCRIPTS = {
  'train': train.SCRIPT,
  'sft': sft.SCRIPT,
  'preference': preference.SCRIPT,
  'rest_em': rest_em.SCRIPT,
  'reward_model': reward_model.SCRIPT,
}
# A checkpoint, and the old content of one that is being saved anew.
_STEP = re.compile(r'(\d{8,})(\.replaced)?')
# Differences that are shown.
_SHOWN = 5


def script(config) -> Script:
  """What trained, told from the algorithm."""
  return _SCRIPTS[checks.script(config.algorithm.get('name'))]


def replay(workdir, step: int, output=None, trust_code: bool = False) -> int:
  """Computes a step again, says what came of it, and writes it down.

  Args:
    workdir: the run's folder, in which nothing is changed.
    step: of the run, from 1, warm start included.
    output: folder for what the step was made of; None writes nothing.
    trust_code: execute functions of a user's that its configuration names.

  Returns:
    The exit status: 0 if the step is what the record says, else 1.

  Raises:
    UserError: no run, no such step, or code that is not the run's or not
      trusted.
  """
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  workdir = pathlib.Path(workdir)
  config = stored_runs.read_config(workdir, () if trust_code else build.CODE)
  if output:
    output = pathlib.Path(output)
    _make_output(output)
  recorded = _recorded(workdir, step)
  _check_code(workdir)
  made_by = script(config)
  made_by.check(config)
  with contextlib.ExitStack() as files:
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    if mesh.size > 1:
      files.enter_context(jax.set_mesh(mesh))
    folder = files.enter_context(_before(workdir, step))
    run = Run(config, folder, None, files, made_by.phase, silent=True)
    start = run.schedule.step
    origin = f'checkpoint {start}' if start else 'the beginning'
    print(f'{workdir}: step {step}, {step - start} from {origin}', flush=True)
    while run.schedule.step < step - 1:
      run.advance()
    before = _host(run.state.trainable) if output else None
    result = run.advance()
    for line in failure_messages(result.failures, f'at step {step}', set()):
      print(line)
    found = result.metrics | {'num_tokens': run.schedule.tokens}
    found = {name: number(value, name) for name, value in found.items()}
    different = _compare(workdir, recorded, found)
    if output:
      changes = _changes(before, _host(run.state.trainable))
      numbers = {'step': step, 'recorded': recorded, 'now': found}
      _write(output, numbers, changes, result)
  return 1 if different else 0


def _make_output(output: pathlib.Path) -> None:
  """Makes the folder, before a computation that may take long."""
  try:
    inside = [output, *output.absolute().parents]
    held = [path for path in inside if (path / 'metrics.jsonl').exists()]
    if held:
      raise UserError(
        f'--output {output} is in the folder of a run, whose samples it would '
        'replace\nname a folder outside of it'
      )
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / 'record.json', '{}\n')
  except OSError as error:
    raise _cannot_write(output, error) from error


def _cannot_write(output: pathlib.Path, error: OSError) -> UserError:
  return UserError(
    f'--output {output} cannot be written: {error.strerror}\n'
    'name another folder, or make room'
  )


def _recorded(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """What metrics.jsonl has of a step, evaluations left out."""
  path = workdir / 'metrics.jsonl'
  try:
    records = runs.read_records(path)
  except FileNotFoundError:
    records = []
  for record in records:
    if record['step'] == step:
      return {
        name: value
        for name, value in record.items()
        if name != 'step' and not name.startswith('eval/')
      }
  known = 'none yet'
  if records:
    known = f'those of {records[0]["step"]} to {records[-1]["step"]}'
  raise UserError(
    f'{path} has no record of step {step}\nit has {known}: name one that the '
    'run has done'
  )


def _check_code(workdir: pathlib.Path) -> None:
  """Raises UserError if files of the user's are not those that the run had."""
  for file, digest in _environment(workdir).get('code_sha256', {}).items():
    path = pathlib.Path(file)
    if not path.is_file():
      now = 'missing'
    elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
      now = 'changed'
    else:
      continue
    raise UserError(
      f'{path.absolute()} is {now} since the run last began\n'
      'put the old file back: a step can be replayed by its own code alone'
    )


def _environment(workdir: pathlib.Path) -> dict[str, Any]:
  """What ran the run last; empty where that is not known."""
  try:
    return json.loads((workdir / 'env.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}


@contextlib.contextmanager
def _before(workdir: pathlib.Path, step: int) -> Iterator[run_folder.RunFolder]:
  """The run as it was before a step, in a folder that may be written to.

  Its folders are new and its files are links, which whoever writes replaces:
  of the run's own nothing is changed.  What the run removes meanwhile is as a
  checkpoint that does not verify.
  """
  with tempfile.TemporaryDirectory(prefix='jaxrl_llm_replay_') as name:
    view = pathlib.Path(name)
    for source in (workdir / 'checkpoints').glob('*'):
      match = _STEP.fullmatch(source.name)
      if match and int(match[1]) < step:
        _link(source, view / 'checkpoints' / source.name)
    for part in ('reference', 'rounds'):
      _link(workdir / part, view / part)
    try:
      yield run_folder.RunFolder(view, True, [], None)
    except UserError as error:
      raise UserError(str(error).replace(name, str(workdir))) from error


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Makes folders like those of a tree, with links to its files."""
  with contextlib.suppress(OSError):  # It is not there, or not any longer.
    shutil.copytree(source.resolve(), target, copy_function=os.symlink)


def _compare(workdir, recorded: dict, found: dict) -> list[str]:
  """Says whether a step was computed as recorded; names what differs."""
  names = dict.fromkeys([*recorded, *found])
  shown = lambda values, name: json.dumps(values.get(name, 'absent'))
  different = [
    f'{name}: {shown(recorded, name)} recorded, {shown(found, name)} now'
    for name in names
    if shown(recorded, name) != shown(found, name)
  ]
  if not different:
    print(f'identical: {len(names)} metrics')
    return different
  print(f'{len(different)} of {len(names)} metrics differ')
  print('\n'.join(different[:_SHOWN]))
  then, now = _environment(workdir), run_folder.environment()
  for name in ('versions', 'machine', 'backend', 'device_kind', 'device_count'):
    if name in then and then[name] != now[name]:
      print(f'{name}: {then[name]} in env.json, {now[name]} now')
  return different


def _host(tree: Any) -> dict[str, np.ndarray]:
  """Copies of arrays by name; the next step takes the devices' memory."""
  return {
    name: np.array(leaf)
    for name, leaf in named_leaves(sharding.to_host(tree)).items()
  }


def _changes(before: dict, after: dict) -> Iterator[dict[str, Any]]:
  """A record for each parameter: its norm before a step, and its change's.

  Of one that is stacked over layers also those of each layer, from the first.
  One that the step has made, as the first of RL makes a critic, has no change.
  """
  for name, now in after.items():
    old = before.get(name)
    parts = {'norm': now if old is None else old}
    if old is not None:
      parts['change'] = now.astype(np.float64) - old
    record = {'name': name, 'shape': list(now.shape)}
    for part, values in parts.items():
      record[part] = number(np.linalg.norm(values), name)
      if '/layers/' in name:
        flat = values.reshape(len(values), -1)
        each = np.linalg.norm(flat, axis=1)
        record[f'{part}_by_layer'] = [number(value, name) for value in each]
    yield record


def _write(
  output: pathlib.Path, numbers: dict, changes: Iterator[dict], result: Result
) -> None:
  """Writes what a step was made of; see the head of this file."""
  written = ['record.json', 'parameters.jsonl']
  try:
    text = json.dumps(numbers, indent=2) + '\n'
    write_atomically(output / written[0], text)
    text = ''.join(json.dumps(each) + '\n' for each in changes)
    write_atomically(output / written[1], text)
    if result.responses is not None:
      step = numbers['step']
      stored_runs.write_batch(
        output / 'batch.npz', result.responses, result.advantages
      )
      with runs.SampleLog(output) as log:
        log.write(to_samples(result.responses, step, result.advantages))
        log.write_html(f'Step {step}')
      written += ['batch.npz', 'samples.jsonl', 'samples.html']
  except OSError as error:
    raise _cannot_write(output, error) from error
  print(f'{output}: {", ".join(written)}')


def define_flags() -> None:
  """Defines the flags of this script."""
  flags.DEFINE_string('workdir', None, 'Folder of a run.')
  flags.DEFINE_integer('step', None, 'Of the run, from 1.')
  flags.DEFINE_string('output', None, 'Folder for what the step was made of.')
  cli.define_trust_flag()


def main() -> int:
  """Replays what the flags name."""
  values = flags.FLAGS
  for name in ('workdir', 'step'):
    if values[name].value is None:
      raise UserError(
        f'--{name} is missing\nfor example --workdir=runs/quickstart --step=120'
      )
  return replay(values.workdir, values.step, values.output, values.trust_code)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
