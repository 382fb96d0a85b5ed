"""What a run says where nobody can read it any longer."""

import errno
import io
import os
import signal
import sys

import pytest

from experiments import run
from jaxrl_llm import runs
from jaxrl_llm.runs.progress import say

ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EIO)


class Broken(io.StringIO):
  """A stream that can be written to until `broken` is set."""

  def __init__(self, number, terminal=False):
    super().__init__()
    self._number, self._terminal = number, terminal
    self.broken, self.failures = False, 0

  def isatty(self):
    return self._terminal

  def write(self, text):
    if self.broken:
      self.failures += 1
      raise OSError(self._number, os.strerror(self._number))
    return super().write(text)


@pytest.mark.parametrize('terminal', [False, True])
@pytest.mark.parametrize('number', ERRORS)
@pytest.mark.parametrize('call', ['update', 'print', 'close'])
def test_a_stream_that_breaks_silences_the_progress(call, number, terminal):
  stream = Broken(number, terminal)
  calls = {
    'update': lambda: progress.update(10, reward=0.5),
    'print': lambda: progress.print('text'),
    'close': lambda: progress.close(),
  }
  with runs.Progress(20, stream=stream) as progress:
    progress.update(9, reward=0.5)
    progress.print('so far')
    assert 'so far' in stream.getvalue()
    stream.broken = True
    calls[call]()
    progress.print('text')  # a bar need not have written yet
    failures = stream.failures
    assert failures
    for _ in range(2):
      progress.update(20, reward=0.5)
      progress.print('text')
  assert stream.failures == failures


def test_a_stream_that_is_broken_from_the_start():
  stream = Broken(errno.EPIPE, terminal=True)
  stream.broken = True
  with runs.Progress(20, stream=stream) as progress:
    progress.update(20)


def test_last_words_that_nobody_reads_change_nothing(monkeypatch):
  broken = Broken(errno.EIO)
  broken.broken = True
  monkeypatch.setattr(sys, 'stderr', broken)
  say('stopped')
  assert broken.failures

  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(run, '_train', interrupted)
  monkeypatch.setattr(run.sharding, 'make_mesh', lambda: _Mesh)
  script = run.Script(lambda config: None, None)
  assert run.train(script, _Config, None) == 128 + signal.SIGINT


class _Mesh:
  size = 1


class _Config:
  class mesh:
    to_dict = dict
