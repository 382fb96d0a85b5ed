"""Computes a step of a run again, alone, and compares it with its record.

    python -m experiments.replay --workdir=RUN --step=N [--output=FOLDER]

The replay starts from the newest checkpoint before the step that verifies, or
from the run's beginning, and advances to the step without evaluating or saving.
Then every number that the step computed is compared with `metrics.jsonl`, bit
for bit: status 0 if all are equal, else 1.  Nothing is written in the run's
folder, and the run may continue meanwhile.

--output receives what one needs to debug the step:

  record.json       the numbers, as recorded and as computed now
  parameters.jsonl  norm of each parameter before it, and of its change
  batch.npz         prompts, responses, rewards, advantages
  samples.jsonl     the same as text, every response
  samples.html      the same as a page

A step that samples nothing (a warm start's, or one that learns from given data)
leaves the first two.

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
from experiments.schedule import (
  Result,
  Script,
  failure_messages,
  to_samples,
)
from jaxrl_llm import runs, sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import folder as run_folder
from jaxrl_llm.runs.digests import named_leaves
from jaxrl_llm.runs.metrics import number

_SCRIPTS = {
  'train': train.SCRIPT,
  'sft': sft.SCRIPT,
  'preference': preference.SCRIPT,
  'rest_em': rest_em.SCRIPT,
  'reward_model': reward_model.SCRIPT,
}
# The folder of a checkpoint.
_STEP = re.compile(r'\d{8,}')
# Differences to print.
_SHOWN = 5


def script(config) -> Script:
  """Returns the script that trains by a configuration's algorithm."""
  return _SCRIPTS[checks.script(config.algorithm.get('name'))]


def replay(workdir, step: int, output=None, trust_code: bool = False) -> int:
  """Computes a step again, compares it, and writes its ingredients.

  Args:
    workdir: the run's folder, in which nothing is changed.
    step: of the run, from 1, warm start included.
    output: folder for the step's ingredients; None writes nothing.
    trust_code: execute the user functions that its configuration names.

  Returns:
    The exit status: 0 if the step agrees with the record, else 1.

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
    computed = result.metrics | {'num_tokens': run.schedule.tokens}
    computed = {name: number(x, name) for name, x in computed.items()}
    same = _compare(workdir, recorded, computed)
    if output:
      changes = _changes(before, _host(run.state.trainable))
      numbers = {'step': step, 'recorded': recorded, 'now': computed}
      _write(output, numbers, changes, result)
  return 0 if same else 1


def _make_output(output: pathlib.Path) -> None:
  """Makes the folder before a computation that may take long."""
  for path in (output, *output.absolute().parents):
    if (path / 'metrics.jsonl').exists():
      raise UserError(
        f'--output {output} is in the folder of a run, whose samples it would '
        'replace\nname a folder outside of it'
      )
  cli.write_output(output / 'record.json', '{}\n')


def _recorded(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """Returns a step's record in metrics.jsonl, without evaluations."""
  path, records = workdir / 'metrics.jsonl', []
  with contextlib.suppress(FileNotFoundError):
    records = runs.read_records(path)
  for record in records:
    if record['step'] == step:
      names = [n for n in record if n != 'step' and not n.startswith('eval/')]
      return {name: record[name] for name in names}
  known = 'none yet'
  if records:
    known = f'those of {records[0]["step"]} to {records[-1]["step"]}'
  raise UserError(
    f'{path} has no record of step {step}\nit has {known}: name one that the '
    'run has done'
  )


def _check_code(workdir: pathlib.Path) -> None:
  """Raises UserError if the user's files changed since the run last began."""
  for file, digest in _environment(workdir).get('code_sha256', {}).items():
    path = pathlib.Path(file)
    code = path.read_bytes() if path.is_file() else None
    if code is None or hashlib.sha256(code).hexdigest() != digest:
      raise UserError(
        f'{path.absolute()} is {"missing" if code is None else "changed"} since'
        ' the run last began\nput the old file back: a step can be replayed by '
        'its own code alone'
      )


def _environment(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the run's last start; empty where it is not known."""
  return (run_folder.read_starts(workdir) or [{}])[-1]


@contextlib.contextmanager
def _before(workdir: pathlib.Path, step: int) -> Iterator[run_folder.RunFolder]:
  """Yields the run as it was before a step, in a folder that can be written to.

  Its folders are new and its files are links, which writers replace: nothing of
  the run is changed.  A file that the run removes meanwhile is like a
  checkpoint that does not verify.
  """
  with tempfile.TemporaryDirectory(prefix='jaxrl_llm_replay_') as name:
    view = pathlib.Path(name)
    for source in (workdir / 'checkpoints').glob('*'):
      match = _STEP.fullmatch(source.name)
      if match and int(match[0]) < step:
        _link(source, view / 'checkpoints' / source.name)
    for part in ('reference', 'rounds'):
      _link(workdir / part, view / part)
    try:
      yield run_folder.RunFolder(view, True)
    except UserError as error:
      raise UserError(str(error).replace(name, str(workdir))) from error


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Makes folders like those of a tree, with links to its files."""
  with contextlib.suppress(OSError):  # Absent, or removed meanwhile.
    shutil.copytree(source.resolve(), target, copy_function=os.symlink)


def _compare(workdir: pathlib.Path, recorded: dict, computed: dict) -> bool:
  """Prints the metrics that differ; returns whether none does."""
  then, now = (
    {name: json.dumps(value) for name, value in each.items()}
    for each in (recorded, computed)
  )
  names = dict.fromkeys([*then, *now])
  absent = '"absent"'
  different = [
    f'{name}: {then.get(name, absent)} recorded, {now.get(name, absent)} now'
    for name in names
    if then.get(name) != now.get(name)
  ]
  if not different:
    print(f'identical: {len(names)} metrics')
    return True
  print(f'{len(different)} of {len(names)} metrics differ')
  print(*different[:_SHOWN], sep='\n')
  then, now = _environment(workdir), run_folder.environment()
  for name in ('versions', 'machine', 'backend', 'device_kind', 'device_count'):
    if name in then and then[name] != now[name]:
      print(f'{name}: {then[name]} at the last start, {now[name]} now')
  return False


def _host(tree: Any) -> dict[str, np.ndarray]:
  """Copies arrays by name: the next step takes the devices' memory."""
  return {
    name: np.array(leaf)
    for name, leaf in named_leaves(sharding.to_host(tree)).items()
  }


def _changes(before: dict, after: dict) -> Iterator[dict[str, Any]]:
  """Yields a record per parameter: norms before a step, and of its change.

  A parameter that is stacked over layers also has each layer's norms.  One that
  the step made, such as the critic in the first step of RL, has no change.
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
  """Writes the step's ingredients; see the head of this file."""
  texts = {
    'record.json': json.dumps(numbers, indent=2) + '\n',
    'parameters.jsonl': ''.join(json.dumps(each) + '\n' for each in changes),
  }
  cli.write_files(output, texts)
  written = list(texts)
  if result.responses is not None:
    batch = result.responses, result.advantages
    stored_runs.write_batch(output / 'batch.npz', *batch)
    try:
      with runs.SampleLog(output) as log:
        log.write(to_samples(batch[0], numbers['step'], batch[1]))
        log.write_html(f'Step {numbers["step"]}')
    except OSError as error:
      raise cli.cannot_write(output, error) from error
    written += ['batch.npz', 'samples.jsonl', 'samples.html']
  print(f'{output}: {", ".join(written)}')


def main() -> int:
  """Replays what the flags name."""
  values = flags.FLAGS
  cli.require(workdir='runs/quickstart', step='120')
  return replay(values.workdir, values.step, values.output, values.trust_code)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run.')
  flags.DEFINE_integer('step', None, 'Of the run, from 1.')
  flags.DEFINE_string('output', None, "Folder for the step's ingredients.")
  cli.define_trust_flag()
  cli.run(main)
