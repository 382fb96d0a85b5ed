"""Checkpoints over processes and device layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm import processes
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import orbax_io
from jaxrl_llm.runs.checkpoints import Checkpoints


def host_state(step):
  """Returns the content of a checkpoint in NumPy, without JAX."""
  rng = np.random.default_rng(step)
  return {
    'w': rng.normal(size=(2, 8, 16)).astype(np.float32),
    'bias': rng.normal(size=16).astype(jnp.bfloat16),
    'ids': rng.integers(0, 9, (8, 3)).astype(np.int32),
    'key': rng.integers(0, 2**32, 2, np.uint32),
    'count': np.int32(step),
  }


SPECS = {
  'w': P(None, 'fsdp', 'tensor'),
  'bias': P('tensor'),
  'ids': P(('fsdp', 'tensor')),
}


def shardings(fsdp, tensor):
  """Returns the spread leaves' shardings; the others stay on one device."""
  devices = np.array(jax.devices()[: fsdp * tensor]).reshape(fsdp, tensor)
  mesh = Mesh(devices, ('fsdp', 'tensor'))
  return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def device_state(step, fsdp, tensor):
  spread, state = shardings(fsdp, tensor), host_state(step)
  return {
    name: jax.make_array_from_callback(
      value.shape, spread[name], lambda index, value=value: value[index]
    )
    if name in spread
    else jnp.asarray(value)
    for name, value in state.items()
  }


def template(fsdp, tensor):
  spread = shardings(fsdp, tensor)
  return {
    name: jax.ShapeDtypeStruct(
      value.shape, value.dtype, sharding=spread.get(name)
    )
    for name, value in host_state(0).items()
  }


def assert_holds(state, step, fsdp, tensor):
  """Asserts that this process's shards are the host's, bit for bit."""
  for name, sharding in shardings(fsdp, tensor).items():
    assert state[name].sharding == sharding, name
  for name, value in host_state(step).items():
    assert state[name].dtype == value.dtype, name
    for shard in state[name].addressable_shards:
      data = np.asarray(shard.data)
      assert data.tobytes() == value[shard.index].tobytes(), name


def save(index, folder, fsdp, tensor):
  with Checkpoints(folder, keep_latest=2, keep_best=1) as checkpoints:
    assert checkpoints.restore(template(fsdp, tensor)) is None
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
      # Each process may measure another time; the first one's is kept.
      metadata = {'seconds': index, 'step': step}
      checkpoints.save(step, device_state(step, fsdp, tensor), metadata, metric)
      checkpoints.poll()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3, 4]
    assert checkpoints.best_step() == 1


def restore(folder, *meshes):
  for mesh in meshes:
    with Checkpoints(folder) as checkpoints:
      step, state, metadata = checkpoints.restore(template(*mesh))
      assert (step, metadata) == (4, {'seconds': 0, 'step': 4})
      assert_holds(state, 4, *mesh)


def two_processes(index, folder):
  save(index, folder, 2, 4)
  restore(folder, (4, 2), (8, 1))
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(UserError, match='process 1 would save another'):
      checkpoints.save(9, {'key': jnp.uint32(index)}, {})
    # Verified by all, it gets a new manifest; process 0's is written.
    checkpoints.restore(template(2, 4))
    checkpoints.save(4, device_state(4, 2, 4), {'seconds': index + 5}, 0.0)
    assert checkpoints.restore(template(2, 4))[2] == {'seconds': 5}
    # One finds damage and one lacks memory: neither gives the step up.
    load, errors = orbax_io.load_state, [ValueError('cut'), MemoryError('full')]
    orbax_io.load_state = lambda *arguments: raise_(errors[index])
    with pytest.raises(UserError, match='(?s)step 4 in .*MemoryError: full'):
      checkpoints.restore(template(2, 4))
    orbax_io.load_state = load
    assert checkpoints.restore(template(2, 4))[0] == 4
  if processes.is_main():
    files = (folder / '00000004/state').rglob('d/*')
    max(files, key=lambda file: file.stat().st_size).write_bytes(b'')
  processes.barrier('the damage')
  with Checkpoints(folder) as checkpoints:
    step, state, _ = checkpoints.restore(template(1, 8))
    assert (step, checkpoints.steps()) == (3, [1, 3])
    assert_holds(state, 3, 1, 8)
    checkpoints.save(5, device_state(5, 1, 8), {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3, 5]


def raise_(error):
  raise error


@pytest.mark.slow
def test_two_processes_to_one(tmp_path):
  peers.run(two_processes, tmp_path, count=2, devices=4)
  with Checkpoints(tmp_path) as checkpoints:
    step, state, _ = checkpoints.restore(template(1, 1))
  assert step == 5
  assert_holds(state, 5, 1, 1)


def eight_devices(index, folder):
  save(index, folder, 8, 1)
  restore(folder, (2, 4), (2, 2), (1, 4), (1, 1))


def test_eight_devices_to_fewer(tmp_path):
  peers.run(eight_devices, tmp_path, count=1, devices=8)
