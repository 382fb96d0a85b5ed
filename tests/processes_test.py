"""Processes that meet, agree, come late, fail or are lost."""

import contextlib
import os
import signal
import sys
import threading
import time

import jax
import numpy as np
import peers
import pytest
from mistakes import refused

from jaxrl_llm import processes
from jaxrl_llm.errors import UserError
from jaxrl_llm.signals import StopRequested, StopSignal


def rows(index):
  """The rows of a process: their number, and bits that float32 has not."""
  return {
    'a': np.arange(2 + index)[:, None] / 3 + index,
    'b': np.array(['é' * (index + 1)] * 2),
    'none': np.zeros((0, 2), np.int64),
  }


def raise_(error):
  raise error


def meet(index):
  count = processes.count()
  assert (count, processes.index()) == (3, index)
  assert processes.is_main() == (index == 0)
  assert jax.device_count() == 3 * jax.local_device_count()
  assert [processes.agree(index == i) for i in (0, 2, 5)] == [1, 1, 0]
  parts = [processes.own_part(7), slice(0, 2), slice(2, 4), slice(4, 7)]
  assert parts[0] == parts[1 + index]
  found = processes.gather(rows(index))
  for name, parts in jax.tree.map(lambda *x: x, *map(rows, range(3))).items():
    wanted = np.concatenate(parts)
    assert found[name].dtype == wanted.dtype
    np.testing.assert_array_equal(found[name], wanted)
  values = processes.gather_objects((index, 'x' * 10**index))
  assert values == [[i, 'x' * 10**i] for i in range(3)]
  calls = []
  result = processes.on_main(lambda: calls.append(index) or (index, 'é'), 'w')
  assert result == [0, 'é'] and len(calls) == (index == 0)
  with pytest.raises(UserError, match='of process 0'):
    error = UserError(f'of process {index}')
    processes.on_main(lambda: raise_(error), 'a failure')
  time.sleep(1.5 if index == 1 else 0)
  with pytest.raises(UserError) as caught:
    processes.barrier('tea', 0.5)
  if index != 1:
    assert "process 1 of 3 did not reach 'tea'" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
  assert processes.all_come('dinner', 60)
  assert index == 2 or not processes.all_come('supper', 0.5)


def test_processes_agree():
  peers.run(meet, count=3, devices=2)


def test_one_process_needs_nobody():
  processes.initialize(num_processes=1)
  processes.initialize('localhost:1', 1, 0)
  assert (processes.count(), processes.index()) == (1, 0)
  assert processes.is_main()
  processes.barrier('nobody', 0.0)
  assert processes.all_come('nobody', 0.0)
  assert processes.agree(True) and not processes.agree(False)
  assert processes.own_part(5) == slice(0, 5)
  jax.tree.map(
    np.testing.assert_array_equal, processes.gather(rows(1)), rows(1)
  )
  assert processes.gather_objects({'a': (1, 2)}) == [{'a': [1, 2]}]
  assert processes.on_main(lambda: (1, 2), 'a value') == (1, 2)
  with pytest.raises(UserError, match='mine'):
    processes.on_main(lambda: raise_(UserError('mine')), 'a value')
  with pytest.raises(ValueError, match='Object'):
    processes.gather(np.array([None]))


def lose(index, which, at, moment):
  """One process is killed while the others wait for it."""
  processes.barrier('all are here')
  if index == which:
    moment.touch()
    os.kill(os.getpid(), signal.SIGKILL)
  if at == 'barrier':
    processes.barrier('never')
  try:
    while True:
      jax.experimental.multihost_utils.process_allgather(np.zeros(3))
  except jax.errors.JaxRuntimeError:
    processes.wait_for_loss()


@pytest.mark.parametrize(
  'which, at, count',
  [
    (0, 'barrier', 2),
    # These take the 10 s of the heartbeat.
    pytest.param(1, 'barrier', 3, marks=pytest.mark.slow),
    pytest.param(0, 'collective', 2, marks=pytest.mark.slow),
    pytest.param(1, 'collective', 2, marks=pytest.mark.slow),
  ],
)
def test_a_loss_ends_the_others(tmp_path, which, at, count):
  moment = tmp_path / 'moment'
  ended = peers.Group(lose, which, at, moment, count=count, devices=1).wait()
  assert time.time() - moment.stat().st_mtime < 30
  assert ended.pop(which).code == -signal.SIGKILL
  for each in ended:
    assert each.code == 1, each
    # Among the lines of C++, which aborts.
    errors = [x for x in each.err.splitlines() if x.startswith('error: ')]
    assert len(errors) == 1 and f'process {which} of {count}' in errors[0], each


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


@pytest.mark.parametrize(
  'flags',
  [
    ('localhost:1', None, None),
    ('localhost:1', 2, None),
    (None, 2, 0),
    (None, None, 1),
    ('localhost', 2, 0),
    ('localhost:1', 2, 2),
    ('localhost:1', 2, -1),
    (None, 1, 1),
    ('localhost:1', 0, 0),
  ],
)
def test_wrong_flags_are_refused(flags):
  with refused('--coordinator=HOST:PORT'):
    processes.initialize(*flags)
  assert processes.count() == 1


@pytest.mark.parametrize('index', [0, 1])
def test_who_comes_alone_says_so(index):
  [ended] = peers.Group(fail, 0, only=index, timeout_s=2, devices=1).wait(30)
  assert ended.code == 2 and len(ended.err.splitlines()) <= 3, ended
  assert 'not all processes have come within 2 s' in ended.err


def test_a_jax_without_a_coordination_service(monkeypatch):
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setitem(sys.modules, 'jax._src.distributed', None)
  with pytest.raises(UserError, match=f'jax {jax.__version__} lacks'):
    processes.count()


SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NUM_TASKS': '2'}
POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1'}
MPI = {'OMPI_COMM_WORLD_SIZE': '2', 'SLURM_STEP_NUM_TASKS': '1'}


@pytest.mark.parametrize(
  'variables, devices',
  [
    (POD, 'alone'),
    ({**POD, 'JOB_COMPLETION_INDEX': '1'}, None),
    ({**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}, 'alone'),
    ({**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '1(x2)'}, []),
    ({**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '2'}, None),
    ({**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '2,1(x2)'}, None),
    ({**SLURM, **MPI, 'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}, None),
    ({**SLURM, **MPI, 'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, []),
  ],
)
def test_launchers(monkeypatch, variables, devices):
  """JAX is asked; a process that is alone on its host has all its devices."""
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  found = ['alone']

  def initialize(*flags, local_device_ids, cluster_detection_method, **options):
    assert (*flags, cluster_detection_method) == (None,) * 4
    found[:] = [local_device_ids]
    raise RuntimeError('it\nsays\nno')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with contextlib.suppress(UserError):
    processes.initialize()
  assert found == [devices]
