"""Saves and loads a tree of arrays and a JSON manifest through Orbax v1.

The only module that calls Orbax and knows its errors, which it lets through.
Orbax is slow to import, so it is imported on first use.
"""

import errno
import json
import logging
import os
import re

import jax

from jaxrl_llm import processes
from jaxrl_llm.atomic import write_atomically

_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# TensorStore and XLA raise ValueError and JaxRuntimeError for all.
_PASSING = re.compile(
  'RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED'
  f'|{os.strerror(errno.EIO)}|{os.strerror(errno.EMFILE)}'
  f'|{os.strerror(errno.ENFILE)}|{os.strerror(errno.ESTALE)}'
)


def start_save(path, state, manifest: dict):
  """Starts to write a new folder, which appears completely or not at all.

  Returns once the arrays are copied or held an object whose `result()` waits
  for the end.  All processes call it, and each writes its shards, process 0 the
  manifest.  Arrays that only one process holds are equal in all.
  """
  from orbax.checkpoint import v1 as ocp

  # Each thread of a failed save logs the error that `result` raises.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  content = {'state': jax.tree.map(_as_global, state), 'manifest': manifest}
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='manifest')
  context = ocp.Context()
  context.checkpointables.registry = registry
  # Created in the background, the folder of a save that fails early leaves
  # threads that wait for it for 20 minutes.
  context.async_options.create_directories_asynchronously = False
  with context:
    return ocp.save_checkpointables_async(path, content)


def load_state(path, template, part: bool):
  """Loads the arrays of a folder, in the shardings of a template.

  Each process reads what its devices hold and waits for no other.  Leaves
  without a sharding are placed on the default device of each.
  """
  from orbax.checkpoint import v1 as ocp

  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def abstract(x):
    sharding = getattr(x, 'sharding', None) or default
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  context, process = ocp.Context(), processes.index()
  context.multiprocessing_options.active_processes = {process}
  context.multiprocessing_options.primary_host = process
  context.pytree_options.loading.partial_load = part
  with context:
    wanted = {'state': jax.tree.map(abstract, template)}
    return ocp.load_checkpointables(path, wanted)['state']


def load_manifest(path) -> dict:
  """Returns the manifest of a folder.

  It bypasses Orbax, which counts its operations: after one process has read a
  manifest alone, the others would wait for it at the next save.
  """
  return json.loads((path / 'manifest' / 'data.json').read_text())


def save_manifest(path, manifest: dict) -> None:
  """Replaces the manifest of a folder, atomically."""
  write_atomically(path / 'manifest' / 'data.json', json.dumps(manifest))


def may_pass(error: BaseException) -> bool:
  """Returns True if an error does not mean that the files are damaged.

  No memory or permission, too many open files, a disk that does not answer: the
  step may be sound and must not be skipped.
  """
  if isinstance(error, OSError):
    # Without a number it comes from a decoder, which did read.
    passing = error.errno is not None and not isinstance(error, _DAMAGE)
  else:
    passing = isinstance(error, MemoryError) or _PASSING.search(str(error))
  cause = error.__cause__ or error.__context__
  return bool(passing) or (cause is not None and may_pass(cause))


def one_line(error: BaseException) -> str:
  """Formats an error's first cause in a line: Orbax wraps it several times."""
  while error.__cause__ or (
    error.__context__ and not error.__suppress_context__
  ):
    error = error.__cause__ or error.__context__
  text = ' '.join(str(error).split())
  text = re.split(r' \[(?:source locations|tensorstore_spec)', text)[0]
  if len(text) > 300:
    text = f'{text[:150]} … {text[-150:]}'
  return f'{type(error).__name__}: {text}'


def _as_global(x):
  """Turns an array that only this process holds into one that all hold."""
  if processes.count() == 1 or not getattr(x, 'is_fully_addressable', True):
    return x
  mesh = jax.sharding.Mesh(jax.devices(), 'all')
  spec = jax.sharding.PartitionSpec()
  return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
