"""Progress on a terminal, without one, and where nobody can read it."""

import errno
import io
import os
import sys

import pytest

from jaxrl_llm import runs
from jaxrl_llm.runs.progress import say


class Stream(io.StringIO):
  """A stream that can be written to until `broken` is set."""

  def __init__(self, terminal, number=errno.EIO):
    super().__init__()
    self.isatty = lambda: terminal
    self._number, self.broken, self.failures = number, False, 0

  def write(self, text):
    if self.broken:
      self.failures += 1
      raise OSError(self._number, os.strerror(self._number))
    return super().write(text)


@pytest.mark.parametrize('terminal', [False, True])
@pytest.mark.parametrize('number', [errno.EPIPE, errno.ENOSPC])
@pytest.mark.parametrize('call', ['update', 'print', '__exit__', '__init__'])
def test_a_stream_that_breaks_silences_the_progress(call, number, terminal):
  stream = Stream(terminal, number)
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
    progress.update(20, reward=0.5)
    progress.print('text')
  assert stream.failures == failures


def test_last_words_that_nobody_reads_change_nothing(monkeypatch):
  stream = Stream(False)
  stream.broken = True
  monkeypatch.setattr(sys, 'stderr', stream)
  say('stopped')
  assert stream.failures


@pytest.mark.parametrize('terminal', [False, True])
def test_progress_is_plain_lines_or_a_bar(terminal):
  stream = Stream(terminal)
  with runs.Progress(23, 3, stream=stream) as progress:
    for step in range(4, 24):
      progress.update(step, **{'r\x1b\u202e\n': step / 23})
    progress.print('a [bold] word\x1b[2J\u200e')
  text, printed = stream.getvalue(), 'a [bold] word␛[2J\\u200e'
  if terminal:
    assert 'train: 100%' in text and '23/23' in text
    assert 'r␛\\u202e␊=1' in text and printed in text
  else:
    assert text.splitlines() == [
      'train 10/23  r␛\\u202e␊ 0.4348',
      'train 20/23  r␛\\u202e␊ 0.8696',
      'train 23/23  r␛\\u202e␊ 1',
      printed,
    ]
