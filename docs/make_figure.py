"""Writes docs/figures/estimators.png, the chart of the estimators notebook.

  python docs/make_figure.py  # 20 s on 2 CPU cores

Runs the notebook's own cells as far as the chart, so that page and notebook
cannot differ, and adds a title.  Needs `pip install -e '.[test]'`.
"""

import pathlib

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / 'notebooks' / 'estimators.ipynb'
FIGURE = ROOT / 'docs' / 'figures' / 'estimators.png'

TITLE = 'Direction and noise of the gradient, on a language of 15 responses'

# Runs behind the chart's own lines; flatter, so that it fits into the README.
SAVE = """
fig.set_size_inches(10, 6.4)
fig.suptitle({title!r})
fig.tight_layout()
fig.savefig({path!r}, dpi=130)
"""


def main() -> None:
  """Runs the cells up to the chart's, and saves the figure."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  sources = [cell.source for cell in notebook.cells]
  last = next(i for i, source in enumerate(sources) if 'plt.show()' in source)
  notebook.cells = notebook.cells[: last + 1]
  notebook.cells[last].source += SAVE.format(title=TITLE, path=str(FIGURE))
  nbclient.NotebookClient(
    notebook,
    timeout=180,
    resources={'metadata': {'path': str(NOTEBOOK.parent)}},
  ).execute()


if __name__ == '__main__':
  main()
