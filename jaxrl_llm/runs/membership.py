"""How the processes of a run are found, and how one that ends ends all.

A process that is lost (killed, its machine gone) or that fails ends the others
with a message, instead of leaving them to wait for it for ever.
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
_WATCH = 0.5  # seconds between two looks at the others
_ENDED = 'jaxrl_llm/ended'  # how many have failed, and the status to end with
_LEFT = 'jaxrl_llm/left'  # how many of the others have gone since
_leaving = threading.Event()


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout_s: int = 300,
) -> None:
  """Joins the processes of a run.  Call it before anything touches a device.

  Without arguments they are found out where a launcher tells them: a TPU pod,
  Slurm's srun, Open MPI, or an indexed Kubernetes job where the package
  `kubernetes` is installed.  A program of one process stays as it is.

  From then on a process that is lost ends the others, within 30 s.

  Args:
    coordinator: HOST:PORT on which process 0 listens.
    num_processes: how many there are; 1 asks no launcher.
    process_id: which of them this is, from 0.
    timeout_s: seconds to wait for the others to start.

  Raises:
    UserError: only some arguments are given, or wrong ones; process 0 does not
      answer; the launcher does not tell what it should.
  """
  if num_processes == 1 and process_id in (None, 0):
    return
  devices = None
  if (coordinator, num_processes, process_id) == (None, None, None):
    found = _detect(timeout_s)
    if found is None:
      return
    coordinator, num_processes, process_id, devices = found
  _check(coordinator, num_processes, process_id)
  start = time.monotonic()
  if process_id:
    _wait_for(coordinator, timeout_s)
  # Only so does a loss come to the watch below, not to an abort in C++.
  jax.config.update('jax_enable_recoverability', True)
  # CPU devices run programs side by side: two programs that both exchange
  # something could wait for each other for ever.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  # It would take SIGTERM, which asks a run to save and stop.
  jax.config.update('jax_enable_preemption_service', False)
  with _on_abort(
    lambda: (
      f'not all {num_processes} processes came to {coordinator} within '
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
  # All have to ask for the devices to get them: let it be now.
  jax.devices()


def _check(coordinator, num_processes, process_id) -> None:
  if None in (coordinator, num_processes, process_id):
    raise UserError(
      'several processes need --coordinator=HOST:PORT, --num_processes=N and '
      '--process_id=I, all three\n'
      'leave all of them out where a launcher (srun, a TPU pod) tells them'
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
  """Coordinator, count, number and local devices; None in a single process."""
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
    except Exception as error:  # of its variables, its service, the network
      raise UserError(
        f'{kind.__name__} does not tell the processes of this run: '
        f'{" ".join(str(error).split())[:200]}\n'
        'give --coordinator, --num_processes and --process_id, or '
        '--num_processes=1'
      ) from error
  return None


def _slurm_tasks() -> int | None:
  """Tasks of the Slurm step that this process is one of."""
  if 'SLURM_STEP_NODELIST' not in os.environ:
    return None
  return int(os.environ.get('SLURM_STEP_NUM_TASKS', os.environ['SLURM_NTASKS']))


def _local_devices(kind) -> list[int] | None:
  """One GPU for each of several processes of a host; a single one has all."""
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
  """Waits until process 0 listens: C++ would abort where it does not."""
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
  """Says why, if C++ aborts inside; and hides what C++ says else.

  Args:
    explain: the reason; None for the abort to go on as it would.
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

  # A handler of Python's waits for the main thread, which abort() ends first.
  _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handle))
  _libc.signal(signal.SIGABRT, _handlers[-1])


def _explain_loss_of_main(coordinator: str) -> None:
  """Says so where C++ aborts since it cannot reach process 0."""

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
    'look into the log of the lost one; its last checkpoint is whole'
  )


def _watch_lives() -> None:
  """Ends this process when another is lost."""
  everyone = list(range(processes.count()))
  while not _leaving.wait(_WATCH):
    try:
      # Returns when all processes that live have asked it.
      alive = _client().get_live_nodes(everyone)
    except (AttributeError, jax.errors.JaxRuntimeError):
      return  # Without process 0 C++ ends this one; or it has left.
    lost = [str(each) for each in everyone if each not in alive]
    if _leaving.is_set() or _failed_status() is not None:
      return  # Those who are missing have left.
    if lost:
      _say(_lost(f'process {", ".join(lost)} of {len(everyone)}'))
      if processes.is_main():
        # With it goes what tells the others.
        time.sleep(4 * _WATCH)
      _exit(1)


def _watch_failures() -> None:
  """Ends this process when another has failed, which has said why."""
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
  found = _client().key_value_dir_get(f'{_ENDED}/')
  return int(found[0][1]) if found else None


def _exit(status: int):
  """Ends at once: what waits for other processes would wait for ever."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _leave(status: int) -> None:
  if not processes.is_main():
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_increment(_LEFT, 1)
    _exit(status)
  # Process 0 last: with it goes what the others are connected to.
  end = time.monotonic() + HEARTBEAT
  while time.monotonic() < end:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      if int(_client().key_value_try_get(_LEFT)) >= processes.count() - 1:
        break
    time.sleep(0.05)
  _exit(status)


def fail(status: int, say: Callable[[], None] = lambda: None) -> None:
  """Ends all processes; returns in a single one, once it has spoken.

  Args:
    status: the exit status of all.
    say: says why; called in the process that is the first to fail.
  """
  if processes.count() == 1:
    say()
    return
  if _client().key_value_increment(f'{_ENDED}_count', 1) == 1:
    say()
    _client().key_value_set(f'{_ENDED}/status', str(status))
  _leave(status)


def wait_for_loss() -> None:
  """Gives the watch the time to end this process, where another was lost.

  For the error of a collective, which is the first that a survivor sees.
  """
  if processes.count() > 1:
    time.sleep(2 * HEARTBEAT)


def finish() -> None:
  """Leaves the run together with all others, at its good end."""
  if processes.count() == 1:
    return
  processes.barrier('the end')
  _leaving.set()
  processes.barrier('leaving', HEARTBEAT)
  if processes.is_main():
    # With process 0 goes what the others are connected to.
    while len(_client().get_live_nodes(list(range(processes.count())))) > 1:
      time.sleep(0.02)
  jax.distributed.shutdown()
