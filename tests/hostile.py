"""A reward function that does what its completion says, good or bad.

Run in worker processes alone.  Imports nothing that takes time.
"""

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


def _sleep():
  time.sleep(1000)


def _hold_the_lock():
  return [float(sum(range(10**12)))]  # One call of C code.


def _backtrack():
  return [float(re.match('(a+)+$', 'a' * 50 + 'b') is None)]


def _detach_and_sleep():
  subprocess.Popen(_SLEEP, start_new_session=True)
  if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
      time.sleep(1000)
    os._exit(0)
  time.sleep(1000)


def _detach():
  subprocess.Popen(_SLEEP, start_new_session=True)
  return [1.0]


def _allocate():
  return [float(len(bytearray(4 << 30)))]


def _print():
  for _ in range(20):
    print('[1, "score", 1.0]\n' * 1000, flush=True)
    os.write(1, b'\x00\xff' * 10_000)
    os.write(2, b'flood\n' * 10_000)
  return [1.0]


def _close_output():
  os.close(1)
  return [1.0]


def _write(line):
  for descriptor in range(3, 100):
    with contextlib.suppress(OSError):
      os.write(descriptor, line)


def _forge():
  for number in range(100):
    _write(b'[%d, "score", 9.0]\n' % number)
  return [1.0]


def _forge_reply_to(ahead, seconds=0.0):
  """Writes a reply to this request or one after it, maybe some time later."""

  def forge(number):
    time.sleep(seconds)
    _write(b'[%d, "score", 9.0]\n' % number)

  thread = threading.Thread(target=forge, args=(score.calls + ahead,))
  thread.start()
  if not seconds:
    thread.join()
  return [1.0]


def _write_a_line():
  _write(b'5\n')
  return [1.0]


def _print_a_line():
  print(f'[{score.calls + 1}, "score", 9.0]', flush=True)
  os.write(1, b'5\n')
  return [1.0]


def _forge_badly_and_sleep():
  _write(b'[999, "score", 9.0]\n')
  time.sleep(1000)


def _steal():
  """Leaves a process that answers the samples to come."""
  if os.fork():
    return [1.0]
  while True:
    for descriptor in range(3, 40):
      with contextlib.suppress(OSError, ValueError, IndexError):
        if select.select([descriptor], [], [], 0)[0]:
          number = os.read(descriptor, 4096).split(b',')[0][1:]
          _write(b'[%s, "score", 9.0]\n' % number)


def _write_without_end():
  while True:
    _write(b'[' * 4096)


def _close_everything():
  os.closerange(0, 100)
  return [1.0]


def _raise(error):
  raise error


def _recurse():
  return _recurse()


def _kill_group():
  os.killpg(0, signal.SIGKILL)


def _return_twice():
  os.fork()
  return [1.0]


def _leave_an_alarm():
  signal.setitimer(signal.ITIMER_REAL, 0.2)
  return [1.0]


def _outlast_the_alarm():
  time.sleep(0.4)
  return [1.0]


def _leak():
  _leak.kept = bytearray(100 << 20)
  return [1.0]


def _need_memory():
  return [float(len(bytearray(100 << 20)) > 0)]


ACTIONS = {
  'sleep': _sleep,
  'hold the lock': _hold_the_lock,
  'backtrack': _backtrack,
  'detach and sleep': _detach_and_sleep,
  'detach': _detach,
  'allocate': _allocate,
  'print': _print,
  'close output': _close_output,
  'forge': _forge,
  'forge badly and sleep': _forge_badly_and_sleep,
  'forge this': lambda: _forge_reply_to(0),
  'forge the next': lambda: _forge_reply_to(1),
  'forge the next later': lambda: _forge_reply_to(1, 0.2),
  'write a line': _write_a_line,
  'print a line': _print_a_line,
  'steal': _steal,
  'write without end': _write_without_end,
  'close everything': _close_everything,
  'recurse': _recurse,
  'kill group': _kill_group,
  'return twice': _return_twice,
  'leave an alarm': _leave_an_alarm,
  'outlast the alarm': _outlast_the_alarm,
  'leak': _leak,
  'need memory': _need_memory,
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
  score.calls += 1
  if completion in ACTIONS:
    return ACTIONS[completion]()
  return [float(completion)]


score.calls = 0  # The number of a request in its process.


def begin(workers, completions):
  """Has completions scored, without prompts and columns."""
  return workers.submit([''] * len(completions), completions, {})


def until(condition, seconds=30.0):
  """Whether the condition comes true in time."""
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return condition()
