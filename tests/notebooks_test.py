"""The notebooks run from top to bottom, and what they claim holds."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'notebooks'
SECONDS = 300  # for a cell, on a CPU
BYTES = 500_000  # with outputs

# What is asserted, in the notebook's own namespace, once it has run.
CLAIMS = {
  'estimators.ipynb': """
assert report.bias > 0.5 and report.cosine < 0.98
assert mended.exact and mended.bias < 1e-9
unbiased = {name for name in order if colour(name) == BLUE}
assert {'REINFORCE', 'RLOO', 'ReMax', 'P3O', 'TRePO, hold'} <= unbiased
assert not {'GRPO, GSPO', 'OPO', 'TRePO, between values'} & unbiased
for known, total, again in theorem[:-1]:
  assert known < 1e-9 and total < 1e-9 and again > 0.05
assert max(theorem[-1]) < 1e-9
exact = [name for name, found in trepo.items() if found.bias < 1e-9]
assert exact == list(trepo)[:3]
assert all(trepo[name].bias > 0.1 for name in list(trepo)[3:])
assert recipe.exact and recipe.bias < 1e-9
""",
  'training.ipynb': """
assert better > accuracy + 0.05, (accuracy, better)
assert set(curves) == {'RLOO', 'TRePO', 'PPO', 'ReMax'}
assert min(accuracies.values()) > accuracy, (accuracy, accuracies)
""",
}


def notebooks():
  return sorted(path.name for path in FOLDER.glob('*.ipynb'))


def test_every_notebook_has_claims():
  assert set(notebooks()) == set(CLAIMS)


@pytest.mark.parametrize('name', notebooks())
def test_is_stored_with_its_figures(name):
  path = FOLDER / name
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert path.stat().st_size < BYTES
  outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
  assert any('image/png' in out.get('data', {}) for out in outputs)
  assert not [out for out in outputs if out.get('name') == 'stderr']


@pytest.mark.slow
@pytest.mark.parametrize('name', notebooks())
def test_runs(name, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  notebook = nbformat.read(FOLDER / name, as_version=4)
  notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS[name]))
  nbclient.NotebookClient(
    notebook, timeout=SECONDS, resources={'metadata': {'path': str(FOLDER)}}
  ).execute()
  outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
  assert not [out.text for out in outputs if out.get('name') == 'stderr']
  assert any('image/png' in out.get('data', {}) for out in outputs)
