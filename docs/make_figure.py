"""Writes docs/figures/estimators.png, the chart of the estimators notebook.

  python docs/make_figure.py  # 12 s on 2 CPU cores

Runs the notebook's own cells as far as the chart, so that page and notebook
cannot differ, and adds a title.
"""

import json
import pathlib

import matplotlib

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / 'notebooks' / 'estimators.ipynb'
FIGURE = ROOT / 'docs' / 'figures' / 'estimators.png'
TITLE = 'Direction and noise of the gradient, on a language of 15 responses'


def code_cells(path: pathlib.Path) -> list[str]:
  """Returns the sources of a notebook's code cells."""
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def main() -> None:
  """Runs the cells up to the first that leaves a figure, and saves that."""
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  plt.show = lambda: None
  namespace = {}
  for source in code_cells(NOTEBOOK):
    exec(compile(source, NOTEBOOK.name, 'exec'), namespace)
    if plt.get_fignums():
      break
  figure = plt.gcf()
  figure.set_size_inches(10, 6.4)  # flatter: it has to fit into the README
  figure.suptitle(TITLE, fontsize=12)
  figure.tight_layout()
  figure.savefig(FIGURE, dpi=130)


if __name__ == '__main__':
  main()
