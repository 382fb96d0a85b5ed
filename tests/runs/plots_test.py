"""Bands of many methods as a picture."""

import numpy as np
import pytest

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError

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
