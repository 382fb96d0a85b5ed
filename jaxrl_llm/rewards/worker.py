"""A reward worker's process: `python -m jaxrl_llm.rewards.worker`.

Started only by `workers.Workers`.  The first line of descriptor 0 is JSON:

  name, settings, field   as in `calling.load_reward`
  containment             a kind of `containment.KINDS`; null for the strongest
  memory                  bytes
  timeout                 seconds
  environment             names of variables; read by the parent only
  pythonpath              value of PYTHONPATH for the function; null for none

Requests follow on descriptor 0 and replies go to descriptor 1, a line of JSON
each.  The first reply is

  ["failed", message]   nothing follows
  ["ready", {…}]         the fields of `worker_process.Ready`

Requests start after it.  Every request [number, arguments] gets one reply
[number, kind, x]:

  "score"   x is a finite number or null
  "error"   x is a message: the function raised, or did not return a score
  "memory"  x is a message: the function exceeded its memory
  "user"    x is the message of a UserError
"""

import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import pathlib
import resource
import time
from collections.abc import Callable
from typing import Any

from jaxrl_llm import naming
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import calling, containment

# Characters of a UserError's message, whose lines are kept.
_MAX_MESSAGE = 2000


def main() -> int:
  """Supervises the process that scores; returns its exit status."""
  line = _first_line(0)
  if not line.endswith(b'\n'):
    return 1  # The process that started this one is gone.
  spec = json.loads(line)
  kind = spec['containment'] or containment.strongest()
  try:
    return containment.run(functools.partial(_work, spec, kind), kind)
  except OSError as error:
    _send(1, ['failed', f'containment {kind!r} does not work here: {error}'])
    return 1


def _first_line(descriptor: int) -> bytes:
  """Reads a line; nothing follows it before it is answered."""
  line = b''
  while not line.endswith(b'\n'):
    received = os.read(descriptor, 1 << 16)
    if not received:
      break
    line += received
  return line


def _work(spec: dict[str, Any], kind: str) -> int:
  """Loads the function and answers requests until there are no more."""
  requests, replies = _take_channel()
  _close_in_children([requests, replies])
  _restore_path(spec['pythonpath'])
  limited = _limit(spec['memory'])
  try:
    function = calling.load_reward(
      spec['name'], spec['settings'], spec['field'], killable=True
    )
  except UserError as error:
    _send(replies, ['failed', str(error)[:_MAX_MESSAGE]])
    return 1
  except BaseException as error:
    message = f'{spec["field"]}: {spec["name"]} does not load\n{_said(error)}'
    _send(replies, ['failed', message])
    return 1
  ready = {
    'containment': kind,
    'memory_limited': limited,
    'parameters': calling.parameters(function),
    'source': _digest(naming.file_of(spec['name'])),
  }
  _send(replies, ['ready', ready])
  pid = os.getpid()
  with open(requests, 'rb') as lines:
    for line in lines:
      number, arguments = json.loads(line)
      _limit_cpu(spec['timeout'])
      reply = _score(spec['name'], function, arguments)
      if os.getpid() != pid:
        return 1  # The function has forked, and both copies returned.
      _send(replies, [number, *reply])
  return 0


def _score(name: str, function: Callable, arguments: dict) -> tuple[str, Any]:
  """Calls the function on one sample and catches whatever it raises."""
  try:
    try:
      result = function(**arguments)
    except UserError as error:
      return 'user', str(error)[:_MAX_MESSAGE]
    try:
      score = calling.as_float(calling.as_list(name, result, 1)[0])
    except ValueError:
      return 'error', f'returned {calling.shortened(repr(result))}'
  except MemoryError as error:
    return 'memory', _said(error)
  except BaseException as error:
    return 'error', _said(error)
  return 'score', None if math.isnan(score) else score


def _said(error: BaseException) -> str:
  """Returns an exception's type and message in one line."""
  text = f'{type(error).__name__}: {error}'.removesuffix(': ')
  return calling.shortened(text, 200)


def _take_channel() -> tuple[int, int]:
  """Moves the channel away from the function's standard streams.

  Printed output is discarded: no amount of it can block, or be read as a reply.
  """
  requests, replies = os.dup(0), os.dup(1)
  nothing = os.open(os.devnull, os.O_RDWR)
  for descriptor in (0, 1, 2):
    os.dup2(nothing, descriptor)
  os.close(nothing)
  return requests, replies


def _close_in_children(descriptors: list[int]) -> None:
  """Closes the channel in processes that the function forks.

  A surviving one could read later requests and answer them.
  """

  def close():
    while descriptors:  # Once: its own children may reuse the numbers.
      os.close(descriptors.pop())

  os.register_at_fork(after_in_child=close)


def _send(descriptor: int, message: Any) -> None:
  line = json.dumps(message).encode() + b'\n'
  while line:
    line = line[os.write(descriptor, line) :]


def _restore_path(value: str | None) -> None:
  """Undoes the PYTHONPATH that this process was started with.

  It is the import path of the parent, which is not for the function's children.
  """
  os.environ.pop('PYTHONPATH', None)
  if value is not None:
    os.environ['PYTHONPATH'] = value


def _digest(file: str | None) -> str | None:
  if file is None or not os.path.isfile(file):
    return None
  return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()


def _limit(memory: int) -> bool:
  """Bounds memory in bytes; returns False if this is not enforced."""
  # Crashes need no core file, and if the machine runs out of memory
  # nevertheless, this process must be killed before others.
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/oom_score_adj').write_text('1000')
  # RLIMIT_DATA counts only writable memory, not mapped files and libraries, but
  # some systems do not enforce it.
  for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
    _, hard = resource.getrlimit(kind)
    bound = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    try:
      resource.setrlimit(kind, (bound, bound))
    except (OSError, ValueError):
      continue
    try:
      mmap.mmap(-1, bound, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON).close()
    except OSError:
      return True
  return False


def _limit_cpu(timeout: float) -> None:
  """Lets this process end by itself if the parent cannot end it.

  The limit allows all cores to work for the whole time-out.
  """
  _, hard = resource.getrlimit(resource.RLIMIT_CPU)
  seconds = time.process_time() + timeout * (os.cpu_count() or 1)
  soft = math.ceil(seconds) + 1
  if hard == resource.RLIM_INFINITY or soft < hard:
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == '__main__':
  os._exit(main())
