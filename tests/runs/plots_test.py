"""Curves and bands of many methods as pictures."""

import errno
import math

import numpy as np
import pytest

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError

LABELS = dict(xlabels=['tokens', 'updates'], ylabel='accuracy', title='t')


def band(length: int) -> runs.Band:
  x = np.linspace(0, 1, length)
  return runs.Band(x, x, x - 0.1, np.full(length, np.nan))


def test_more_methods_than_styles_are_told_apart(tmp_path, monkeypatch):
  from matplotlib.figure import Figure

  lines = []
  monkeypatch.setattr(
    Figure, 'savefig', lambda self, *a, **k: lines.extend(self.axes[0].lines)
  )
  panels = [{f'method {i}': band(3) for i in range(18)}] * 2
  runs.plot_bands(tmp_path / 'figure.png', panels, **LABELS)
  looks = {(x.get_color(), str(x._unscaled_dash_pattern)) for x in lines}
  assert len(lines) == len(looks) == 18


def test_pictures_are_drawn_the_same_every_time(tmp_path):
  labels = dict(xlabel='step', ylabel='reward', title='A run')
  series = {'reward': ([0, 1, 2], [0.1, math.nan, 0.3]), 'b': ([0, 2], [1, 2])}
  more = dict(marks={'warm start ends': 1}, below={'c': ([0], [1])})
  panels = [{f'method {i}': band(3 + i) for i in range(14)}] * 2
  path = tmp_path / 'figure.png'
  draws = (
    lambda: runs.plot_curve(path, series, **labels, **more),
    lambda: runs.plot_bands(path, panels, **LABELS),
  )
  for draw in draws:
    draw()
    first = path.read_bytes()
    draw()
    assert first.startswith(b'\x89PNG') and path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('name', ['samples.html', 'curve.png'])
@pytest.mark.parametrize('full', [False, True])
def test_a_page_or_picture_that_cannot_be_written_is_said(
  tmp_path, monkeypatch, name, full
):
  def no_space(_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  log = runs.SampleLog(tmp_path)
  if full:
    monkeypatch.setattr('os.fsync', no_space)
  else:
    (tmp_path / name).mkdir()  # no file can take its place
  left = sorted(tmp_path.iterdir())
  with log, pytest.raises(UserError, match=f'{name} cannot be wr') as caught:
    if name == 'curve.png':
      labels = dict(xlabel='x', ylabel='y', title='t')
      runs.plot_curve(tmp_path / name, {'a': ([1], [2])}, **labels)
    else:
      log.write_html('Run')
  assert ('No space left' in str(caught.value)) == full
  assert len(str(caught.value).splitlines()) == 2
  assert sorted(tmp_path.iterdir()) == left
