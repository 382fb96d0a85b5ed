"""A reward worker's process, started by `workers.Workers` alone.

Descriptor 0 is a socket with a line of JSON per request, [token, content], and
per reply, [token, kind, content]; a request's token is random.  The first one
is the specification: name, settings and field as in `calling.load_reward`, a
kind of containment or null for the strongest, memory in bytes.  Its reply is
"ready", with what the process has found out, or "user".  The others are the
arguments of one sample.  Replies to them:

  "score"   a finite number or null
  "error"   a message: the function raised, or did not return a score
  "memory"  a message: the function exceeded its memory
  "user"    the message of a UserError
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
import socket
from collections.abc import Callable
from typing import Any

from jaxrl_llm import naming
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import calling, containment

# Characters of a UserError's message, whose lines are kept.
_MAX_MESSAGE = 2000


def main() -> None:
  """Supervises the process that scores; exits with its status."""
  channel, status = socket.socket(fileno=os.dup(0)), 1
  line = channel.makefile('rb').readline()
  if not line.endswith(b'\n'):
    os._exit(status)  # The process that started this one is gone.
  token, spec = json.loads(line)
  kind = spec['containment'] = spec['containment'] or containment.strongest()
  try:
    work = functools.partial(_work, channel, token, spec)
    status = containment.run(work, kind)
  except OSError as error:
    message = f'containment {kind!r} does not work here: {error}'
    _send(channel, token, 'user', message)
  os._exit(status)


def _work(channel: socket.socket, token: str, spec: dict[str, Any]) -> int:
  """Loads the function and answers requests until there are no more."""
  # Printed output is discarded: no amount of it can block.
  nothing = os.open(os.devnull, os.O_RDWR)
  for descriptor in (0, 1, 2):
    os.dup2(nothing, descriptor)
  # A process that the function leaves behind could answer later requests.
  os.register_at_fork(after_in_child=channel.close)
  _limit(spec['memory'])
  name, field = spec['name'], spec['field']
  try:
    function = calling.load_reward(name, spec['settings'], field, killable=True)
    getattr(function, 'warm_up', lambda: None)()
  except BaseException as error:
    problem = f'{field}: {name} does not load\n{_said(error)}'
    user = str(error)[:_MAX_MESSAGE]
    mistake = isinstance(error, UserError)
    _send(channel, token, 'user', user if mistake else problem)
    return 1
  file = pathlib.Path(naming.file_of(name) or os.devnull)
  ready = dict(
    containment=spec['containment'],
    source=hashlib.sha256(file.read_bytes()).hexdigest(),
    parameters=calling.parameters(function),
  )
  _send(channel, token, 'ready', ready)
  pid = os.getpid()
  with open(channel.fileno(), 'rb', closefd=False) as requests:
    for line in requests:
      token, arguments = json.loads(line)
      reply = _score(name, function, arguments)
      if os.getpid() != pid:
        return 1  # The function has forked, and both copies returned.
      _send(channel, token, *reply)
  return 0


def _score(name: str, function: Callable, arguments: dict) -> tuple[str, Any]:
  """Calls the function on one sample and catches whatever it raises."""
  try:
    result = function(**arguments)
  except UserError as error:
    return 'user', str(error)[:_MAX_MESSAGE]
  except BaseException as error:
    kind = 'memory' if isinstance(error, MemoryError) else 'error'
    return kind, _said(error)
  try:
    (score,) = calling.as_floats(name, result, [''])
  except Exception:
    return 'error', f'returned {calling.shortened(repr(result))}'
  return 'score', None if math.isnan(score) else score


def _said(error: BaseException) -> str:
  """Returns an exception's type and message in one line."""
  text = f'{type(error).__name__}: {error}'.removesuffix(': ')
  return calling.shortened(text, 200)


def _send(channel: socket.socket, *message: Any) -> None:
  channel.sendall(json.dumps(message).encode() + b'\n')


def _limit(memory: int) -> None:
  """Bounds memory in bytes, where the system enforces it."""
  # Crashes need no core file, and if the machine runs out of memory
  # nevertheless, this process must be killed before others.
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/oom_score_adj').write_text('1000')
  # RLIMIT_DATA counts only writable memory, not mapped files and libraries, but
  # some systems do not enforce it.
  for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
    with contextlib.suppress(OSError, ValueError):  # Unknown, or lower already.
      resource.setrlimit(kind, (memory, memory))
    try:
      mmap.mmap(-1, memory, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON).close()
    except OSError:
      break
