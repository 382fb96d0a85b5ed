"""Progress on a terminal, without one, and where nobody can read it."""

import errno
import io
import os
import signal
import sys
import types

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
@pytest.mark.parametrize('call', ['update', 'print', '__exit__', '__init__'])
def test_a_stream_that_breaks_silences_the_progress(call, number, terminal):
  stream = Broken(number, terminal)
  stream.broken = call == '__init__'
  with runs.Progress(20, stream=stream) as progress:
    if not stream.broken:
      progress.update(9, reward=0.5)
      progress.print('so far')
      assert 'so far' in stream.getvalue()
      stream.broken = True
      arguments = {'update': (10,), 'print': ('text',)}.get(call, ())
      getattr(progress, call)(*arguments)
    progress.print('text')  # a bar need not have written yet
    failures = stream.failures
    assert failures
    for _ in range(2):
      progress.update(20, reward=0.5)
      progress.print('text')
  assert stream.failures == failures


def test_last_words_that_nobody_reads_change_nothing(monkeypatch):
  broken = Broken(errno.EIO)
  broken.broken = True
  monkeypatch.setattr(sys, 'stderr', broken)
  say('stopped')
  assert broken.failures

  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(run, '_train', interrupted)
  mesh = types.SimpleNamespace(size=1, to_dict=dict)
  monkeypatch.setattr(run.sharding, 'make_mesh', lambda: mesh)
  script = run.Script(lambda config: None, None)
  config = types.SimpleNamespace(mesh=mesh)
  assert run.train(script, config, None) == 128 + signal.SIGINT


def test_progress_without_a_terminal_prints_plain_lines():
  stream = io.StringIO()
  with runs.Progress(23, 3, stream=stream) as progress:
    for step in range(4, 24):
      progress.update(step, **{'r\x1b\u202e\n': step / 23})
    progress.print('a [bold] word\x1b[2J\u200e')
  assert stream.getvalue().splitlines() == [
    'train 10/23  r␛\\u202e␊ 0.4348',
    'train 20/23  r␛\\u202e␊ 0.8696',
    'train 23/23  r␛\\u202e␊ 1',
    'a [bold] word␛[2J\\u200e',
  ]


def test_progress_on_a_terminal_is_a_bar():
  stream = Broken(0, terminal=True)
  with runs.Progress(4, stream=stream) as progress:
    for step in range(1, 5):
      progress.update(step, **{'reward\u202e': 0.5})
    progress.print('table')
  text = stream.getvalue()
  assert 'train: 100%' in text and '4/4' in text
  assert 'reward\\u202e=0.5' in text
  # Behind a bar that another test left open, the cursor goes up a line first.
  assert '\ntable' in text.replace('\r', '\n').replace('\x1b[A', '')
