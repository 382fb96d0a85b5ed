"""Curves and bands of many methods as pictures."""

import errno
import math

import numpy as np
import pytest

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import page

LABELS = dict(xlabels=['tokens', 'updates'], ylabel='accuracy', title='t')


def band(length: int) -> runs.Band:
  x = np.linspace(0, 1, length)
  return runs.Band(x, x, x - 0.1, np.full(length, np.nan))


def test_bands_are_drawn_the_same_every_time(tmp_path):
  path = tmp_path / 'figure.png'
  panels = [{f'method {i}': band(3 + i) for i in range(14)}] * 2
  pictures = []
  for _ in range(2):
    runs.plot_bands(path, panels, **LABELS)
    pictures.append(path.read_bytes())
  assert pictures[0].startswith(b'\x89PNG') and pictures[0] == pictures[1]
  assert list(tmp_path.iterdir()) == [path]


def test_bands_that_cannot_be_drawn_are_refused(tmp_path):
  panels = [{'a': band(3)}, {'b': band(3)}]
  with pytest.raises(ValueError, match='the same labels'):
    runs.plot_bands(tmp_path / 'figure.png', panels, **LABELS)
  with pytest.raises(UserError, match='cannot be written'):
    runs.plot_bands(tmp_path / 'no' / 'f.png', panels[:1] * 2, **LABELS)


def test_more_methods_than_styles_are_told_apart(tmp_path, monkeypatch):
  from matplotlib.figure import Figure

  lines = []
  monkeypatch.setattr(
    Figure, 'savefig', lambda self, *a, **k: lines.extend(self.axes[0].lines)
  )
  monkeypatch.setattr('os.replace', lambda *a: None)
  panels = [{f'method {i}': band(3) for i in range(18)}] * 2
  runs.plot_bands(tmp_path / 'figure.png', panels, **LABELS)
  looks = {(line.get_color(), str(line.get_linestyle())) for line in lines}
  dashes = {str(line._unscaled_dash_pattern) for line in lines}
  assert len(lines) == 18 and len({c for c, _ in looks}) == 6
  assert len(dashes) == 3


def test_plot(tmp_path):
  path = tmp_path / 'curve.png'
  series = {'reward': ([0, 1, 2], [0.1, math.nan, 0.3]), 'b': ([0, 2], [1, 2])}

  def draw_it():
    runs.plot_curve(
      path,
      series,
      xlabel='step',
      ylabel='reward',
      title='A run',
      marks={'warm start ends': 1},
    )
    return path.read_bytes()

  first = draw_it()
  assert first.startswith(b'\x89PNG') and draw_it() == first
  assert list(tmp_path.iterdir()) == [path]
  series['b'] = ([0], [1, 2])
  with pytest.raises(ValueError, match='b: 1 x values, 2 y values'):
    draw_it()
  assert path.read_bytes() == first


@pytest.mark.parametrize('name', ['samples.html', 'curve.png'])
def test_a_page_or_picture_that_cannot_be_written_is_said(tmp_path, name):
  (tmp_path / name).mkdir()  # no file can take its place
  with pytest.raises(UserError, match=f'{name} cannot be written: ') as caught:
    if name == 'curve.png':
      labels = dict(xlabel='x', ylabel='y', title='t')
      runs.plot_curve(tmp_path / name, {'a': ([1], [2])}, **labels)
    else:
      page.write_page(tmp_path / name, 'text')
  assert len(str(caught.value).splitlines()) == 2
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_plot_on_a_full_disk_is_said(tmp_path, monkeypatch):
  from matplotlib.figure import Figure

  def full(self, path, **kwargs):
    path.write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(Figure, 'savefig', full)
  labels = dict(xlabel='x', ylabel='y', title='t')
  with pytest.raises(UserError, match='No space left on device'):
    runs.plot_curve(tmp_path / 'c.png', {'a': ([1], [2])}, **labels)
  assert not list(tmp_path.iterdir())
