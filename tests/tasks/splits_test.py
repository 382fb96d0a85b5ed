"""Held-out rows share no prompt with the rest, and no row is lost."""

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.splits import split

ROWS = [{'prompt': f'{i}', 'copy': 0} for i in range(100)]


def test_split_shares_no_prompt_and_keeps_every_row():
  doubled = ROWS + [{**row, 'copy': 1} for row in ROWS[:50]]
  train, held_out = split(doubled, 30, seed=1)
  held = {row['prompt'] for row in held_out}
  assert len(held) == 30
  assert not held & {row['prompt'] for row in train}
  for part in (train, held_out):
    assert part == [row for row in doubled if row in part]
  assert len(train) + len(held_out) == 150
  assert (train, held_out) == split(doubled, 30, seed=1)
  assert held_out != split(doubled, 30, seed=2)[1]


def test_something_is_left_to_train_on():
  assert split(ROWS, 0) == (ROWS, [])
  with pytest.raises(UserError, match='hold out 100'):
    split(ROWS, 100)
