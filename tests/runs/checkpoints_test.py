"""Checkpoints: what comes back is what went in."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_same

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import orbax_io
from jaxrl_llm.runs.checkpoints import Checkpoints

META = {'config': {'lr': 1e-3, 'sizes': [1, 2]}, 'cursor': 7}


def make_state(seed=0):
  key = jax.random.key(seed)
  params = {
    'layers': {'w': jax.random.normal(key, (2, 64, 16))},
    'head': jax.random.normal(key, (4, 3)).astype(jnp.bfloat16),
  }
  return {
    'params': params,
    'optimizer': optax.adamw(optax.constant_schedule(0.1)).init(params),
    'key': key,
    'step': jnp.int32(seed),
    'mask': jnp.array([True, False, True]),
    'absent': None,
  }


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def save_steps(folder, steps, **kwargs):
  with Checkpoints(folder, **kwargs) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), {**META, 'step': step})


def names(folder):
  return sorted(os.listdir(folder))


def lines(error):
  return str(error.value).splitlines()


def manifest_of(folder, step):
  return folder / f'{step:08d}' / 'manifest' / 'data.json'


def times(folder):
  """The time of each file's last change, and its identity."""
  stats = {path: path.stat() for path in folder.rglob('*') if path.is_file()}
  return {path: (s.st_mtime_ns, s.st_ino) for path, s in stats.items()}


def start_script(text, *arguments):
  return subprocess.Popen(
    [sys.executable, '-c', text, *map(str, arguments)],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_round_trip(tmp_path):
  state = make_state(3)
  with Checkpoints(tmp_path / 'c') as checkpoints:
    assert checkpoints.restore(state) is None
    checkpoints.save(30, state, META, metric=0.5)
  for path in (tmp_path / 'c').rglob('*'):  # no pickles
    assert path.is_dir() or not path.read_bytes().startswith(b'\x80'), path
  with Checkpoints(tmp_path / 'c') as checkpoints:
    for template in (state, abstract(state)):
      step, restored, metadata = checkpoints.restore(template)
      assert (step, metadata) == (30, META)
      assert_same(restored, state)


def test_a_part_is_read_and_verified_alone(tmp_path, monkeypatch):
  state = make_state(3)
  part = {'params': abstract(state)['params']}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, META)
    step, restored, metadata = checkpoints.restore(part, part=True)
    assert (step, metadata) == (1, META)
    assert_same(restored, {'params': state['params']})
    with pytest.raises(UserError, match='another configuration'):
      checkpoints.restore(part)
    # The arrays that are read are compared with their digests.
    load = orbax_io.load_state
    spoilt = lambda *args: jax.tree.map(lambda x: x + 1, load(*args))
    monkeypatch.setattr(orbax_io, 'load_state', spoilt)
    with pytest.raises(UserError, match='the content of params/.* has changed'):
      checkpoints.restore(part, part=True)


def test_keeps_latest_and_best(tmp_path):
  metrics = [float('nan'), 0.9, float('nan'), 0.2, None, 0.9, 0.3, 0.0]
  state = {'x': jnp.zeros(2)}
  with Checkpoints(tmp_path, keep_latest=2, keep_best=2) as checkpoints:
    for step, metric in enumerate(metrics):
      checkpoints.save(step, state, {}, metric=metric)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 5, 6, 7]
  with Checkpoints(tmp_path, keep_latest=1, keep_best=1) as checkpoints:
    assert checkpoints.best_step() == 5
    assert checkpoints.restore(state, step=5)[0] == 5
    with pytest.raises(UserError, match=r'no checkpoint step 4 .*\n.*1, 5, 6'):
      checkpoints.restore(state, step=4)
    checkpoints.save(8, state, {}, metric=0.4)
    checkpoints.wait()
    assert checkpoints.steps() == [5, 8]
    checkpoints.save(8, state, {}, metric=1.0)  # another score
    assert checkpoints.best_step() == 8 and checkpoints.steps() == [8]


def test_saving_survives_donation(tmp_path):
  update = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
  x = jnp.arange(2_000_000, dtype=jnp.float32)
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(3):
      expected = np.array(x)
      checkpoints.save(step, {'x': x}, {})
      for _ in range(3):
        x = update(x)
      _, restored, _ = checkpoints.restore({'x': x})
      np.testing.assert_array_equal(restored['x'], expected)


def test_a_step_with_equal_arrays_gets_a_new_manifest(tmp_path, monkeypatch):
  save_steps(tmp_path, [1])
  state, checkpoints = make_state(1), Checkpoints(tmp_path)
  checkpoints.restore(abstract(state))
  before, manifest = times(tmp_path), manifest_of(tmp_path, 1)
  monkeypatch.delattr(orbax_io, 'start_save')
  checkpoints.save(1, state, {'new': 2}, metric=0.2)
  assert {path for path, _ in times(tmp_path).items() ^ before.items()} == {
    manifest
  }
  for reader in (checkpoints, Checkpoints(tmp_path, read_only=True)):
    step, restored, metadata = reader.restore(state)
    assert (step, metadata) == (1, {'new': 2})
    assert_same(restored, state)
  assert json.loads(manifest.read_text())['metric'] == 0.2
  assert names(manifest.parent) == ['data.json']


@pytest.mark.parametrize('seed, verified', [(1, ''), (1, 'part'), (5, 'whole')])
def test_a_step_that_differs_or_was_not_verified_is_saved_anew(
  tmp_path, seed, verified
):
  save_steps(tmp_path, [1])
  before = times(tmp_path / '00000001' / 'state')
  with Checkpoints(tmp_path) as checkpoints:
    if verified == 'part':
      checkpoints.restore({'mask': make_state()['mask']}, part=True)
    elif verified:
      checkpoints.restore(abstract(make_state()))
    checkpoints.save(1, make_state(seed), META)
    assert_same(checkpoints.restore(make_state())[1], make_state(seed))
  assert not before.items() & times(tmp_path / '00000001' / 'state').items()


@pytest.mark.parametrize(
  'leaves, message',
  [
    ({'extra': jnp.zeros(2)}, 'extra is missing in it'),
    ({'mask': None}, 'mask is bool[3] in it, the program wants none'),
    ({'mask': jnp.zeros(4, bool)}, 'mask is bool[3] in it, the'),
    ({'step': jnp.float32(0)}, 'the program wants float32[]'),
  ],
)
def test_another_configuration_is_refused_and_named(tmp_path, leaves, message):
  save_steps(tmp_path, [2])
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError) as error:
      checkpoints.restore({**make_state(0), **leaves})
    assert message in str(error.value) and 'step 2' in lines(error)[0]
    assert len(lines(error)) == 3
    assert checkpoints.steps() == [2]


def test_read_only_changes_nothing(tmp_path):
  save_steps(tmp_path, [1, 2])
  manifest_of(tmp_path, 2).write_text('{}')
  (tmp_path / '00000003.orbax-checkpoint-tmp').mkdir()
  before = sorted(tmp_path.rglob('*')), times(tmp_path)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.restore(make_state(0))[0] == 1
    with pytest.raises(UserError, match='read-only'):
      checkpoints.save(3, make_state(3), {})
  assert (sorted(tmp_path.rglob('*')), times(tmp_path)) == before
