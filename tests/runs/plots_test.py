"""Curves and bands of many methods as pictures."""

import math

import numpy as np

from jaxrl_llm import runs

LABELS = dict(xlabels=['tokens', 'updates'], ylabel='accuracy', title='t')


def band(length: int) -> runs.Band:
  x = np.linspace(0, 1, length)
  return runs.Band(x, x, x - 0.1, np.full(length, np.nan))


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
