"""Nothing outlives its worker, nor a worker the process that started it."""

import subprocess
import sys
import time

import hostile
import pytest

from jaxrl_llm.rewards import Workers, containment

HOSTILE = hostile.NAME


def test_a_process_group_alone_leaves_what_left_the_group(marked):
  """As its docstring says; and shows that `marked` would find a survivor."""
  with Workers(HOSTILE, workers=1, containment='group') as workers:
    assert hostile.begin(workers, ['1', 'detach']).result() == [1.0, 1.0]
  assert len(marked()) == 1


@pytest.mark.parametrize('kind', containment.KINDS)
def test_workers_end_with_a_parent_that_is_killed(kind, marked, allowed_kinds):
  """Also while a sample holds the interpreter's lock in C code."""
  if kind not in allowed_kinds:
    pytest.skip(f'the kernel allows no {kind}')
  detach = ['detach'] if kind != 'group' else []
  code = f"""
from jaxrl_llm.rewards import Workers
workers = Workers({HOSTILE!r}, timeout=1000, containment={kind!r})
samples = {detach} + ['hold the lock', 'hold the lock']
workers.submit([''] * len(samples), samples, dict())
print('begun', flush=True)
import time; time.sleep(1000)
"""
  parent = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE
  )
  assert parent.stdout.readline() == b'begun\n'
  assert hostile.until(lambda: len(marked()) >= 5 + len(detach))
  time.sleep(0.2)  # What has been started is now at work.
  parent.kill()
  parent.wait()
  assert hostile.until(lambda: not marked()), marked()
  parent.stdout.close()


def test_workers_end_with_a_parent_that_returns(marked):
  code = f"""
from jaxrl_llm.rewards import Workers
workers = Workers({HOSTILE!r}, timeout=1000)
pending = workers.submit([''] * 5, ['sleep'] * 5, dict())
"""
  done = subprocess.run([sys.executable, '-c', code], timeout=60)
  assert done.returncode == 0 and not marked()


def test_workers_end_with_a_parent_whose_pipes_are_held_by_others(marked):
  """By a child that it forked after it had started them."""
  code = f"""
import os, signal, time
from jaxrl_llm.rewards import Workers
workers = Workers({HOSTILE!r}, workers=1, timeout=1000)
workers.submit([''], ['sleep'], dict())
if os.fork():
  os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1000)
"""
  subprocess.run([sys.executable, '-c', code], timeout=60)
  assert hostile.until(lambda: len(marked()) == 1), marked()


def test_workers_survive_what_the_terminal_sends_and_know_no_jax():
  code = f"""
import os, signal, sys, time
from jaxrl_llm.rewards import Workers
signal.signal(signal.SIGINT, lambda *_: None)
with Workers({HOSTILE!r}, workers=1) as workers:
  ask = lambda what: workers(prompts=[''], completions=[what])
  before = ask('born')
  os.killpg(0, signal.SIGINT)
  time.sleep(0.1)
  assert ask('born') == before
  assert ask('heavy imports') == [0.0]
print(sys.path[0] in os.environ.get('PYTHONPATH', ''), 'jax' in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    start_new_session=True,
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.endswith(' False\n')
