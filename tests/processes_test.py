"""Processes that meet: the same answers in all of them, and in one alone."""

import time

import jax
import numpy as np
import peers
import pytest

from jaxrl_llm import processes
from jaxrl_llm.errors import UserError


def rows(index):
  """The rows of a process: their number, and bits that float32 has not."""
  return {
    'a': np.arange(2 + index)[:, None] / 3 + index,
    'b': np.array(['é' * (index + 1)] * 2),
    'none': np.zeros((0, 2), np.int64),
  }


def meet(index):
  count = processes.count()
  assert (count, processes.index()) == (3, index)
  assert processes.is_main() == (index == 0)
  assert jax.device_count() == 2 * jax.local_device_count() * 3 // 2
  assert [processes.agree(index == i) for i in (0, 2, 5)] == [1, 1, 0]
  wanted = jax.tree.map(
    lambda *parts: np.concatenate(parts), *map(rows, range(count))
  )
  found = processes.gather(rows(index))
  for name, array in wanted.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)
  values = processes.gather_objects({'at': index, 'text': 'x' * 10**index})
  assert [(v['at'], len(v['text'])) for v in values] == [
    (0, 1),
    (1, 10),
    (2, 100),
  ]
  calls = []
  given = processes.on_main(lambda: calls.append(index) or [index, 'é'], 'w')
  assert given == [0, 'é'] and len(calls) == (index == 0)
  with pytest.raises(UserError, match='of process 0'):
    processes.on_main(lambda: fail(f'of process {index}'), 'a failure')


def fail(message):
  raise UserError(message)


def late(index):
  time.sleep(1.5 if index == 1 else 0)
  with pytest.raises(UserError) as caught:
    processes.barrier('tea', 0.5)
  if index != 1:
    assert "process 1 of 3 did not reach 'tea'" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
  assert processes.all_come('dinner', 60)
  assert index == 2 or not processes.all_come('supper', 0.5)


def all_checks(index):
  meet(index)
  late(index)


def test_processes_agree():
  peers.run(all_checks, count=3, devices=2)


def test_one_process_needs_nobody():
  assert (processes.count(), processes.index()) == (1, 0)
  assert processes.is_main()
  processes.barrier('nobody', 0.0)
  assert processes.all_come('nobody', 0.0)
  assert processes.agree(True) and not processes.agree(False)
  own = rows(1)
  found = processes.gather(own)
  assert all(found[name] is own[name] for name in own)
  assert processes.gather_objects({'a': (1, 2)}) == [{'a': [1, 2]}]
  assert processes.on_main(lambda: (1, 2), 'a value') == (1, 2)
  with pytest.raises(UserError, match='mine'):
    processes.on_main(lambda: fail('mine'), 'a value')
  with pytest.raises(TypeError, match='objects'):
    processes.gather(np.array([None]))
