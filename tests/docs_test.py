"""The generated pages and figures: whole, fresh, and their example runs."""

import importlib.util
import inspect
import pathlib
import re

import pytest

from jaxrl_llm import estimators as est

DOCS = pathlib.Path(__file__).parents[1] / 'docs'


def load(name='make_estimators'):
  path = DOCS / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


MAKER = load()
PAGE = (DOCS / 'estimators.md').read_text(encoding='utf-8')
TABLE = [
  line.strip('|').split(' | ')
  for line in PAGE.splitlines()
  if line.count(' | ') == 8
][2:]


def row(name):
  """The cells of a recipe's first row."""
  found = [cells for cells in TABLE if cells[0].startswith(f' `{name}(')]
  assert len(found) == 1, f'{len(found)} rows of {name}'
  return found[0]


@pytest.mark.slow
def test_the_page_is_fresh(capsys):
  status = MAKER.main(['--check'])
  assert status == 0, capsys.readouterr().out


@pytest.mark.slow
def test_the_figure_is_the_notebook_s_chart(tmp_path, monkeypatch):
  maker = load('make_figure')
  monkeypatch.setattr(maker, 'FIGURE', tmp_path / 'estimators.png')
  maker.main()
  assert maker.FIGURE.read_bytes().startswith(b'\x89PNG')


def test_every_recipe_is_in_the_table():
  public = {
    name
    for name in set(est.__all__) - {'estimator'}
    if inspect.isfunction(getattr(est, name))
    and inspect.signature(getattr(est, name)).return_annotation is est.Estimator
  }
  assert public == set(MAKER.recipes())
  for name, recipe in MAKER.recipes().items():
    cells = row(name)
    for parameter in inspect.signature(recipe).parameters:
      assert parameter in cells[0]
    assert cells[3].strip(), f'{name} has no line "Bias:"'
    links = re.findall(r'<(http[^>]+)>`_', inspect.getdoc(recipe))
    assert all(link in cells[8] for link in links)


def test_what_recipes_need_and_their_levels():
  for name, needs, level in (
    ('reinforce', '—', 'response'),
    ('remax', 'greedy', 'response'),
    ('grpo', 'G ≥ 2, reference (not at kl=0)', 'response'),
    ('reinforce_plus_plus', 'reference (not at kl=0)', 'token'),
    ('obl_reinforce', 'G ≥ 2, score norms', 'response'),
    ('rl_zvp', 'G ≥ 2, entropy', 'token'),
    ('ppo', 'critic', 'token'),
    ('trepo', 'G ≥ 2, 4 branches at ≤ 4 positions', 'token'),
  ):
    assert row(name)[1:3] == [needs, level]


def test_figures_agree_with_what_docstrings_claim():
  untrained = [cells[0] for cells in TABLE if '—' in cells[6]]
  assert untrained == [' `reward_model()`']  # It trains no policy.
  for cells in TABLE:
    if cells[0] in untrained:
      continue
    claim, bias, cosine = cells[3], cells[5], float(cells[6])
    if claim.startswith('none') and '±' not in bias:
      assert bias == '0'
    if re.match('none|scale .* only', claim) and 'whiten' not in claim:
      assert cosine == 1.0
    if claim.startswith(('as `grpo', 'as `dapo', 'as `ppo')):
      assert cosine < 0.98


def test_staleness_is_seen():
  assert MAKER.difference(PAGE, PAGE) is None
  cells = row('grpo')
  line = ' | '.join(cells)
  for column, changed, stale in (
    (0, cells[0].replace('0.2', '0.3'), True),
    (3, cells[3] + '!', True),
    (5, f'{float(cells[5]) + 0.001:.3f}', False),
    (5, f'{float(cells[5]) + 0.004:.3f}', True),
    (5, '—', True),
    (7, f'{float(cells[7]) * 1.01:.1f}', False),
    (7, f'{float(cells[7]) * 1.05:.1f}', True),
  ):
    other = ' | '.join([*cells[:column], changed, *cells[column + 1 :]])
    page = PAGE.replace(line, other)
    assert page != PAGE
    assert bool(MAKER.difference(page, PAGE)) == stale, changed
  assert MAKER.difference(PAGE + '\nmore', PAGE)


def test_check_fails_on_a_stale_page(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(MAKER, 'page', lambda: PAGE)
  monkeypatch.setattr(MAKER, 'PAGE', tmp_path / 'estimators.md')
  assert MAKER.main(['--check']) == 1  # none at all
  assert MAKER.main([]) == MAKER.main(['--check']) == 0
  MAKER.PAGE.write_text(PAGE.replace('none', 'some'), encoding='utf-8')
  assert MAKER.main(['--check']) == 1
  assert 'make_estimators.py' in capsys.readouterr().out
  assert MAKER.main(['--chekc']) == 2


@pytest.mark.filterwarnings('error')
def test_the_example_runs(capsys):
  example = re.search(r'```python\n(.*?)```', PAGE, re.S)[1]
  exec(compile(example, 'docs/estimators.md', 'exec'), {})
  assert capsys.readouterr().out == 'bias 0.000, cosine 1.000\n'
