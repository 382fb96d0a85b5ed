"""Checkpoints and model folders over processes and device layouts."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm import processes
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.runs import orbax_io
from jaxrl_llm.runs.checkpoints import Checkpoints

SIZES = dict(vocab_size=16, hidden_size=16, num_layers=3, num_heads=2)
# GPT-2's tensors hold queries, keys and values side by side.
GPT2 = dict(
  family='gpt2',
  rope=None,
  norm='layer',
  activation='gelu_tanh',
  gated=False,
  **dict.fromkeys(('query_bias', 'output_bias', 'mlp_bias'), True),
)
CONFIGS = {
  'llama': ModelConfig(intermediate_size=24, tied=False, **SIZES),
  'gpt2': ModelConfig(
    intermediate_size=64, max_length=8, tied=True, **SIZES, **GPT2
  ),
}


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


def restore(index, folder, *meshes):
  for fsdp, tensor in meshes:
    with Checkpoints(folder) as checkpoints:
      step, state, metadata = checkpoints.restore(template(fsdp, tensor))
      assert (step, metadata) == (4, {'seconds': 0, 'step': 4})
      assert_holds(state, 4, fsdp, tensor)


def two_processes(index, folder):
  save(index, folder, 2, 4)
  restore(index, folder, (4, 2), (8, 1))
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(UserError, match='process 1 would save another'):
      checkpoints.save(9, {'key': jnp.uint32(index)}, {})
    # Verified by all, it gets a new manifest; process 0's is written.
    checkpoints.restore(template(2, 4))
    checkpoints.save(4, device_state(4, 2, 4), {'seconds': index + 5}, 0.0)
    assert checkpoints.restore(template(2, 4))[2] == {'seconds': 5}
  one_process_cannot_read(index, folder)
  damage_newest(folder)
  with Checkpoints(folder) as checkpoints:
    step, state, _ = checkpoints.restore(template(1, 8))
    assert (step, checkpoints.steps()) == (3, [1, 3])
    assert_holds(state, 3, 1, 8)
    checkpoints.save(5, device_state(5, 1, 8), {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3, 5]


def one_process_cannot_read(index, folder):
  """One finds damage and one lacks memory: no step is given up, by either."""
  load, errors = orbax_io.load_state, [ValueError('cut'), MemoryError('full')]

  def fails(*arguments):
    raise errors[index]

  with Checkpoints(folder) as checkpoints:
    orbax_io.load_state = fails
    with pytest.raises(UserError, match='(?s)step 4 in .*MemoryError: full'):
      checkpoints.restore(template(2, 4))
    orbax_io.load_state = load
    assert checkpoints.restore(template(2, 4))[0] == 4


def damage_newest(folder):
  """Empties the file that holds most of the newest step."""
  if processes.is_main():
    files = (pathlib.Path(folder) / '00000004/state').rglob('d/*')
    max(files, key=lambda file: file.stat().st_size).write_bytes(b'')
  processes.barrier('the damage')


@pytest.mark.slow
def test_two_processes_to_one(tmp_path):
  peers.run(two_processes, tmp_path, count=2, devices=4)
  with Checkpoints(tmp_path) as checkpoints:
    step, state, _ = checkpoints.restore(template(1, 1))
  assert step == 5
  assert_holds(state, 5, 1, 1)


def eight_devices(index, folder):
  save(index, folder, 8, 1)
  restore(index, folder, (2, 4), (2, 2), (1, 4), (1, 1))


def test_eight_devices_to_fewer(tmp_path):
  peers.run(eight_devices, tmp_path, count=1, devices=8)


def model_shardings(config):
  """Every axis that divides is spread over fsdp, then over tensor."""
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('fsdp', 'tensor'))
  shapes = jax.eval_shape(
    lambda: transformer.init(config, jax.random.key(0), 'bfloat16')
  )

  def spec(leaf):
    names, left = [], ['fsdp', 'tensor']
    for size in leaf.shape[::-1]:
      fits = left and size % mesh.shape[left[0]] == 0
      names.append(left.pop(0) if fits else None)
    return NamedSharding(mesh, P(*names[::-1]))

  return jax.tree.map(spec, shapes)


def read_and_write(index, folder):
  for name, config in CONFIGS.items():
    path = pathlib.Path(folder) / name
    spread = model_shardings(config)
    _, params = folders.load(path, 'float32', shardings=spread)
    _, whole = folders.load(path, 'float32')
    assert any(
      len(leaf.addressable_shards) > 1 and not leaf.is_fully_replicated
      for leaf in jax.tree.leaves(params)
    )
    for leaf, value, sharding in zip(
      *map(jax.tree.leaves, (params, whole, spread)), strict=True
    ):
      assert leaf.sharding == sharding
      for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index])
    again = path.with_name(f'{name}_again')
    folders.save(again, config, params)
    assert again.is_dir()


@pytest.mark.slow
def test_model_folders(tmp_path):
  for name, config in CONFIGS.items():
    params = transformer.init(config, jax.random.key(1))
    folders.save(tmp_path / name, config, params)
  peers.run(read_and_write, tmp_path, count=2, devices=4)
  for name in CONFIGS:
    first, again = tmp_path / name, tmp_path / f'{name}_again'
    for file in sorted(path.name for path in first.iterdir()):
      assert (again / file).read_bytes() == (first / file).read_bytes(), file
