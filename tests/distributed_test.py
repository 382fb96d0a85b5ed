"""Processes that meet: the same answers in all of them, and in one alone."""

import time

import jax
import numpy as np
import peers
import pytest

from jaxrl_llm import distributed
from jaxrl_llm.errors import UserError


def rows(index):
  """The rows of a process: their number, and bits that float32 has not."""
  return {
    'a': np.arange(2 + index)[:, None] / 3 + index,
    'b': np.array(['é' * (index + 1)] * 2),
    'none': np.zeros((0, 2), np.int64),
  }


def meet(index):
  count = distributed.count()
  assert (count, distributed.index()) == (3, index)
  assert distributed.is_main() == (index == 0)
  assert jax.device_count() == 2 * jax.local_device_count() * 3 // 2
  assert [distributed.agree(index == i) for i in (0, 2, 5)] == [1, 1, 0]
  wanted = jax.tree.map(
    lambda *parts: np.concatenate(parts), *map(rows, range(count))
  )
  found = distributed.gather(rows(index))
  for name, array in wanted.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)
  values = distributed.gather_objects({'at': index, 'text': 'x' * 10**index})
  assert [(v['at'], len(v['text'])) for v in values] == [
    (0, 1),
    (1, 10),
    (2, 100),
  ]
  calls = []
  given = distributed.on_main(lambda: calls.append(index) or [index, 'é'], 'w')
  assert given == [0, 'é'] and len(calls) == (index == 0)
  with pytest.raises(UserError, match='of process 0'):
    distributed.on_main(lambda: fail(f'of process {index}'), 'a failure')


def fail(message):
  raise UserError(message)


def late(index):
  time.sleep(1.5 if index == 1 else 0)
  with pytest.raises(UserError) as caught:
    distributed.barrier('tea', 0.5)
  if index != 1:
    assert "process 1 of 3 did not come to 'tea'" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
  assert distributed.all_come('dinner', 60)
  assert index == 2 or not distributed.all_come('supper', 0.5)


def all_checks(index):
  meet(index)
  late(index)


def test_processes_agree():
  peers.run(all_checks, count=3, devices=2)


def test_one_process_needs_nobody():
  assert (distributed.count(), distributed.index()) == (1, 0)
  assert distributed.is_main()
  distributed.barrier('nobody', 0.0)
  assert distributed.all_come('nobody', 0.0)
  assert distributed.agree(True) and not distributed.agree(False)
  own = rows(1)
  found = distributed.gather(own)
  assert all(found[name] is own[name] for name in own)
  assert distributed.gather_objects({'a': (1, 2)}) == [{'a': [1, 2]}]
  assert distributed.on_main(lambda: (1, 2), 'a value') == (1, 2)
  with pytest.raises(UserError, match='mine'):
    distributed.on_main(lambda: fail('mine'), 'a value')
  with pytest.raises(TypeError, match='objects'):
    distributed.gather(np.array([None]))
