"""A curriculum: stages of the easiest prompts, each visited equally often."""

import collections

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import prompts, sources
from jaxrl_llm.tasks.curriculum import Curriculum
from jaxrl_llm.tasks.vocabulary import character_tokenizer

COUNT = 20
# Difficulties 0 … 19, none where it stands in the data.
ROWS = [
  {'prompt': str(100 + i), 'level': (7 * i) % COUNT} for i in range(COUNT)
]


def make(rows=ROWS, column='level', size=4, seed=3, **changes):
  encoded = prompts.encode_prompts(rows, character_tokenizer('0123456789'), 3)
  settings = dict(steps=30, stages=4) | changes
  return Curriculum(encoded, column, size, seed, **settings)


@pytest.mark.parametrize('column', ['level', '-level'])
def test_shares_grow_and_are_of_the_easiest(column):
  source = make(column=column)
  levels = sorted(range(COUNT), reverse=column[0] == '-')
  for step in range(60):
    stage = min(step // 10, 3)  # three stages of 10 steps, then all
    assert source.share(step) == (stage + 1) / 4
    allowed = set(levels[: 5 * (stage + 1)])
    batch = source.batch(step)
    drawn = [row['level'] for row in batch.rows]
    assert set(drawn) <= allowed
    assert [ROWS[i] for i in source.indices(step)] == batch.rows
    assert source.difficulty(step) == pytest.approx(sum(drawn) / len(drawn))


def test_every_prompt_of_a_stage_equally_often():
  source = make()
  for begin, count in ((0, 5), (10, 10), (20, 15), (30, 20)):
    visits = collections.Counter()
    for step in range(begin, begin + 10):
      visits.update(source.indices(step))
    assert len(visits) == count
    assert max(visits.values()) - min(visits.values()) <= 1


def test_a_batch_is_a_function_of_seed_and_number():
  numbers = [25, 3, 40, 3]
  one, two = make(), make()
  found = [one.indices(n) for n in numbers]
  assert found == [two.indices(n) for n in numbers] and found[1] == found[3]
  other = make(seed=4)
  assert found != [other.indices(n) for n in numbers]
  # Stages do not repeat each other's order, nor that of no curriculum.
  plain = sources.PromptSource(
    prompts.encode_prompts(ROWS, character_tokenizer('0123456789'), 3), 4, 3
  )
  assert one.indices(30) != plain.indices(0)


def test_several_batches_in_a_step():
  source = make(batches_per_step=3)
  assert [source.share(n) for n in (0, 29, 30, 89, 90)] == [
    *(0.25, 0.25, 0.5, 0.75, 1.0)
  ]
  visits = collections.Counter()
  for number in range(30):
    visits.update(source.indices(number))
  assert set(visits.values()) == {24}  # 30 · 4 visits of 5 prompts


def test_uneven_stages_leave_no_step_out():
  source = make(steps=7, stages=4)
  shares = [source.share(step) for step in range(9)]
  assert shares == [0.25] * 3 + [0.5] * 2 + [0.75] * 2 + [1.0] * 2
  assert all(len(source.indices(step)) == 4 for step in range(9))


def test_the_fingerprint_tells_curricula_apart():
  prints = [
    make(**changes).fingerprint()
    for changes in ({}, {'column': '-level'}, {'steps': 31}, {'stages': 5})
  ]
  assert prints[0] == make().fingerprint()
  assert all(other != prints[0] for other in prints[1:])


@pytest.mark.parametrize('value', [None, '3', True, float('nan')])
def test_numbers_are_needed(value):
  rows = [dict(row) for row in ROWS]
  rows[2]['level'] = rows[5]['level'] = value
  with pytest.raises(UserError, match=f"'level': 2 of {COUNT} rows have none"):
    make(rows)
  with pytest.raises(UserError, match='the columns are level, prompt'):
    make(column='size')


@pytest.mark.parametrize('steps, stages', [(30, 1), (3, 5)])
def test_stages_fit_into_steps(steps, stages):
  with pytest.raises(UserError, match=f'cannot have {stages} stages'):
    make(steps=steps, stages=stages)
