"""Graphs and walks, checked by a search of their own."""

import itertools

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import paths
from jaxrl_llm.tasks.prompts import columns


def distance(row, most):
  """Steps of the shortest path, from all walks of each length."""
  edges = [(edge[0], edge[1]) for edge in row['edges']]
  ends = {row['start']}
  for steps in range(most + 1):
    if row['goal'] in ends:
      return steps
    ends = {b for a, b in edges if a in ends}
  return None


def reward(row, *completions, **settings):
  given = columns([row] * len(completions))
  return paths.reaches_goal(completions, **given, **settings)


def test_prompts_show_the_graph_and_walks_obey_it():
  settings = dict(distance=(2, 4), careless=0.6)
  rows = paths.generate(300, 0, **settings)
  assert rows == paths.generate(300, 0, **settings)
  reached = shortest = 0
  for row in rows:
    *lists, task = row['prompt'].split(',')
    assert [a + b for a, *bs in lists for b in bs] == row['edges']
    assert task == f'{row["start"]}>{row["goal"]}='
    assert len(set(row['edges'])) == 20
    assert all(a != b for a, b in row['edges'])
    assert 2 <= distance(row, 4) <= 4
    walk = row['start'] + row['solution']
    assert all(a + b in row['edges'] for a, b in itertools.pairwise(walk))
    ended = walk.find(row['goal']) == len(walk) - 1
    assert ended or row['goal'] not in walk and len(row['solution']) == 8
    assert reward(row, row['solution']) == [float(ended)]
    reached += ended
    edges = {edge[0]: edge for edge in reversed(row['edges'])}
    steps = [a + b for a, b in itertools.pairwise(walk)]
    first = steps == [edges[step[0]] for step in steps]
    best = ended and len(row['solution']) == distance(row, 4)
    assert first or best
    shortest += best
  assert 0.4 < shortest / 300 < reached / 300 < 0.8
  assert set(''.join(row['prompt'] for row in rows)) <= set(paths.ALPHABET)


def test_what_reaches_the_goal():
  edges = ['01', '02', '12', '10', '20', '23', '30', '31']
  row = {'edges': edges, 'start': '0', 'goal': '3'}
  right = ['23', '123', '1023']
  wrong = ['', '3', '13', '2', '2303', '23 ', '2x3', '10101010101023', '٢3']
  assert reward(row, *right, *wrong) == [1] * 3 + [0] * len(wrong)
  assert reward(row, *right, most=2) == [1, 0, 0]


@pytest.mark.parametrize(
  'wrong',
  [dict(nodes=11), dict(degree=0), dict(distance=(3, 2)), dict(most=7)],
)
def test_impossible_settings_are_refused(wrong):
  with pytest.raises(UserError, match=next(iter(wrong))):
    paths.generate(3, 0, **wrong)
  with pytest.raises(UserError, match='distance'):
    paths.generate(1, 0, nodes=3, distance=(5, 8))
