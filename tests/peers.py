"""Several processes on this machine that run one function together."""

import json
import os
import pathlib
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
    only: starts this one alone.
    timeout_s: seconds in which the processes must meet.
  """

  def __init__(
    self, function, *arguments, count=2, devices=4, only=None, timeout_s=60
  ):
    self._folder = tempfile.TemporaryDirectory()
    flags = free_address(), count
    self._processes = []
    for index in range(count) if only is None else [only]:
      output = f'{self._folder.name}/{len(self._processes)}'
      given = function, arguments, *flags, index, timeout_s, devices, output
      process = context.Process(target=_main, args=given, daemon=True)
      process.start()
      self._processes.append(process)

  def wait(self, seconds: float = 60) -> list[types.SimpleNamespace]:
    """Exit code and both outputs of each; kills what takes longer."""
    end = time.monotonic() + seconds
    ended = []
    for i, process in enumerate(self._processes):
      process.join(max(end - time.monotonic(), 0))
      code = process.exitcode
      process.kill()
      process.join()
      out, err = (
        pathlib.Path(f'{self._folder.name}/{i}.{name}').read_text()
        for name in ('out', 'err')
      )
      code = 'late' if code is None else code
      ended.append(types.SimpleNamespace(code=code, out=out, err=err))
    self._folder.cleanup()
    return ended


def run(function, *arguments, count=2, devices=4, seconds=300) -> None:
  """Runs processes to their end, which must be a good one."""
  group = Group(function, *arguments, count=count, devices=devices)
  ended = group.wait(seconds)
  assert [each.code for each in ended] == [0] * count, ended


def compute(function, *arguments, devices=8):
  """What a process of several devices computes; its last line is JSON."""
  group = Group(_print, function, *arguments, count=1, devices=devices)
  [ended] = group.wait(300)
  assert ended.code == 0, ended
  return json.loads(ended.out.splitlines()[-1])


def _print(index, function, *arguments):
  print(json.dumps(function(*arguments)))


def _main(
  function, arguments, address, count, index, timeout_s, devices, output
):
  for number, name in ((1, 'out'), (2, 'err')):
    os.dup2(os.open(f'{output}.{name}', os.O_CREAT | os.O_WRONLY), number)
  import jax

  from jaxrl_llm import processes

  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  jax.config.update('jax_disable_most_optimizations', True)
  processes.initialize(address, count, index, timeout_s)
  try:
    function(index, *arguments)
  except BaseException:
    processes.fail(1, traceback.print_exc)
    raise
  processes.finish()
