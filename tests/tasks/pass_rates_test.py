"""Pass rates from a file, and the prompts that they leave."""

import pytest
import scripts

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import pass_rates

ROWS = [{'prompt': p, 'answer': p * 2} for p in ('a', 'b', 'c', 'd', 'b')]


def write(path, *records):
  return scripts.write_rows(path, records)


def record(prompt, rate, samples=8):
  return {'prompt': prompt, 'pass_rate': rate, 'samples': samples}


def test_what_is_read(tmp_path):
  path = write(
    tmp_path / 'rates.jsonl',
    {'settings': {'samples': 8}},
    record('a\u2028', 0.25),
    record('b', 1.0, 2),
    record('b', 0.5, 6),
    record('c', None, 0),
    record('d', None, 0),
    record('d', 0.5, 4),
  )
  rates = pass_rates.read_rates(path)
  assert rates == {'a\u2028': 0.25, 'b': 0.625, 'c': None, 'd': 0.5}


@pytest.mark.parametrize(
  'low, high, kept, left',
  [
    (0.0, 1.0, 'abbc', (0, 0, 1)),
    (0.25, 0.75, 'bbc', (1, 0, 1)),  # the bounds belong to it
    (0.3, 1.0, 'c', (3, 0, 1)),
    (0.0, 0.25, 'abb', (0, 1, 1)),
  ],
)
def test_bounds(low, high, kept, left):
  rates = {'a': 0.0, 'b': 0.25, 'c': 0.75, 'd': None, 'unused': 0.5}
  chosen = pass_rates.filter_by_rate(ROWS, rates, low, high)
  assert sorted(row['prompt'] for row in chosen.rows) == list(kept)
  assert (chosen.below, chosen.above, chosen.unrated) == left
  for row in chosen.rows:
    assert row['pass_rate'] == rates[row['prompt']]
    assert row['answer'] == row['prompt'] * 2
  assert 'pass_rate' not in ROWS[0]


def test_refusals(tmp_path):
  rates = {'a': 0.0, 'c': 0.75}
  with pytest.raises(UserError, match="3 of 5 training .* the first is 'b'"):
    pass_rates.filter_by_rate(ROWS, rates)
  with pytest.raises(UserError, match='2 are below, 0 above, 0 without'):
    pass_rates.filter_by_rate(ROWS[:1] * 2, rates, 0.5)
  with pytest.raises(UserError, match='1 rows already have a column'):
    pass_rates.filter_by_rate([{'prompt': 'a', 'pass_rate': 1}], rates)
  with pytest.raises(UserError, match='cannot be read'):
    pass_rates.read_rates(str(tmp_path / 'none.jsonl'))


@pytest.mark.parametrize(
  'wrong',
  [
    {'prompt': 'a'},
    record('a', 1.5),
    record('a', 'high'),
    record('a', True),
    record('a', 0.5, 0),
    record('a', 0.5, None),
    {'pass_rate': 0.5, 'samples': 2},
    [1],
  ],
)
def test_broken_records_are_named(wrong, tmp_path):
  path = write(tmp_path / 'rates.jsonl', record('b', 0.5), wrong)
  with pytest.raises(UserError, match='line 2'):
    pass_rates.read_rates(path)
