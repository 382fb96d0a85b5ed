"""A run that goes on with other devices than it began with."""

import functools
import json
import math
import shutil

import faults
import pytest
import scripts

pytestmark = pytest.mark.slow  # Programs for 8 devices take long to compile.

STEPS = 4
# Mesh of 8, and of fewer devices.
MESHES = {
  '8': dict(data=1, fsdp=8),
  '2x4': dict(data=2, fsdp=4),
  '2x2x2': dict(data=2, fsdp=2, tensor=2),
  '4': dict(data=1, fsdp=4),
  '1': dict(data=1, fsdp=1),
}
SAVED = scripts.WARM + STEPS


def one_step_more(folder, name: str) -> tuple[dict, dict]:
  """Resumes a copy of the run on a mesh."""
  workdir = folder / f'on_{name}'
  shutil.copytree(folder / 'saved', workdir)
  told = folder / f'restored_on_{name}.json'
  fault = functools.partial(faults.tell_restored, str(told))
  ended = train(folder, workdir.name, MESHES[name], STEPS + 1, fault)
  assert ended.code == 0, ended.err
  assert f'resumed at step {SAVED}' in ended.err
  record = scripts.records(workdir)[-1]
  assert record['step'] == SAVED + 1
  return json.loads(told.read_text()), record


def train(folder, name: str, mesh: dict, steps: int, before=None):
  """Trains on a mesh, to so many steps of RL."""
  return scripts.train(
    folder / name,
    folder / 'config' / 'config.py',
    '--config.optimizer.decay=constant',
    f'--config.steps={steps}',
    *(f'--config.mesh.{axis}={size}' for axis, size in mesh.items()),
    devices=math.prod(mesh.values()),
    before=before,
  ).wait()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """The folder of a run on 8 devices, and what it is like to go on with 8."""
  folder = tmp_path_factory.mktemp('topologies')
  # Of a loss near 0 a relative error says nothing.
  text = scripts.CONFIG.replace(
    "dict(name='grpo', kl=0.04)", "dict(name='reinforce')"
  )
  text = text.replace('minibatches = 2', 'minibatches = 1')
  text = text.replace(f'prompts={scripts.PROMPTS}', 'prompts=8')
  scripts.write_config(folder / 'config', text)
  ended = train(folder, 'saved', MESHES['8'], STEPS)
  assert ended.code == 0, ended.err
  assert '8 cpu device(s): data 1 x fsdp 8' in ended.err
  return folder, *one_step_more(folder, '8')


@pytest.mark.parametrize('name', ['2x4', '2x2x2', '4', '1'])
def test_a_run_goes_on_with_other_devices(name, saved, capsys):
  folder, arrays, record = saved
  restored, found = one_step_more(folder, name)
  assert restored == arrays and len(arrays) > 20
  # The same tokens, so that losses are comparable.
  assert found['completions/hash'] == record['completions/hash']
  error = abs(found['loss'] / record['loss'] - 1)
  with capsys.disabled():
    print(f'\n{name}: next loss {found["loss"]}, relative error {error:.1e}')
  assert abs(record['loss']) > 0.1
  assert error <= 1e-5
