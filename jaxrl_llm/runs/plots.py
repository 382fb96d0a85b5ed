"""Draws curves of one run, or of several, as PNG pictures.

A picture replaces an earlier one atomically.  Equal numbers give equal bytes.
A full disk, or a folder that cannot be written, raises UserError.
"""

import io
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.runs.metrics import cannot_write

# Lines that colour-blind readers can distinguish: six colours of Okabe and Ito,
# then the same ones dashed and dotted.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_DASHES = ('-', (0, (4, 1.5)), (0, (1, 1)))
_STYLES = [{'linestyle': x, 'color': y} for x in _DASHES for y in _COLOURS]
_MARK = {'color': '0.45', 'linestyle': '--', 'linewidth': 1}


def plot_curve(
  path,
  series: dict,
  *,
  xlabel: str,
  ylabel: str,
  title: str,
  marks: dict | None = None,
  below: dict | None = None,
) -> None:
  """Draws numbers against steps and saves a PNG.

  Args:
    path: the picture's path.
    series: label -> (x, y), equally long.  NaNs leave gaps.
    xlabel, ylabel: with their units.
    title: one line.
    marks: label -> x of a vertical line, such as the end of a warm start.
    below: label -> (x, y) of further curves, of any scale, each in a panel of
      its own under the main one.
  """
  below = below or {}
  figure, panels = _panels(
    (7, 4.2 + 1.7 * len(below)),
    *(1 + len(below), 1),
    sharex=True,
    height_ratios=[2.4] + [1] * len(below),
  )
  curves = [(panels[0], *curve) for curve in series.items()]
  for panel, curve in zip(panels[1:], below.items(), strict=True):
    curves.append((panel, *curve))
    panel.set_ylabel(curve[0])
  for panel, label, (x, y) in curves:
    few = {'marker': 'o', 'markersize': 3.5} if len(x) <= 40 else {}
    panel.plot(x, y, label=label, linewidth=1.8, **few)
  for label, x in (marks or {}).items():
    for panel in panels:
      panel.axvline(x, **_MARK)
    place = panels[0].get_xaxis_transform()
    style = {'va': 'top', 'fontsize': 8, 'color': '0.35'}
    panels[0].text(x, 0.99, f' {label}', transform=place, **style)
  panels[0].set_ylabel(ylabel)
  panels[0].set_title(title, loc='left', fontsize=11)
  panels[-1].set_xlabel(xlabel)
  if len(series) > 1:
    panels[0].legend(frameon=False, fontsize=9)
  _save(figure, path)


class Band(NamedTuple):
  """A curve with an interval around it; all arrays [N].

  Attributes:
    x: positions.
    mean: the curve.
    low, high: the interval's bounds; NaNs omit it.
  """

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


def plot_bands(
  path,
  panels: Sequence[dict[str, Band]],
  *,
  xlabels: Sequence[str],
  ylabel: str,
  title: str,
) -> None:
  """Draws the same methods in panels side by side and saves a PNG.

  The legend, in the order of the first panel, is to the right of all.

  Args:
    path: the picture's path.
    panels: label → `Band`, the same labels in each.
    xlabels, ylabel: with units; one of the former per panel.
    title: one line.

  Raises:
    ValueError: the panels' labels differ.
  """
  labels = list(panels[0])
  if any(list(panel) != labels for panel in panels):
    raise ValueError('The panels must have the same labels in the same order.')
  size = 4.6 * len(panels) + 1.6, 4.4
  figure, row = _panels(size, 1, len(panels), sharey=True)
  for axes, panel, xlabel in zip(row, panels, xlabels, strict=True):
    for style, (label, band) in zip(itertools.cycle(_STYLES), panel.items()):
      axes.plot(band.x, band.mean, label=label, linewidth=1.7, **style)
      shade = {'color': style['color'], 'alpha': 0.12, 'linewidth': 0}
      axes.fill_between(band.x, band.low, band.high, **shade)
    axes.set_xlabel(xlabel)
    axes.margins(x=0.01)
  row[0].set_ylabel(ylabel)
  row[0].set_title(title, loc='left', fontsize=11)
  figure.legend(
    *row[0].get_legend_handles_labels(),
    loc='outside right center',
    frameon=False,
    fontsize=9,
    handlelength=2.6,
  )
  _save(figure, path)


class Panel(NamedTuple):
  """One number for several things, drawn as points with intervals.

  Attributes:
    xlabel: the number's name, with its unit.
    points: label → (value, low, high); NaNs leave a gap.
    log: True for a logarithmic axis; values that are not positive are left out.
    line: a reference value, such as that of no bias.
  """

  xlabel: str
  points: dict[str, tuple[float, float, float]]
  log: bool = False
  line: float | None = None


def plot_estimates(path, panels: Sequence[Panel], *, title: str) -> None:
  """Draws several numbers for the same things side by side and saves a PNG.

  Args:
    path: the picture's path.
    panels: one per number; rows are the labels of the first one, from top to
      bottom.
    title: one line.

  Raises:
    ValueError: the panels' labels differ.
  """
  labels = list(panels[0].points)
  if any(set(panel.points) != set(labels) for panel in panels):
    raise ValueError('The panels must have the same labels.')
  width = 2.6 * len(panels) + 0.09 * max(map(len, labels)) + 0.6
  size = width, 1.4 + 0.3 * len(labels)
  figure, row = _panels(size, 1, len(panels), sharey=True)
  for axes, panel in zip(row, panels, strict=True):
    value, low, high = np.array([panel.points[x] for x in labels], float).T
    if panel.log:
      value, high = (np.where(x > 0, x, np.nan) for x in (value, high))
      # An interval that reaches 0 continues to the edge.
      low = np.where(low > 0, low, value / 1e3)
      _make_logarithmic(axes, value, high)
    places = np.arange(len(labels))
    axes.hlines(places, low, high, color=_COLOURS[0], linewidth=2, alpha=0.45)
    axes.plot(value, places, 'o', color=_COLOURS[0], markersize=4.5)
    if panel.line is not None:
      axes.axvline(panel.line, **_MARK)
    axes.set_xlabel(panel.xlabel, fontsize=9)
    axes.tick_params(labelsize=8)
  row[0].set_yticks(np.arange(len(labels)), labels, fontsize=9)
  row[0].set_ylim(len(labels) - 0.5, -0.5)
  figure.suptitle(title, x=0.01, ha='left', fontsize=11)
  _save(figure, path)


def _make_logarithmic(axes: Any, value: np.ndarray, high: np.ndarray) -> None:
  """Sets a logarithmic axis that ends near the greatest and least values."""
  from matplotlib.ticker import LogLocator, NullFormatter

  axes.set_xscale('log')
  if (value > 0).any():
    edges = np.nanmin(value) / 2, np.nanmax([value, high]) * 1.5
    axes.set_xlim(*edges)
    narrow = edges[1] < 50 * edges[0]  # labels of many decades would overlap
    subs = (1.0, 2.0, 5.0) if narrow else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter(NullFormatter())


def _panels(size: tuple[float, float], *shape: int, **options) -> Any:
  """Returns a figure of a size in inches, and its axes."""
  # The object interface: no global state, no window, any thread.
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, dpi=150, layout='constrained')
  return figure, figure.subplots(*shape, squeeze=False, **options).ravel()


def _save(figure: Any, path) -> None:
  """Styles the axes and writes the picture."""
  for axes in figure.axes:
    axes.grid(color='0.9', linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
  picture = io.BytesIO()
  # The version stamp would differ between machines.
  figure.savefig(picture, format='png', metadata={'Software': None})
  try:
    write_atomically(path, picture.getvalue())
  except OSError as error:
    raise cannot_write(path, error.strerror) from error
