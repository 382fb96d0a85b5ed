"""Layouts by name, meshes, and whole iterations on eight devices."""

import iterations
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from jax.sharding import PartitionSpec as P
from mistakes import refused

from jaxrl_llm import sharding
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig

CONFIG = ModelConfig(48, 32, 64, 2, 8, num_kv_heads=4, max_length=64)
MESHES = '8,1,1', '2,4,1', '2,2,2', '1,1,8'


def spec_of(specs, path):
  for key in path.split('/'):
    specs = specs[key]
  return specs


def specs(layout, **sizes):
  shapes = jax.eval_shape(lambda: transformer.init(CONFIG, jax.random.key(0)))
  return sharding.param_specs(shapes, layout, sizes)


TRAINING = {
  'embed/embedding': P('tensor', 'fsdp'),
  'head/embedding': P('tensor', 'fsdp'),
  'layers/attention/query/kernel': P(None, 'fsdp', 'tensor'),
  'layers/attention/key/kernel': P(None, 'fsdp', 'tensor'),
  'layers/attention/out/kernel': P(None, 'tensor', 'fsdp'),
  'layers/mlp/up/kernel': P(None, 'fsdp', 'tensor'),
  'layers/mlp/down/kernel': P(None, 'tensor', 'fsdp'),
  'layers/attention_norm/scale': P(),
}


@pytest.mark.parametrize('path', TRAINING)
def test_the_table(path):
  found = specs('training', data=2, fsdp=4, tensor=2)
  assert spec_of(found, path) == TRAINING[path]
  # For sampling, tensor alone.
  names = [entry if entry == 'tensor' else None for entry in TRAINING[path]]
  found = specs('sampling', data=2, fsdp=4, tensor=2)
  assert spec_of(found, path) == P(*names)


def test_an_axis_that_does_not_divide_is_left_out():
  found = specs('training', data=1, fsdp=5, tensor=3)
  assert spec_of(found, 'embed/embedding') == P('tensor', None)
  assert spec_of(found, 'layers/mlp/up/kernel') == P(None, None, None)


def test_every_large_parameter_is_split():
  shapes = jax.eval_shape(lambda: transformer.init(CONFIG, jax.random.key(0)))
  found = specs('training', data=1, fsdp=2, tensor=2)
  whole = [
    jax.tree_util.keystr(path)
    for (path, leaf), spec in zip(
      jax.tree_util.tree_leaves_with_path(shapes),
      jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P)),
      strict=True,
    )
    if leaf.size > CONFIG.num_layers * CONFIG.hidden_size
    and len([entry for entry in spec if entry]) < 2
  ]
  assert not whole


def test_optimiser_state_lies_like_the_parameters():
  tree = {'mu': {'layers': {'mlp': {'up': {'kernel': jnp.zeros((2, 8, 8))}}}}}
  found = sharding.param_specs(tree, 'training', {'fsdp': 2, 'tensor': 2})
  assert jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P)) == [
    P(None, 'fsdp', 'tensor')
  ]


@pytest.mark.parametrize(
  'sizes, message',
  [
    (dict(data=3), 'data 3, fsdp -1, tensor 1 does not hold 1 devices'),
    (dict(data=-1), 'data -1, fsdp -1'),
    (dict(data=0), 'data 0'),
    (dict(fsdp=2), 'fsdp 2'),
  ],
)
def test_a_mesh_that_does_not_fit(sizes, message):
  with refused(message):
    sharding.make_mesh(**sizes, devices=jax.devices()[:1])


def test_without_a_mesh_nothing_happens():
  x = np.arange(6.0).reshape(2, 3)
  assert sharding.constrain(x, 'data', None) is x
  assert sharding.constrain_params(x) is x
  assert sharding.place(x) is x
  assert sharding.row_devices() == 1
  sharding.check_rows(3, 5, 'prompts')
  np.testing.assert_array_equal(sharding.to_host(sharding.place_rows(x)), x)


def rows(index):
  with jax.set_mesh(sharding.make_mesh(2, 4)):
    assert sharding.row_axes(8, 3) == (('data', 'fsdp'), ())
    assert sharding.row_axes(2, 4) == (('data',), ('fsdp',))
    assert sharding.row_axes(1, 8) == ((), ('data', 'fsdp'))
    assert sharding.row_axes(3, 1) == ((), ())
    assert sharding.shards(sharding.row_spec(2, 4)) == 8
    rows = np.arange(48).reshape(8, 6)
    placed = sharding.place_rows(rows)
    assert [s.data.shape for s in placed.addressable_shards] == [(1, 6)] * 8
    np.testing.assert_array_equal(sharding.to_host(placed), rows)
    sharding.check_rows(2, 4, 'x')
    with refused('config.rollout.prompts is 6', '[8], or another config.mesh'):
      sharding.check_rows(6, 3, 'config.rollout.prompts')
    spec = P(('data', 'fsdp'))
    total = lambda x: x.sum(1, keepdims=True)
    sums = jax.jit(sharding.over_rows(total, spec, spec))(placed)
    np.testing.assert_array_equal(sums[:, 0], rows.sum(axis=1))


def test_rows_on_eight_devices():
  peers.run(rows, count=1, devices=8)


def iterate(index, algorithm, meshes):
  """Iterations like those of one device, and updates without a copy."""
  for record in iterations.compare_meshes(algorithm, meshes):
    assert all(record['equal'].values()), record
    assert record['gradient'] <= 1e-5 and record['norm'] > 0.1, record
    # All of the state is written in place; the rest are a few scalars.
    assert record['aliased'] == record['state'], record
    assert record['output'] - record['aliased'] < 2000, record


slow = pytest.mark.slow


@pytest.mark.parametrize(
  'algorithm, meshes',
  [
    ('grpo', ['2,2,2']),
    pytest.param('grpo', MESHES, marks=slow),
    pytest.param('trepo', MESHES, marks=slow),
  ],
)
def test_iterations_on_eight_devices(algorithm, meshes):
  peers.run(iterate, algorithm, meshes, count=1, devices=8, seconds=3000)
