"""Checkpoints under damage, kills and full disks: never silently wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.checkpoints import Checkpoints
from tests.runs.checkpoints_test import (
  META,
  abstract,
  assert_same,
  lines,
  make_state,
  run_script,
  save_steps,
)


def data_files(folder):
  files = [path for path in folder.rglob('*') if path.is_file()]
  return sorted(path for path in files if path.stat().st_size)


def damage(path, kind, rng):
  content = bytearray(path.read_bytes())
  if kind == 'delete':
    path.unlink()
  elif kind == 'empty':
    path.write_bytes(b'')
  elif kind == 'truncate':
    path.write_bytes(content[: len(content) // 2])
  else:
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def restored_right(folder):
  """Restores: the newest step or the one before, bit for bit."""
  with Checkpoints(folder) as checkpoints:
    step, state, metadata = checkpoints.restore(abstract(make_state(0)))
  assert metadata == {**META, 'step': step}
  assert_same(state, make_state(step))
  return step


@pytest.mark.parametrize('kind', ['delete', 'empty', 'truncate', 'flip'])
def test_damage_is_never_silently_wrong(tmp_path, caplog, kind):
  save_steps(tmp_path / 'good', [1, 2])
  rng = random.Random(0)
  outcomes = []
  for path in data_files(tmp_path / 'good' / '00000002'):
    for _ in range(3 if kind == 'flip' else 1):
      shutil.copytree(tmp_path / 'good', tmp_path / 'bad')
      damage(tmp_path / 'bad' / path.relative_to(tmp_path / 'good'), kind, rng)
      caplog.clear()
      outcomes.append(restored_right(tmp_path / 'bad'))
      if outcomes[-1] == 1:
        assert 'Checkpoint step 2 does not verify' in caplog.text
        assert 'using step 1' in caplog.text
        assert (tmp_path / 'bad' / '00000002.broken').is_dir()
      shutil.rmtree(tmp_path / 'bad')
  # Files that Orbax does not read may break unnoticed, the data may not.
  assert 1 in outcomes


def largest(folder):
  return max(data_files(folder), key=lambda path: path.stat().st_size)


def test_flipped_data_names_the_leaf(tmp_path, caplog):
  state = {
    'a': jnp.zeros(64),
    'big': jax.random.bits(jax.random.key(0), (4096,)),
  }
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state, {})
  path = largest(tmp_path / '00000002' / 'state')
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 16
  path.write_bytes(content)
  assert Checkpoints(tmp_path).restore(state)[0] == 1
  assert 'step 2' in caplog.text
  assert 'big' in caplog.text or 'checksum' in caplog.text.lower()


@pytest.mark.parametrize('change', ['cursor', 'metric', 'leaf', 'step'])
def test_an_edited_manifest_does_not_verify(tmp_path, caplog, change):
  save_steps(tmp_path, [1, 2])
  path = tmp_path / '00000002' / 'manifest' / 'data.json'
  manifest = json.loads(path.read_text())
  if change == 'cursor':
    manifest['metadata']['cursor'] += 1
  elif change == 'leaf':
    del manifest['leaves']['params/head']
  else:
    manifest[change] = 5
  path.write_text(json.dumps(manifest))
  assert restored_right(tmp_path) == 1
  assert 'its manifest has changed' in caplog.text


@pytest.mark.parametrize('item', ['state', 'manifest', 'state/d'])
def test_a_removed_item_is_named(tmp_path, caplog, item):
  save_steps(tmp_path, [1, 2])
  shutil.rmtree(tmp_path / '00000002' / item)
  assert restored_right(tmp_path) == 1
  assert 'step 2' in caplog.text


def test_nothing_left_is_an_error(tmp_path):
  save_steps(tmp_path, [1, 2])
  for step in ('00000001', '00000002'):
    largest(tmp_path / step / 'state').unlink()
    (tmp_path / step / 'manifest' / 'data.json').write_text('')
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match='verifies') as error:
      checkpoints.restore(make_state(0))
    assert 'step 2: ' in str(error.value) and 'step 1: ' in str(error.value)
    assert len(lines(error)) == 3
    assert checkpoints.steps() == [1, 2]


def test_broken_steps_go_once_the_run_has_passed_them(tmp_path):
  save_steps(tmp_path, [1, 4])
  (tmp_path / '00000004' / 'manifest' / 'data.json').write_text('{}')
  broken = tmp_path / '00000004.broken'
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(make_state(0))[0] == 1
    for step, kept in ((2, True), (3, True), (4, False)):
      checkpoints.save(step, make_state(step), META)
      checkpoints.wait()
      assert broken.exists() == kept
    assert checkpoints.steps() == [3, 4]


KILLED = """
import sys
import jax.numpy as jnp
from jaxrl_llm.runs.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_latest=3)
for step in range(1, 1000):
  x = jnp.full((400_000,), step, jnp.float32) + jnp.arange(400_000)
  checkpoints.save(step, {'x': x}, {'step': step})
  print(step, flush=True)
"""


@pytest.mark.parametrize('seed', range(3))
def test_a_killed_save_leaves_a_sound_folder(tmp_path, seed):
  process = subprocess.Popen(
    [sys.executable, '-c', KILLED, tmp_path],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  for _ in range(4):
    printed = int(process.stdout.readline())
  time.sleep(random.Random(seed).uniform(0, 0.15))
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  with Checkpoints(tmp_path) as checkpoints:
    names = [path.name for path in tmp_path.iterdir()]
    assert all(name.isdigit() for name in names), names
    template = {'x': jnp.zeros(400_000)}
    step, state, metadata = checkpoints.restore(template)
    assert step >= printed - 1 and metadata == {'step': step}
    expected = np.float32(step) + np.arange(400_000, dtype=np.float32)
    np.testing.assert_array_equal(state['x'], expected)


# The order that a loop keeps: record, sync, checkpoint.
LOOP = """
import sys, time
import jax, jax.numpy as jnp
from jaxrl_llm.runs import folder as run_folder
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.runs import MetricsWriter, Sample, SampleLog

@jax.jit
def update(state):
  key, draw = jax.random.split(state['key'])
  x = state['x'] * 0.9 + jax.random.normal(draw, (1000,))
  return {'key': key, 'x': x, 'step': state['step'] + 1}

state = {'key': jax.random.key(0), 'x': jnp.zeros(1000), 'step': jnp.int32(0)}
with (
  run_folder.open_run(sys.argv[1], True, {'seed': 0}) as run,
  Checkpoints(run.path / 'checkpoints') as checkpoints,
):
  restored = checkpoints.restore(state)
  if restored:
    _, state, _ = restored
  start = restored and restored[0]
  samples = SampleLog(run.path, start)
  with MetricsWriter(run.path, start) as metrics, samples:
    print('ready', flush=True)
    for step in range(int(state['step']) + 1, 61):
      state = update(state)
      metrics.write(step, {'x': state['x'].mean()}, {'time': time.time()})
      samples.write([Sample(step, 'p', str(step), {}, 0.0, 0.0, 1, True)])
      if step % 4 == 0:
        metrics.sync()
        samples.sync()
        checkpoints.save(step, state, {'step': step})
"""


@pytest.mark.slow
def test_a_killed_loop_writes_the_same_records(tmp_path):
  assert run_script(LOOP, tmp_path / 'whole').returncode == 0
  rng = random.Random(0)
  for _ in range(2):
    process = subprocess.Popen(
      [sys.executable, '-c', LOOP, tmp_path / 'killed'],
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    assert process.stdout.readline() == 'ready\n'
    time.sleep(rng.uniform(0.05, 0.4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
  result = run_script(LOOP, tmp_path / 'killed')
  assert result.returncode == 0, result.stderr
  for name in ('metrics.jsonl', 'samples.jsonl'):
    whole = (tmp_path / 'whole' / name).read_bytes()
    assert whole.count(b'\n') == 60
    assert (tmp_path / 'killed' / name).read_bytes() == whole
  timings = (tmp_path / 'killed' / 'timings.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in timings] == list(range(1, 61))


# A limit on the size of files stands in for a full disk: the write of the data
# fails in Orbax's own thread, and small files can still be written.
FULL = """
import resource, sys, time
import jax, jax.numpy as jnp
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.errors import UserError
x = {'x': jax.random.normal(jax.random.key(0), (100_000,))}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, x, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
checkpoints.save(2, x, {})
try:
  for _ in range(100):
    time.sleep(0.1)
    checkpoints.poll()
  print('no error')
except UserError as error:
  print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
checkpoints.save(3, x, {})
checkpoints.wait()
print(checkpoints.steps(), checkpoints.restore(x)[0])
"""


def test_a_failed_write_is_said_and_leaves_nothing(tmp_path):
  result = run_script(FULL, tmp_path)
  assert result.returncode == 0, result.stderr
  out = result.stdout.splitlines()
  assert len(out) == 4, result.stdout
  assert 'Saving checkpoint step 2' in out[0]
  assert 'too large' in out[1].lower()
  assert 'Steps kept: [1].' in out[2]
  assert out[3] == '[1, 3] 3'
  assert result.stderr == ''
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    '00000001',
    '00000003',
  ]


def test_an_unwritable_folder_is_said_at_once(tmp_path):
  (tmp_path / 'file').write_text('')
  checkpoints = Checkpoints(tmp_path / 'file' / 'c')
  threads = threading.active_count()
  with pytest.raises(UserError, match='Saving checkpoint step 1') as error:
    checkpoints.save(1, {'x': jnp.zeros(2)}, {})
  assert len(lines(error)) == 3
  assert threading.active_count() <= threads


DAMAGED = """
import pathlib, sys
import jax.numpy as jnp
from jaxrl_llm.runs.checkpoints import Checkpoints
state = {f'p{i}': jnp.full((100, 10), i) for i in range(12)}
with Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(1, state, {})
  checkpoints.save(2, state, {})
for path in pathlib.Path(sys.argv[1], '00000002/state').rglob('*'):
  if path.is_file() and 'd' in path.parts:
    path.write_bytes(path.read_bytes()[:-40])
with Checkpoints(sys.argv[1]) as checkpoints:
  print(checkpoints.restore(state)[0])
"""


def test_a_fallback_is_reported_once(tmp_path):
  result = run_script(DAMAGED, tmp_path)
  assert (result.returncode, result.stdout) == (0, '1\n'), result.stderr
  said = [x for x in result.stderr.splitlines() if 'does not verify' in x]
  assert len(said) == 1, result.stderr
  assert 'Checkpoint step 2 does not verify (its state: ' in said[0]


def test_no_pickle_on_disk(tmp_path):
  save_steps(tmp_path, [1])
  for path in data_files(tmp_path):
    assert not path.read_bytes().startswith(b'\x80'), path
