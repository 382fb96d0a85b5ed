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
from jaxrl_llm.runs.checkpoints import Checkpoints

CONFIGS = {
  'llama': ModelConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=2,
    tied=False,
  ),
  # Its tensors hold queries, keys and values side by side.
  'gpt2': ModelConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=64,
    num_layers=3,
    num_heads=2,
    max_length=8,
    tied=True,
    family='gpt2',
    rope=None,
    norm='layer',
    query_bias=True,
    output_bias=True,
    mlp_bias=True,
    activation='gelu_tanh',
    gated=False,
  ),
}


def host_state(step):
  """What a checkpoint holds, in NumPy: no JAX is in it."""
  rng = np.random.default_rng(step)
  return {
    'w': rng.normal(size=(2, 8, 16)).astype(np.float32),
    'bias': rng.normal(size=16).astype(jnp.bfloat16),
    'ids': rng.integers(0, 9, (8, 3)).astype(np.int32),
    'key': rng.integers(0, 2**32, 2, np.uint32),
    'count': np.int32(step),
    'none': np.zeros((0, 2), np.float32),
  }


SPECS = {
  'w': P(None, 'fsdp', 'tensor'),
  'bias': P('tensor'),
  'ids': P(('fsdp', 'tensor')),
}


def shardings(fsdp, tensor):
  """Of the leaves that are spread; the others stay on one device."""
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


def assert_holds(state, step):
  """What this process's devices hold is the host's, bit for bit."""
  for name, value in host_state(step).items():
    assert state[name].dtype == value.dtype, name
    for shard in state[name].addressable_shards:
      found = np.asarray(shard.data)
      assert found.tobytes() == value[shard.index].tobytes(), name


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
      found = checkpoints.restore(template(fsdp, tensor))
      assert (found[0], found[2]) == (4, {'seconds': 0, 'step': 4})
      assert_holds(found[1], 4)


def two_processes(index, folder):
  save(index, folder, 2, 4)
  restore(index, folder, (4, 2), (8, 1))
  with Checkpoints(folder) as checkpoints:
    other = {'key': jnp.uint32(index)}
    with pytest.raises(UserError, match='process 1 would save a different'):
      checkpoints.save(9, other, {})
  damage_newest(folder)
  with Checkpoints(folder) as checkpoints:
    step, state, _ = checkpoints.restore(template(1, 8))
    assert (step, checkpoints.steps()) == (3, [1, 3])
    assert_holds(state, 3)


def damage_newest(folder):
  """Empties the file in which most of the newest step lies."""
  if processes.is_main():
    files = (pathlib.Path(folder) / '00000004/state').rglob('d/*')
    max(files, key=lambda file: file.stat().st_size).write_bytes(b'')
  processes.barrier('the damage')


@pytest.mark.slow
def test_two_processes_to_one(tmp_path):
  peers.run(two_processes, tmp_path, count=2, devices=4)
  with Checkpoints(tmp_path) as checkpoints:
    step, state, _ = checkpoints.restore(template(1, 1))
  assert step == 3
  assert_holds(state, 3)


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
