"""Collectives, loops and FLOPs of programs whose numbers are known by hand."""

import types

import jax
import jax.numpy as jnp
import peers
import pytest

from experiments.planning import collectives, flops, hlo
from experiments.planning.topologies import Topology, parse


def body(x, w):
  # x [16, 8] and w [8, 8] float32 on each device.
  def layer(x, _):
    whole = jax.lax.all_gather(w * x[:8], 'b', tiled=True)
    return jnp.tanh(x + x @ whole[:8]), None

  x, _ = jax.lax.scan(layer, x, None, length=5)

  def more(state):
    return (state[0] < 3) & (state[1].sum() < 1e9)

  def step(state):
    total = jax.lax.psum(state[1] @ w, 'a')
    return state[0] + 1, jnp.sin(total)

  _, x = jax.lax.while_loop(more, step, (0, x))
  x = jnp.cos(jax.lax.ppermute(x, 'a', [(0, 1), (1, 0)]))
  x = jnp.exp(jax.lax.all_to_all(x, 'b', 0, 1, tiled=True))

  def open_ended(x):
    return jnp.tanh(jax.lax.psum_scatter(x @ x.T, 'b', tiled=True))[:, :4]

  return jax.lax.while_loop(
    lambda x: x.sum() > 0, lambda x: jnp.tile(open_ended(x), (4, 8)), x
  )


def measure():
  """On 2 × 4 devices, with every collective explicit."""
  axes = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=axes)
  spec = jax.P('a', 'b')
  f = jax.shard_map(
    body, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
  )
  traced = jax.jit(f).trace(jnp.zeros((32, 32)), jnp.zeros((16, 32)))
  module = hlo.parse(traced.lower().compile().as_text())
  executed = hlo.executions(module, (3, 7))
  groups = []
  found, seconds = collectives.find(
    executed, lambda group: groups.append(group) or 1.0
  )
  return dict(
    found=found,
    seconds=seconds,
    groups=sorted(groups),
    compiled=flops.of_executions(executed),
    unknown=flops.of_executions(hlo.executions(module)),
    traced=flops.of_jaxpr(traced.jaxpr, (3, 7))[0],
  )


@pytest.fixture(scope='module')
def measured():
  return peers.compute(measure)


def test_collectives_are_as_counted_by_hand(measured):
  found = {
    x['kind']: (x['chips'], x['times'], x['sent']) for x in measured['found']
  }
  assert found == {
    # [8, 8] float32 of each to the three others, in 5 layers.
    'all-gather': (4, 5, 5 * 3 * 256),
    # [16, 8] float32, summed over two: half there and half back, three times.
    'all-reduce': (2, 3, 3 * 512),
    'collective-permute': (2, 1, 512),
    'all-to-all': (4, 1, 512 * 3 / 4),
    'reduce-scatter': (4, 7, 7 * 4 * 4 * 4 * 3 / 4),
  }
  assert measured['seconds'] == sum(sent for _, _, sent in found.values())
  assert measured['groups'] == [[0, 1, 2, 3], [0, 4]]


def test_flops_are_as_counted_by_hand(measured):
  layers, step = 5 * 2 * 16 * 8 * 8, 2 * 16 * 8 * 8
  last = 2 * 4 * 4 * 32
  assert measured['compiled'] == layers + 3 * step + 7 * last
  # Products within loops without a known count.
  assert measured['unknown'] == layers
  assert measured['traced'] == 8 * measured['compiled']


GROUPS = """
replica_groups={{0,2},{1,3}}, x | (0, 2)
replica_groups=[2,4]<=[8], x | (0, 1, 2, 3)
replica_groups=[4,2]<=[2,4]T(1,0), x | (0, 4)
replica_groups=mesh['a'=2,'b'=4] {'a'}, x | (0, 4)
replica_groups=mesh['a'=2,'b'=4] {'b'} | (0, 1, 2, 3)
replica_groups=mesh['a'=8] {'a':(2)4} | (0, 1, 2, 3)
source_target_pairs={{3,1},{1,3}} | (3, 1)
"""


def test_groups_of_every_notation():
  for line in GROUPS.strip().splitlines():
    text, group = line.split(' | ')
    kind = 'collective-permute' if 'source' in text else 'all-gather'
    found = hlo.Instruction('x', 'f32[2]', kind, (), text)
    assert collectives.first_group(found, kind) == eval(group), line


def test_bandwidth_of_links():
  def rate(name, positions):
    topology = Topology(name, *parse(name), [], {})
    devices = [
      types.SimpleNamespace(coords=(*x, 0), id=topology.shape[1] * x[0] + x[1])
      for x in positions
    ]
    return collectives.bandwidth(topology, devices)

  line = [[i, 0] for i in range(16)]
  link = parse('v5e:16x16')[0].link
  assert rate('v5e:16x16', line) == 2 * link
  assert rate('v5e:16x16', line[:8]) == rate('v5e:16x16', line[:2]) == link
  plane = [[i, j] for i in range(16) for j in range(4)]
  assert rate('v5e:16x16', plane) == 3 * link
  assert rate('h100:64', [[0, i] for i in range(8)]) == 450e9
  assert rate('h100:64', [[i, 0] for i in range(8)]) == 50e9
  everything = [[i, j] for i in range(8) for j in range(8)]
  assert rate('h100:64', everything) == 400e9


def test_convolutions_of_tpus():
  """A batch of matrix products, as libtpu writes them."""
  text = """
ENTRY %main (a: bf16[4,512,64], b: bf16[4,64,32]) -> bf16[4,512,32] {
  %a = bf16[4,512,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[4,512,32]{2,1,0:T(8,128)} convolution(%a, %b), WINDOW
}
"""
  window = 'window={size=4 stride=3 pad=0_0 lhs_dilate=4}, '
  text = text.replace('WINDOW', window + 'dim_labels=0bf_0io->0bf')
  found = flops.of_executions(hlo.executions(hlo.parse(text)))
  assert found == 4 * 2 * 512 * 64 * 32
