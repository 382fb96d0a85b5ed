"""Saves and loads a tree of arrays and a JSON manifest through Orbax v1.

The only module that calls Orbax.  Its functions raise Orbax's errors.
Orbax is slow to import, so it is imported on first use.
"""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import processes

_REPLICATED = jax.sharding.PartitionSpec()


def start_save(path, state, manifest: dict):
  """Starts to write a folder that appears completely or not at all.

  Returns once the arrays are copied or held, so that the caller may donate
  them.

  All processes call it, and each writes its shards.

  Args:
    path: the folder, which must not exist.
    state: a tree of arrays.  Those that only this process holds are equal in
      all.
    manifest: JSON values; process 0's are written.

  Returns:
    An object whose `result()` waits for the end and raises any error.
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
  """Loads the arrays of a folder, in the shardings of a template.

  Each process reads what its devices hold and waits for no other.

  Args:
    path: the folder.
    template: a tree of arrays or `jax.ShapeDtypeStruct`s.  A leaf without a
      sharding is placed on the default device (of each process).
    part: the template is a part of the folder's content.
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
  """Returns the manifest of a folder.

  It bypasses Orbax, which counts its operations: after one process has read a
  manifest alone, the others would wait for it at the next save.
  """
  return json.loads((path / 'manifest' / 'data.json').read_text())


def _context(alone: bool = False):
  """Returns Orbax's context; `alone` it waits for no other process."""
  from orbax.checkpoint import v1 as ocp

  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='manifest')
  context = ocp.Context()
  context.checkpointables.registry = registry
  # Created in the background, the folder of a save that fails early leaves
  # threads that wait for it for 20 minutes.
  context.async_options.create_directories_asynchronously = False
  if alone:
    process = processes.index()
    context.multiprocessing_options.active_processes = {process}
    context.multiprocessing_options.primary_host = process
  return context


def _as_global(x):
  """Turns an array that only this process holds into one that all hold."""
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
  """Replaces arrays without elements, which Orbax refuses, with None."""
  return jax.tree.map(lambda x: None if _is_empty(x) else x, tree)


def _is_empty(x):
  return 0 in x.shape


def _sharding(leaf):
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return sharding
