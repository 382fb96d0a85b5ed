"""One tree of arrays and one JSON manifest per folder, through Orbax v1.

The only module that calls Orbax.  Its functions raise what Orbax raises.
Orbax is slow to import: it is not, before it has something to do.
"""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import processes

_REPLICATED = jax.sharding.PartitionSpec()


def start_save(path, state, manifest: dict):
  """Starts to write a folder that appears whole or not at all.

  Returns when the arrays are copied or held, so that the caller may donate
  them.

  Called by all processes, of which each writes its shards.

  Args:
    path: the folder, which must not exist.
    state: a tree of arrays.  What only this process holds is the same in all.
    manifest: JSON values; those of process 0 are written.

  Returns:
    An object whose `result()` waits for the end and raises what went wrong.
  """
  from orbax.checkpoint import v1 as ocp

  # Each thread of a failed save logs the error that `result` raises.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  state = jax.tree.map(_as_global, _without_empty(state))
  with _context():
    return ocp.save_checkpointables_async(
      path, {'state': state, 'manifest': manifest}
    )


def load_state(path, template, part: bool = False):
  """The arrays of a folder, in the shardings of a template.

  Each process reads what its devices hold and waits for no other.

  Args:
    path: the folder.
    template: a tree of arrays or `jax.ShapeDtypeStruct`s.  A leaf without a
      sharding lands on the default device (of each process).
    part: the template is a part of what the folder holds.
  """
  from orbax.checkpoint import v1 as ocp

  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)),
    template,
  )
  context = _context(alone=True)
  context.pytree_options.loading.partial_load = part
  with context:
    loaded = ocp.load_checkpointables(
      path, {'state': _without_empty(abstract)}
    )['state']
  return jax.tree.map(
    lambda x, y: (
      jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
      if _is_empty(x)
      else y
    ),
    *(abstract, loaded),
  )


def load_manifest(path) -> dict:
  """The manifest of a folder.

  Orbax, which counts its operations, is not asked: one process alone may read a
  manifest, and the others would wait for it at the next save.
  """
  return json.loads((path / 'manifest' / 'data.json').read_text())


def _context(alone: bool = False):
  """How Orbax works; `alone` it waits for no other process."""
  from orbax.checkpoint import v1 as ocp

  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='manifest')
  context = ocp.Context()
  context.checkpointables.registry = registry
  # Created in the background, the folder of a save that fails early leaves
  # threads that wait for it for 20 minutes.
  context.async_options.create_directories_asynchronously = False
  if alone:
    own = processes.index()
    context.multiprocessing_options.active_processes = {own}
    context.multiprocessing_options.primary_host = own
  return context


def _as_global(x):
  """An array that only this process holds, as one that all of them hold."""
  if processes.count() == 1 or not getattr(x, 'is_fully_addressable', True):
    return x
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _as_global(jax.random.key_data(x))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  value = np.asarray(x)
  mesh = jax.sharding.Mesh(jax.devices(), 'all')
  return jax.make_array_from_callback(
    value.shape,
    jax.sharding.NamedSharding(mesh, _REPLICATED),
    lambda index: value[index],
  )


def _without_empty(tree):
  """None for arrays without elements, which Orbax refuses to save."""
  return jax.tree.map(lambda x: None if _is_empty(x) else x, tree)


def _is_empty(x):
  return 0 in x.shape


def _sharding(leaf):
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return sharding
