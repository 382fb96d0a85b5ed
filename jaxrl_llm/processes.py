"""Processes that run one program: they join, agree, exchange data and end.

All make the same calls in the same order, and share what one decides alone (a
signal, a file, a reward) before it steers the program: small facts through the
coordination service of `jax.distributed`, arrays through collectives.
"""

import contextlib
import ctypes
import io
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental.multihost_utils import process_allgather

from jaxrl_llm.errors import UserError

HEARTBEAT = 10  # seconds without a sign of life: the process is lost
_STATUS = 'jaxrl_llm/status'  # key of the exit status of all
_LATE = """error: not all processes have come within {:g} s
start all at about the same time, with the same --coordinator: a free port\n"""
_LOST = """error: process {} of {} was lost: process {} ends with it
see the log of the lost one; its last checkpoint is complete\n"""
_FLAGS = """give --coordinator=HOST:PORT, --num_processes and --process_id, all,
or none of them under a launcher, or --num_processes=1"""
_libc = ctypes.CDLL(None)
_numbers = itertools.count()
_leaving = threading.Event()
_watches = []


def _state():
  """Returns JAX's state of the run: only there is the service's `client`."""
  try:
    from jax._src.distributed import global_state
  except ImportError as error:
    message = 'lacks jax._src.distributed.global_state: use jax 0.10.1 or 0.12'
    raise UserError(f'jax {jax.__version__} {message}') from error
  return global_state


def count() -> int:
  """Returns the number of processes.  Touches no device."""
  return _state().num_processes if jax.distributed.is_initialized() else 1


def index() -> int:
  """Returns the number of this process.  Touches no device."""
  return _state().process_id if jax.distributed.is_initialized() else 0


def is_main() -> bool:
  """Returns True in process 0, which alone owns files and prints."""
  return index() == 0


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout_s: float = 300,
) -> None:
  """Joins the processes of a run.  Call it before anything touches a device.

  Without arguments JAX discovers those of a launcher: a TPU pod, srun, mpirun,
  or an indexed Kubernetes job where the package `kubernetes` is installed.
  Raises UserError if it cannot.  From then on a lost process ends the others.

  Args:
    coordinator: HOST:PORT on which process 0 listens.
    num_processes, process_id: how many, and which; one queries no launcher.
    timeout_s: seconds to wait for the others; then this one ends (status 2).
  """
  flags = coordinator, num_processes, process_id
  launched = flags == (None, None, None)
  if flags[1:] in ((1, None), (1, 0)) or launched and _alone():
    return
  # It would intercept SIGTERM, which asks a run to save and stop.
  jax.config.update('jax_enable_preemption_service', False)
  timer = threading.Timer(timeout_s, _exit, (2, _LATE.format(timeout_s)))
  timer.start()
  try:
    if coordinator and not re.fullmatch(r'.+:\d+', coordinator):
      raise ValueError(f'{coordinator} is not HOST:PORT')
    jax.distributed.initialize(
      *flags,
      local_device_ids=_local_devices() if launched else None,
      cluster_detection_method=None if launched else 'deactivate',
      initialization_timeout=int(timeout_s) + 60,  # Then C++ would abort.
      heartbeat_timeout_seconds=HEARTBEAT,
    )
  except Exception as error:  # Launchers raise of any kind.
    if launched and str(error) == 'coordinator_address should be defined.':
      return  # There is none.
    text = ' '.join(str(error).split())[:200]
    raise UserError(f'the processes cannot meet: {text}\n{_FLAGS}') from error
  finally:
    timer.cancel()
  if count() == 1:
    return jax.distributed.shutdown()
  # CPUs would run collectives concurrently, each process in its own order.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  if jax.config.jax_platforms == 'cpu':
    flag = ' --xla_cpu_enable_concurrency_optimized_scheduler=false'
    os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + flag
  _libc.signal(signal.SIGABRT, _on_abort)
  for watch in _watch_status, _watch_lives:
    _watches.append(threading.Thread(target=watch, daemon=True))
    _watches[-1].start()
  jax.devices()  # All must ask for them to get them.


def _alone() -> bool:
  """Returns True in a shell under Slurm and in a plain Kubernetes pod."""
  # JAX would count the tasks of the shell's allocation; look up the pod's job.
  names = os.environ
  if 'OMPI_COMM_WORLD_SIZE' in names or 'TPU_WORKER_HOSTNAMES' in names:
    return False
  pod = 'KUBERNETES_SERVICE_HOST' in names and 'SLURM_JOB_ID' not in names
  shell = names.get('SLURM_STEP_NUM_TASKS') == '1'
  return shell or pod and 'JOB_COMPLETION_INDEX' not in names


def _local_devices() -> list[int] | None:
  """Returns [] for all devices; None for one GPU, if others share the host."""
  slurm = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '')
  here = os.environ.get('OMPI_COMM_WORLD_LOCAL_SIZE', slurm)
  alone = re.fullmatch(r'1(\(x\d+\))?', here)
  return [] if alone and 'JAX_LOCAL_DEVICE_IDS' not in os.environ else None


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number):
  """Delays the abort in C++ after a loss, until a watch has reported it."""
  time.sleep(2)
  # This thread of C++ may be the one that would have woken the watches.
  host, _, port = _state().coordinator_address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), 5).close()
  except OSError:
    _exit(1, _LOST.format(0, count(), index()))
  _libc.signal(number, None)


def _watch_status() -> None:
  """Ends this process when one has failed, itself or another."""
  client = _state().client
  try:
    status = client.blocking_key_value_get(_STATUS, 10**9)
  except JaxRuntimeError:  # At once when process 0 is lost.
    return _leaving.is_set() or _exit(1, _LOST.format(0, count(), index()))
  with contextlib.suppress(JaxRuntimeError):
    client.wait_at_barrier(f'{_STATUS}/all', HEARTBEAT * 1000)
  _exit(int(status))


def _watch_lives() -> None:
  """Ends this process when another is lost."""
  client, everyone = _state().client, list(range(count()))
  with contextlib.suppress(JaxRuntimeError):
    while not _leaving.wait(0.5):
      # Returns when all live processes have called it.
      alive = client.get_live_nodes(everyone)
      lost = ', '.join(str(each) for each in everyone if each not in alive)
      if lost and not _leaving.is_set():
        _exit(1, _LOST.format(lost, count(), index()))


def _exit(status: int, message: str = '') -> None:
  """Exits at once: threads that wait for other processes would never end."""
  if is_main():
    time.sleep(2)  # The others learn of it from the service.
  sys.stdout.flush()
  os.write(2, message.encode())
  os._exit(status)


def fail(status: int, say: Callable[[], None] = lambda: None) -> None:
  """Ends all; the first to fail calls `say`.  A single process returns."""
  if count() == 1:
    return say()
  with contextlib.suppress(JaxRuntimeError):  # Process 0 is lost.
    client = _state().client
    if client.key_value_increment(f'{_STATUS}/failures', 1) == 1:
      say()
      client.key_value_set(_STATUS, str(status))
  wait_for_loss()
  _exit(status)


def wait_for_loss() -> None:
  """Gives a watch the time to end this process, if another was lost."""
  if count() > 1:
    time.sleep(2 * HEARTBEAT)


def finish() -> None:
  """Leaves the run together with all others, at its normal end."""
  if count() > 1:
    barrier('the end')
    _leaving.set()
    jax.distributed.shutdown()
    for watch in _watches:
      watch.join(HEARTBEAT)  # Python would end it within C++, which aborts.


def barrier(name: str, timeout_s: float = 1800, key: str = '') -> None:
  """Returns when all have called it; a UserError names it and the late."""
  if count() == 1:
    return
  key = key or f'jaxrl_llm/{next(_numbers)}/{name}'
  try:
    _state().client.wait_at_barrier(key, max(int(timeout_s * 1000), 1))
  except JaxRuntimeError as error:
    if 'DEADLINE_EXCEEDED' not in str(error):
      raise
    _, _, names = str(error).partition('Some timed out task names:')
    late = re.findall(r'^(?:\S*task:)?(\d+)$', names, re.MULTILINE)
    raise UserError(
      f'process {", ".join(sorted(late, key=int)) or "?"} of {count()} did not '
      f'reach {name!r} within {timeout_s:g} s\nall run the same program with '
      'the same flags: see the log of the late one'
    ) from error


def all_come(name: str, timeout_s: float) -> bool:
  """Returns True if all come within a time; the name must be used once."""
  try:
    barrier(name, timeout_s, f'jaxrl_llm/perhaps/{name}')
  except UserError:
    return False
  return True


def agree(flag: bool, name: str = 'a decision') -> bool:
  """Returns True on all if `flag` is true on any.  Waits for no device."""
  if count() == 1:
    return bool(flag)
  client, key = _state().client, f'jaxrl_llm/{next(_numbers)}/{name}'
  if flag:
    client.key_value_set(f'{key}/{index()}', '1')
  barrier(name, key=key)
  return bool(client.key_value_dir_get(f'{key}/'))


def own_part(total: int) -> slice:
  """Returns which of `total` things, in order, this process works on."""
  return slice(*(i * total // count() for i in (index(), index() + 1)))


def gather(tree: Any, name: str = 'gathered rows') -> Any:
  """Concatenates all processes' rows, of any number, in order, bit by bit."""

  def gather_rows(rows):
    file = io.BytesIO()  # JAX alone would make float64 float32.
    np.save(file, rows, allow_pickle=False)  # ValueError for objects
    parts = map(io.BytesIO, _exchange(file.getvalue(), name))
    return np.concatenate([np.load(part, allow_pickle=False) for part in parts])

  return jax.tree.map(gather_rows, tree)


def gather_objects(value: Any, name: str = 'gathered values') -> list:
  """Returns all processes' JSON values, in order; tuples become lists."""
  return list(map(json.loads, _exchange(json.dumps(value).encode(), name)))


def _exchange(content: bytes, name: str) -> list[bytes]:
  """Returns every process's bytes, sent over the devices."""
  if count() == 1:
    return [content]
  barrier(name)  # A collective has its own time-out: nobody waits inside it.
  sizes = process_allgather(np.array([len(content)], np.int32)).reshape(-1)
  # One program for all sizes up to the next power of two.
  padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
  padded[: len(content)] = np.frombuffer(content, np.uint8)
  rows = process_allgather(padded)
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def on_main(function: Callable[[], Any], name: str) -> Any:
  """Calls a function in process 0; returns its JSON or raises its UserError."""
  if count() == 1:
    return function()
  outcome = None, None
  if is_main():
    try:
      outcome = function(), None
    except UserError as error:
      outcome = None, str(error)
  result, reason = gather_objects(outcome, name)[0]
  if reason is not None:
    raise UserError(reason)
  return result
