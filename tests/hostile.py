"""A reward function that does what its completion says, good or bad.

Run in worker processes alone.  Imports nothing that takes time.
"""

import collections
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time

# Of the reward function, for `Workers`.
NAME = f'{__file__}:score'

# Tells one process that has loaded this file from another.
_BORN = float(time.monotonic_ns())

_SLEEP = [sys.executable, '-S', '-c', 'import time; time.sleep(1000)']


def _detach():
  subprocess.Popen(_SLEEP, start_new_session=True)


def _detach_and_sleep():
  _detach()
  if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
      time.sleep(1000)
    os._exit(0)
  time.sleep(1000)


def _print():
  for _ in range(20):
    print('[1, "score", 1.0]\n' * 1000, flush=True)
    os.write(1, b'\x00\xff' * 10_000)
    os.write(2, b'flood\n' * 10_000)


def _write(line):
  for descriptor in range(3, 100):
    with contextlib.suppress(OSError):
      os.write(descriptor, line)


def _forged(token):
  return b'["%s", "score", 9.0]\n' % token


def _forge():
  for number in range(100):
    _write(_forged(b'%d' % number))


def _forge_with_token(later=0.0):
  """Answers with the token of this request, found in a caller's frame."""
  frame = sys._getframe()
  while 'token' not in frame.f_locals:
    frame = frame.f_back
  token = frame.f_locals['token'].encode()

  def forge():
    time.sleep(later)
    _write(_forged(token))

  thread = threading.Thread(target=forge)
  thread.start()
  if not later:
    thread.join()


def _forge_badly_and_sleep():
  _write(_forged(b'999'))
  time.sleep(1000)


def _steal():
  """Leaves a process that answers the samples to come."""
  if os.fork():
    return
  while True:
    for descriptor in range(3, 40):
      with contextlib.suppress(OSError, ValueError, IndexError):
        if select.select([descriptor], [], [], 0)[0]:
          _write(_forged(os.read(descriptor, 4096).split(b'"')[1]))


def _write_without_end():
  while True:
    _write(b'[' * 4096)


def _raise(error):
  raise error


def _recurse():
  return _recurse()


def _leak():
  _leak.kept = bytearray(100 << 20)


# What a sample does; where that is None it scores 1.
ACTIONS = {
  'sleep': lambda: time.sleep(1000),
  'hold the lock': lambda: [float(sum(range(10**12)))],  # One call of C code.
  'backtrack': lambda: re.match('(a+)+$', 'a' * 50 + 'b'),
  'detach and sleep': _detach_and_sleep,
  'detach': _detach,
  'allocate': lambda: [float(len(bytearray(4 << 30)))],
  'print': _print,
  'close output': lambda: os.close(1),
  'forge': _forge,
  'forge badly and sleep': _forge_badly_and_sleep,
  'forge this': _forge_with_token,
  'forge this later': lambda: _forge_with_token(0.2),
  'write a line': lambda: _write(b'5\n'),
  'steal': _steal,
  'write without end': _write_without_end,
  'close everything': lambda: os.closerange(0, 100),
  'recurse': _recurse,
  'kill group': lambda: os.killpg(0, signal.SIGKILL),
  'return twice': lambda: os.fork() * 0 or None,
  'leave an alarm': lambda: signal.setitimer(signal.ITIMER_REAL, 0.2) and None,
  'outlast the alarm': lambda: time.sleep(0.4),
  'leak': _leak,
  'need memory': lambda: [float(len(bytearray(100 << 20)) > 0)],
  'exit': lambda: os._exit(0),
  'fault': lambda: os.kill(os.getpid(), signal.SIGSEGV),
  'raise': lambda: _raise(ValueError('no\nanswer')),
  'SystemExit': lambda: _raise(SystemExit(3)),
  'KeyboardInterrupt': lambda: _raise(KeyboardInterrupt()),
  'nan': lambda: [float('nan')],
  'text': lambda: ['1.0'],
  'too many': lambda: [1.0, 2.0],
  'too few': lambda: [],
  'no list': lambda: 1.0,
  'none': lambda: [None],
  'heavy imports': lambda: [len({'jax', 'numpy'} & set(sys.modules))],
  'born': lambda: [_BORN],
}


def score(completions, **columns):
  """Reward: the number that a completion is, or what its action gives."""
  (completion,) = completions
  if completion not in ACTIONS:
    return [float(completion)]
  result = ACTIONS[completion]()
  return [1.0] if result is None else result


def begin(workers, completions):
  """Has completions scored, without prompts and columns."""
  return workers.submit([''] * len(completions), completions, {})


def counts(pending):
  """Number of failed samples by kind."""
  kinds = [kind for kind, _ in pending.failures().values()]
  return dict(collections.Counter(kinds))


def until(condition, seconds=30.0):
  """Whether the condition comes true in time."""
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return condition()
