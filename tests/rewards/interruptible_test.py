"""Whoever waits for rewards can be told to stop, soon and without remains."""

import threading
import time

import hostile
import pytest

from jaxrl_llm.rewards import RewardPart, Workers, interruptible, start
from jaxrl_llm.rewards.code import code_tests
from jaxrl_llm.signals import StopRequested

# Seconds: what is asked ten times a second, on a machine that is busy.
SOON = 10.0


class Stop:
  """Asks to stop when it has been polled a few times."""

  def __init__(self, after: int = 3):
    self.left = after

  def check(self):
    self.left -= 1
    if self.left <= 0:
      raise StopRequested('SIGTERM')


def stops(wait, seconds=SOON):
  began = time.monotonic()
  with interruptible.checked(Stop().check), pytest.raises(StopRequested):
    wait()
  assert time.monotonic() - began < seconds


def test_a_stop_ends_the_wait_for_workers(marked):
  with Workers(hostile.NAME, workers=2, timeout=1000) as workers:
    parts = [RewardPart('slow', workers)]
    stops(start(parts, [''] * 3, ['sleep', 'sleep', '1'], {}))
  assert not marked()


def test_a_stop_ends_the_wait_for_a_function_that_loads(marked, tmp_path):
  file = tmp_path / 'slow.py'
  file.write_text('import time; time.sleep(1000)\ndef score(**columns): ...')
  stops(lambda: Workers(f'{file}:score', workers=1))
  assert not marked()


def test_scores_that_come_in_time_are_unchanged_by_questions():
  asked = []
  with Workers(hostile.NAME, workers=1) as workers:
    pending = hostile.begin(workers, ['outlast the alarm', 'raise', '2'])
    with interruptible.checked(lambda: asked.append(1)):
      assert pending.result() == [1.0, None, 2.0]
  assert len(asked) >= 2


def test_a_question_is_asked_within_its_block_and_its_thread_alone():
  stop = Stop(after=0)
  event = threading.Event()
  event.set()
  with interruptible.checked(stop.check):
    thread = threading.Thread(target=interruptible.wait, args=(event.wait,))
    thread.start()
    thread.join()
    assert stop.left == 0
    with interruptible.checked(lambda: None):
      interruptible.wait(event.wait)
    with pytest.raises(StopRequested):
      interruptible.wait(event.wait)
  interruptible.wait(event.wait)


def test_a_stop_is_no_failure_of_a_function_that_runs_programs():
  function = code_tests(timeout=3.0, parallel=1)
  endless = [f'while True: {i}' for i in range(20)]
  columns = {'test_list': [['assert f() == 1']] * 20}
  # One after the other they would take a minute.
  stops(start([RewardPart('code', function)], [''] * 20, endless, columns), 30)
