"""Curves of a run as a picture."""

import os
import pathlib

from jaxrl_llm.logging.records import cannot_write


def plot_curve(
  path,
  series: dict,
  *,
  xlabel: str,
  ylabel: str,
  title: str,
  marks: dict | None = None,
) -> None:
  """Draws numbers against steps and saves a PNG.

  Args:
    path: the picture's path; replaced atomically.
    series: label -> (x, y), equally long.  NaNs leave gaps.
    xlabel: with its unit.
    ylabel: with its unit.
    title: one line.
    marks: label -> x of a vertical line, such as the end of a warm start.

  Raises:
    ValueError: a series' x and y differ in length.
    UserError: the disk is full or the folder cannot be written.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # The object interface: no global state, no window, any thread.
  figure = Figure(figsize=(7, 4.2), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  for label, (x, y) in series.items():
    if len(x) != len(y):
      raise ValueError(f'{label}: {len(x)} x values, {len(y)} y values.')
    marker = 'o' if len(x) <= 40 else None
    axes.plot(x, y, label=label, linewidth=1.8, marker=marker, markersize=3.5)
  for label, x in (marks or {}).items():
    axes.axvline(x, color='0.45', linestyle='--', linewidth=1)
    axes.annotate(
      label,
      (x, 1),
      xycoords=('data', 'axes fraction'),
      xytext=(4, -4),
      textcoords='offset points',
      va='top',
      fontsize=8,
      color='0.35',
    )
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.set_title(title, loc='left', fontsize=11)
  axes.grid(color='0.9', linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  if len(series) > 1:
    axes.legend(frameon=False, fontsize=9)
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.tmp')
  try:
    try:
      # Without the version stamp the same numbers give the same bytes.
      figure.savefig(temporary, format='png', metadata={'Software': None})
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    raise cannot_write(path, error.strerror or error) from error
