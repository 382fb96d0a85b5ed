"""Several processes that run one program: how they meet and agree.

Every process runs the same Python and makes the same calls in the same order;
a decision that a process makes alone (a signal, a file, a reward) is shared
with all before it steers the program.  In a single process every function is a
no-op.

Small facts go through the coordination service of `jax.distributed`, which
process 0 hosts, and arrays through collectives of the devices.
"""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from jaxrl_llm.errors import UserError

# Seconds that processes wait for each other: rewards, an export or a compile
# may take one of them long.  A lost process is noticed separately.
PATIENCE = 1800.0
_numbers = itertools.count()


def is_main() -> bool:
  """Returns True in process 0, which alone owns files and prints."""
  return jax_distributed.global_state.process_id == 0


def count() -> int:
  """Returns the number of processes.  Touches no device."""
  return jax_distributed.global_state.num_processes if _client() else 1


def index() -> int:
  """Returns the number of this process.  Touches no device."""
  return jax_distributed.global_state.process_id


def _client():
  return jax_distributed.global_state.client


def barrier(name: str, timeout_s: float = PATIENCE) -> None:
  """Returns when all processes have called it.

  Args:
    name: the purpose, for the message.
    timeout_s: seconds to wait for the last.

  Raises:
    UserError: some did not arrive; the message names the barrier and them.
  """
  if count() > 1:
    _meet(f'jaxrl_llm/{next(_numbers)}/{name}', name, timeout_s)


def _meet(key: str, name: str, timeout_s: float) -> None:
  try:
    _client().wait_at_barrier(key, max(int(timeout_s * 1000), 1))
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if 'DEADLINE_EXCEEDED' not in text:
      raise
    _, _, late = text.partition('Some timed out task names:')
    late = sorted(
      re.findall(r'^(?:\S*task:)?(\d+)$', late, re.MULTILINE), key=int
    )
    who = f'process {", ".join(late)}' if late else 'not all processes'
    raise UserError(
      f'{who} of {count()} did not reach {name!r} within {timeout_s:g} s\n'
      'all processes run the same program with the same flags: see the log of '
      'the late one'
    ) from error


def all_come(name: str, timeout_s: float) -> bool:
  """Returns True if all processes call it within a time.

  Unlike `barrier`, it is for places that perhaps not all of them reach: it is
  identified by its name alone, which is used once.
  """
  if count() == 1:
    return True
  try:
    _meet(f'jaxrl_llm/perhaps/{name}', name, timeout_s)
  except UserError:
    return False
  return True


def agree(flag: bool, name: str = 'a decision') -> bool:
  """Returns True on all processes if `flag` is true on any.

  Waits for no device: running computations continue.
  """
  if count() == 1:
    return bool(flag)
  key = f'jaxrl_llm/{next(_numbers)}/{name}'
  if flag:
    _client().key_value_set(f'{key}/{index()}', '1')
  _meet(key, name, PATIENCE)
  return bool(_client().key_value_dir_get(f'{key}/'))


def own_part(total: int) -> slice:
  """Returns which of `total` things, in order, this process works on."""
  bounds = [i * total // count() for i in (index(), index() + 1)]
  return slice(*bounds) if count() > 1 else slice(0, total)


def gather(tree: Any, name: str = 'gathered rows') -> Any:
  """Gathers all processes' rows on every process, in process order.

  Args:
    tree: NumPy arrays of this process's rows, the same tree on all processes.
      The number of rows may differ, but not their shape and dtype.
    name: the name of the rows, for the message if a process does not arrive.

  Returns:
    The tree of NumPy arrays, concatenated over the processes along the first
    axis, with bits and dtypes unchanged (JAX alone would make float64 float32).
  """
  leaves, structure = jax.tree.flatten(tree)
  leaves = [np.asarray(leaf) for leaf in leaves]
  if any(leaf.dtype.hasobject for leaf in leaves):
    raise TypeError(f'{name}: an array of objects cannot be gathered.')
  if count() == 1:
    return structure.unflatten(leaves)
  header = json.dumps([[str(leaf.dtype), leaf.shape] for leaf in leaves])
  content = b''.join(leaf.tobytes() for leaf in leaves)
  parts_by_process = []
  for data in _exchange(header.encode() + b'\n' + content, name):
    header, _, content = data.partition(b'\n')
    parts_by_process.append(_unpack(json.loads(header), content))
  kinds = {
    tuple((x.dtype.kind, x.shape[1:]) for x in part)
    for part in parts_by_process
  }
  if len(kinds) > 1:
    raise ValueError(f'{name}: the rows of the processes differ: {kinds}.')
  return structure.unflatten(
    [np.concatenate(parts) for parts in zip(*parts_by_process, strict=True)]
  )


def _unpack(header, content: bytes) -> list[np.ndarray]:
  arrays, start = [], 0
  for dtype, shape in header:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = np.frombuffer(content[start : start + size], dtype)
    arrays.append(data.reshape(shape))
    start += size
  return arrays


def gather_objects(value: Any, name: str = 'gathered values') -> list:
  """Gathers every process's value on every process, in process order.

  Args:
    value: JSON values, of any size (tuples come back as lists).
    name: the name of the values, for the message if a process does not arrive.
  """
  content = json.dumps(value).encode()
  if count() == 1:
    return [json.loads(content)]
  return [json.loads(data) for data in _exchange(content, name)]


def _exchange(content: bytes, name: str) -> list[bytes]:
  """Exchanges every process's bytes, over the devices."""
  # A collective has its own time-out: nobody must wait inside it.
  barrier(name)
  gather_all = multihost_utils.process_allgather
  sizes = gather_all(np.array([len(content)], np.int32)).reshape(-1)
  # One program for all sizes up to the next power of two.
  room = 1 << int(sizes.max() - 1).bit_length()
  padded = np.zeros(room, np.uint8)
  padded[: len(content)] = np.frombuffer(content, np.uint8)
  rows = gather_all(padded)
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def on_main(function: Callable[[], Any], name: str) -> Any:
  """Calls a function in process 0 and returns its result on every process.

  Args:
    function: called in process 0 alone; returns JSON values.
    name: its purpose, for the message if a process does not arrive.

  Returns:
    The function's result; over several processes tuples come back as lists.

  Raises:
    UserError: the function raised it; it is raised in all processes.
  """
  if count() == 1:
    return function()
  outcome = None
  if is_main():
    try:
      outcome = [True, function()]
    except UserError as error:
      outcome = [False, str(error)]
  done, result = gather_objects(outcome, name)[0]
  if not done:
    raise UserError(result)
  return result
