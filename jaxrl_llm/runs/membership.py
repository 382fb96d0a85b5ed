"""Discovers a run's processes and stops all when one dies.

If a process is lost (killed, its machine gone) or fails, the others end with a
message instead of waiting for it for ever.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax
from jax._src import clusters
from jax._src import distributed as jax_distributed

from jaxrl_llm import processes
from jaxrl_llm.errors import UserError

# Seconds without a sign of life after which a process counts as lost.
HEARTBEAT = 10
_WATCH = 0.5  # seconds between two checks of the others
_ENDED = 'jaxrl_llm/ended'  # number of failed processes, and the exit status
_LEFT = 'jaxrl_llm/left'  # number of the others that have left since
_leaving = threading.Event()


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout_s: int = 300,
) -> None:
  """Joins the processes of a run.  Call it before anything touches a device.

  Without arguments they are discovered where a launcher provides them: a TPU
  pod, Slurm's srun, Open MPI, or an indexed Kubernetes job where the package
  `kubernetes` is installed.  A program of one process is unaffected.

  From then on a lost process ends the others, within 30 s.

  Args:
    coordinator: HOST:PORT on which process 0 listens.
    num_processes: their number; 1 queries no launcher.
    process_id: the number of this one, from 0.
    timeout_s: seconds to wait for the others to start.

  Raises:
    UserError: arguments are missing or wrong; process 0 does not answer; the
      launcher does not provide the processes.
  """
  if num_processes == 1 and process_id in (None, 0):
    return
  devices = None
  if (coordinator, num_processes, process_id) == (None, None, None):
    cluster = _detect(timeout_s)
    if cluster is None:
      return
    coordinator, num_processes, process_id, devices = cluster
  _check(coordinator, num_processes, process_id)
  start = time.monotonic()
  if process_id:
    _wait_for(coordinator, timeout_s)
  # Only then does a loss reach the watch below, not an abort in C++.
  jax.config.update('jax_enable_recoverability', True)
  # CPU devices run programs concurrently: two programs that both communicate
  # could wait for each other for ever.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  # It would intercept SIGTERM, which asks a run to save and stop.
  jax.config.update('jax_enable_preemption_service', False)
  with _on_abort(
    lambda: (
      f'not all {num_processes} processes reached {coordinator} within '
      f'{timeout_s} s\nstart all at about the same time, on a free port'
    )
  ):
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      devices,
      cluster_detection_method='deactivate',
      initialization_timeout=max(int(start + timeout_s - time.monotonic()), 1),
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=HEARTBEAT,
    )
  if process_id:
    _explain_loss_of_main(coordinator)
  for watch in _watch_lives, _watch_failures:
    threading.Thread(target=watch, name=watch.__name__, daemon=True).start()
  # All must ask for the devices to get them: do it now.
  jax.devices()


def _check(coordinator, num_processes, process_id) -> None:
  if None in (coordinator, num_processes, process_id):
    raise UserError(
      'several processes need --coordinator=HOST:PORT, --num_processes=N and '
      '--process_id=I, all three\n'
      'leave all of them out where a launcher (srun, a TPU pod) provides them'
    )
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise UserError(
      f'--coordinator={coordinator} is not HOST:PORT\n'
      'name the host of process 0 and a free port on it'
    )
  if not 0 <= process_id < num_processes:
    raise UserError(
      f'--process_id={process_id} is not one of {num_processes} process(es)\n'
      'they are numbered from 0 to --num_processes - 1'
    )


def _detect(timeout_s: int) -> tuple | None:
  """Returns coordinator, count, number and local devices; None if alone."""
  if _slurm_tasks() == 1:
    # Perhaps in an allocation of many tasks, but not started by srun for them.
    return None
  for kind in clusters.ClusterEnv._cluster_types:
    if kind.opt_in_only_method or (
      kind is clusters.K8sCluster and 'JOB_COMPLETION_INDEX' not in os.environ
    ):
      continue
    try:
      if not kind.is_env_present():
        continue
      total = kind.get_process_count()
      if total == 1:
        return None
      port = os.environ.get('JAX_COORDINATOR_PORT')
      address = os.environ.get('JAX_COORDINATOR_ADDRESS')
      address = address or kind.get_coordinator_address(timeout_s, port)
      return address, total, kind.get_process_id(), _local_devices(kind)
    except Exception as error:  # from its variables, service or network
      raise UserError(
        f'{kind.__name__} does not provide the processes of this run: '
        f'{" ".join(str(error).split())[:200]}\n'
        'give --coordinator, --num_processes and --process_id, or '
        '--num_processes=1'
      ) from error
  return None


def _slurm_tasks() -> int | None:
  """Returns the number of tasks of the Slurm step that this process is in."""
  if 'SLURM_STEP_NODELIST' not in os.environ:
    return None
  return int(os.environ.get('SLURM_STEP_NUM_TASKS', os.environ['SLURM_NTASKS']))


def _local_devices(kind) -> list[int] | None:
  """Returns one GPU if the host has several processes; else None, for all."""
  each = os.environ.get('SLURM_STEP_TASKS_PER_NODE', '')
  alone = re.fullmatch(r'1(\(x\d+\))?', each)
  local = kind.get_local_process_id()
  if alone or local is None or 'JAX_LOCAL_DEVICE_IDS' in os.environ:
    return None
  return [local]


def _answers(coordinator: str) -> bool:
  host, _, port = coordinator.rpartition(':')
  try:
    socket.create_connection((host, int(port)), timeout=3).close()
  except OSError:
    return False
  return True


def _wait_for(coordinator: str, timeout_s: float) -> None:
  """Waits until process 0 listens: C++ would abort if it did not."""
  end = time.monotonic() + timeout_s
  while not _answers(coordinator):
    if time.monotonic() > end:
      raise UserError(
        f'process 0 does not answer at {coordinator} within {timeout_s} s\n'
        'start all processes at about the same time, with the same '
        '--coordinator'
      )
    time.sleep(0.1)


@contextlib.contextmanager
def _on_abort(explain: Callable[[], str | None]):
  """Reports the reason if C++ aborts inside; hides C++'s other output.

  Args:
    explain: returns the reason; None to let the abort proceed.
  """
  sys.stderr.flush()
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)

  def speak():
    os.dup2(kept, 2)
    return explain()

  _handle_abort(speak)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)
    _libc.signal(signal.SIGABRT, None)


_libc = ctypes.CDLL(None)
_handlers = []  # alive as long as C may call them


def _handle_abort(explain: Callable[[], str | None]) -> None:
  def handle(number):
    why = explain()
    if why is not None:
      _say(why)
      os._exit(1)
    _libc.signal(number, None)

  # A Python handler waits for the main thread, which abort() ends first.
  _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handle))
  _libc.signal(signal.SIGABRT, _handlers[-1])


def _explain_loss_of_main(coordinator: str) -> None:
  """Reports the loss of process 0 when C++ aborts because of it."""

  def explain():
    if _answers(coordinator):
      return None
    return _lost(f'process 0 of {processes.count()} ({coordinator})')

  _handle_abort(explain)


def _say(text: str) -> None:
  os.write(2, f'error: {text}\n'.encode())


def _lost(who: str) -> str:
  return (
    f'{who} was lost: process {processes.index()} ends with it\n'
    'see the log of the lost one; its last checkpoint is complete'
  )


def _watch_lives() -> None:
  """Ends this process when another is lost."""
  everyone = list(range(processes.count()))
  while not _leaving.wait(_WATCH):
    try:
      # Returns when all live processes have called it.
      alive = _client().get_live_nodes(everyone)
    except (AttributeError, jax.errors.JaxRuntimeError):
      return  # Without process 0 C++ ends this one; or it has left.
    lost = [str(each) for each in everyone if each not in alive]
    if _leaving.is_set() or _failed_status() is not None:
      return  # The missing ones have left.
    if lost:
      _say(_lost(f'process {", ".join(lost)} of {len(everyone)}'))
      if processes.is_main():
        # The others learn of the loss through it.
        time.sleep(4 * _WATCH)
      _exit(1)


def _watch_failures() -> None:
  """Ends this process when another has failed and reported why."""
  while not _leaving.wait(_WATCH):
    try:
      status = _failed_status()
    except (AttributeError, jax.errors.JaxRuntimeError):
      return
    if status is not None:
      _leave(status)


def _client():
  return jax_distributed.global_state.client


def _failed_status() -> int | None:
  entries = _client().key_value_dir_get(f'{_ENDED}/')
  return int(entries[0][1]) if entries else None


def _exit(status: int):
  """Exits at once: threads that wait for other processes would never end."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _leave(status: int) -> None:
  if not processes.is_main():
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_increment(_LEFT, 1)
    _exit(status)
  # Process 0 leaves last: the others are connected to its service.
  end = time.monotonic() + HEARTBEAT
  while time.monotonic() < end:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      if int(_client().key_value_try_get(_LEFT)) >= processes.count() - 1:
        break
    time.sleep(0.05)
  _exit(status)


def fail(status: int, say: Callable[[], None] = lambda: None) -> None:
  """Ends all processes; a single one only reports and returns.

  Args:
    status: exit status of all.
    say: reports the reason; called in the first process to fail.
  """
  if processes.count() == 1:
    say()
    return
  if _client().key_value_increment(f'{_ENDED}_count', 1) == 1:
    say()
    _client().key_value_set(f'{_ENDED}/status', str(status))
  _leave(status)


def wait_for_loss() -> None:
  """Lets the watch end this process, if another was lost.

  For an error of a collective, which is the first sign that a survivor sees.
  """
  if processes.count() > 1:
    time.sleep(2 * HEARTBEAT)


def finish() -> None:
  """Leaves the run together with all others, at its normal end."""
  if processes.count() == 1:
    return
  processes.barrier('the end')
  _leaving.set()
  processes.barrier('leaving', HEARTBEAT)
  if processes.is_main():
    # The others are connected to its service.
    while len(_client().get_live_nodes(list(range(processes.count())))) > 1:
      time.sleep(0.02)
  jax.distributed.shutdown()
