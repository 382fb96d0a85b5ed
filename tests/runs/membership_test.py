"""Processes that come late, fail or are lost: all end, one says why."""

import os
import signal
import threading
import time

import jax
import numpy as np
import peers
import pytest

from jaxrl_llm import processes
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import membership
from jaxrl_llm.signals import StopRequested, StopSignal

SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[001-002]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
}


def check_message(ended, text):
  """The message is the last that a process says, in at most three lines."""
  lines = ended.err.rstrip('\n').split('\n')
  [at] = [i for i, line in enumerate(lines) if line.startswith('error: ')]
  assert text in lines[at] and len(lines) - at <= 3, ended.err
  return lines[:at]


def lose(index, which, at, moment):
  """One process is killed while the others wait for it."""
  processes.barrier('all are here')
  if index == which:
    moment.touch()
    os.kill(os.getpid(), signal.SIGKILL)
  if at == 'barrier':
    processes.barrier('never')
  else:
    try:
      while True:
        jax.experimental.multihost_utils.process_allgather(np.zeros(3))
    except jax.errors.JaxRuntimeError:
      membership.wait_for_loss()


def check_loss(folder, which, at, count):
  """Loses a process; returns what the others have said before the message."""
  moment = folder / 'moment'
  ended = peers.Group(lose, which, at, moment, count=count, devices=1).wait()
  assert time.time() - moment.stat().st_mtime < 30
  assert ended.pop(which).code == -signal.SIGKILL
  assert [each.code for each in ended] == [1] * (count - 1)
  text = f'process {which} of {count}'
  return [line for each in ended for line in check_message(each, text)]


def test_the_loss_of_process_0_ends_the_others(tmp_path):
  check_loss(tmp_path, 0, 'barrier', 2)


@pytest.mark.slow  # It takes the 10 s of the heartbeat.
def test_the_loss_of_another_ends_all_with_one_message(tmp_path):
  assert check_loss(tmp_path, 1, 'barrier', 3) == []


@pytest.mark.slow
@pytest.mark.parametrize('which', [0, 1])
def test_a_loss_in_the_middle_of_a_collective(tmp_path, which):
  check_loss(tmp_path, which, 'collective', 2)


def fail(index, which):
  processes.barrier('all are here')
  if index == which:
    raise KeyError(f'of process {which}')
  processes.barrier('never')


@pytest.mark.parametrize('which', [0, 1])
def test_a_failure_ends_all_and_is_told_once(which):
  ended = peers.Group(fail, which, count=2, devices=1).wait()
  assert [each.code for each in ended] == [1, 1]
  assert f'of process {which}' in ended[which].err
  assert ended[1 - which].err == ''


def stop(index, number):
  with StopSignal() as signals:
    if index == 1:
      threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    for step in range(1000):
      time.sleep(0.01)
      signals.check_alone()
      try:
        signals.check()
      except StopRequested as request:
        assert str(request) == signal.Signals(number).name
        assert processes.gather_objects(step) == [step, step]
        return
  raise AssertionError('nothing has stopped it')


def test_a_signal_to_one_stops_all_at_the_same_step():
  peers.run(stop, signal.SIGTERM, devices=1)


def test_wrong_arguments_are_refused():
  wrong = [
    ('localhost:1', None, None),
    ('localhost:1', 2, None),
    (None, 2, 0),
    (None, None, 1),
    ('localhost', 2, 0),
    ('localhost:1', 2, 2),
    ('localhost:1', 2, -1),
    (None, 1, 1),
    ('localhost:1', 0, 0),
  ]
  for arguments in wrong:
    with pytest.raises(UserError) as caught:
      membership.initialize(*arguments)
    assert len(str(caught.value).splitlines()) <= 3
  start = time.monotonic()
  with pytest.raises(UserError, match='process 0 does not answer'):
    membership.initialize(peers.free_address(), 2, 1, timeout_s=0)
  assert time.monotonic() - start < 30


def test_no_launcher_no_processes(monkeypatch):
  membership.initialize()
  membership.initialize(num_processes=1)
  membership.initialize('localhost:1', 1, 0)
  assert processes.count() == 1
  # Inside an allocation of two tasks, but in a step of its own.
  for name, value in {**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}.items():
    monkeypatch.setenv(name, value)
  membership.initialize()
  assert processes.count() == 1


def slurm(index):
  del index
  assert processes.count() == 2


@pytest.mark.parametrize(
  ('tasks', 'local'), [('1(x2)', None), ('2', [0]), ('2,1(x2)', [0])]
)
def test_slurm_tells_all(monkeypatch, tasks, local):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
  monkeypatch.setenv('SLURM_STEP_TASKS_PER_NODE', tasks)
  asked = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *given, **_: asked.append(given)
  )
  monkeypatch.setattr(membership, '_wait_for', lambda *_: None)
  monkeypatch.setattr(membership, '_explain_loss_of_main', lambda *_: None)
  monkeypatch.setattr(threading.Thread, 'start', lambda _: None)
  membership.initialize()
  assert asked == [('node001:61447', 2, 1, local)]
