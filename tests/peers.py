"""Several processes on this machine that run one function together."""

import os
import pathlib
import signal
import socket
import tempfile
import time
import traceback
import types

from scripts import context


def free_address() -> str:
  """HOST:PORT where nobody listens."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'


class Group:
  """Processes that call `function(index, *arguments)`, joined to one run.

  Args:
    function: of a module that can be imported.
    arguments: values that can be pickled.
    count: of processes.
    devices: of each process.
  """

  def __init__(self, function, *arguments, count: int = 2, devices: int = 4):
    self._folder = tempfile.TemporaryDirectory()
    self._start = time.monotonic()
    address = free_address()
    self._processes = []
    for index in range(count):
      output = f'{self._folder.name}/{index}'
      given = function, arguments, address, count, index, devices, output
      process = context.Process(target=_main, args=given, daemon=True)
      process.start()
      self._processes.append(process)

  def kill(self, index: int) -> None:
    os.kill(self._processes[index].pid, signal.SIGKILL)

  def wait(self, seconds: float = 60) -> list[types.SimpleNamespace]:
    """Exit code, both outputs and seconds of each; kills what takes longer."""
    end = time.monotonic() + seconds
    ended = []
    for index, process in enumerate(self._processes):
      process.join(max(end - time.monotonic(), 0))
      late = process.is_alive()
      if late:
        process.kill()
        process.join()
      path = pathlib.Path(self._folder.name)
      ended.append(
        types.SimpleNamespace(
          code='late' if late else process.exitcode,
          seconds=time.monotonic() - self._start,
          out=(path / f'{index}.out').read_text(),
          err=(path / f'{index}.err').read_text(),
        )
      )
    self._folder.cleanup()
    return ended


def run(function, *arguments, count: int = 2, devices: int = 4) -> None:
  """Runs processes to their end, which must be a good one."""
  for ended in Group(function, *arguments, count=count, devices=devices).wait():
    assert ended.code == 0, ended


def _main(function, arguments, address, count, index, devices, output):
  for number, name in ((1, 'out'), (2, 'err')):
    file = os.open(f'{output}.{name}', os.O_CREAT | os.O_WRONLY)
    os.dup2(file, number)
  import jax

  from jaxrl_llm.runs import membership

  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  jax.config.update('jax_disable_most_optimizations', True)
  membership.initialize(address, count, index, timeout_s=60)
  try:
    function(index, *arguments)
  except BaseException:
    membership.fail(1, traceback.print_exc)
  membership.finish()
