"""Values kept between steps: by state, for a time, in a bounded room."""

import numpy as np

from jaxrl_llm.kept import KeptValues, digests
from jaxrl_llm.policy import Prompts

PROMPTS = np.array([[5, 6, 7], [5, 6, 0]], np.int32)
LENGTHS = np.array([3, 2], np.int32)
TOKENS = np.array([[[1, 2, 3], [1, 2, 4]], [[7, 1, 2], [1, 2, 3]]], np.int32)
PLACES = np.array([[[1, 2], [2, 3]], [[0, 1], [1, 2]]])


def keys_of(places=PLACES, prompts=PROMPTS, tokens=TOKENS):
  return digests(Prompts(tokens=prompts, lengths=LENGTHS), tokens, places)


def test_a_state_is_its_prompt_and_its_prefix():
  found = dict(keys_of())
  assert set(found) == {tuple(i) for i in np.argwhere(PLACES)}
  assert found[0, 0, 1] == found[0, 1, 0]  # prefix 1, 2 of one prompt
  assert len(set(found.values())) == len(found) - 1
  # Tokens behind the prompt's length or the place are no part of it.
  prompts, tokens = PROMPTS.copy(), TOKENS.copy()
  prompts[1, 2] = 9
  tokens[0, 0, 2] = 9
  assert dict(keys_of(prompts=prompts, tokens=tokens)) == found
  # Prompt 5, 6 with response 7 … is not prompt 5, 6, 7.
  places = np.array([[[1, 0], [0, 0]], [[2, 0], [0, 0]]])
  (_, left), (_, right) = keys_of(places)
  assert left != right


def test_values_are_found_until_they_are_too_old():
  kept = KeptValues(longest=3)
  values = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
  kept.keep(keys_of(), values, step=10)
  for step, age in ((10, 0), (13, 3)):
    found = kept.find(keys_of(), PLACES.shape, step)
    np.testing.assert_array_equal(found.ages, np.where(PLACES, age, -1))
    expected = np.where(PLACES, values, 0.0)
    expected[0, 0, 1] = expected[0, 1, 0]  # one state, the last value
    np.testing.assert_array_equal(found.values, expected)
  assert (kept.find(keys_of(), PLACES.shape, 14).ages == -1).all()
  kept.keep(keys_of(), values + 1, step=14)
  found = kept.find(keys_of(), PLACES.shape, 14)
  assert found.values[0, 0, 0] == 1.0 and found.ages[0, 0, 0] == 0


def test_the_oldest_make_room():
  kept = KeptValues(longest=99, slots=3)
  states = np.array([[[1]], [[1]]])
  for step in range(4):
    tokens = np.full((2, 1, 3), step, np.int32)
    keys = keys_of(states, tokens=tokens)
    kept.keep(keys, np.full((2, 1, 1), step, np.float32), step)
  ages = [
    kept.find(
      keys_of(states, tokens=np.full((2, 1, 3), step, np.int32)), (2, 1, 1), 4
    ).ages.ravel()
    for step in range(4)
  ]
  assert [list(a) for a in ages] == [[-1, -1], [-1, -1], [-1, 2], [1, 1]]


def test_a_checkpoint_holds_everything():
  kept, other = KeptValues(longest=9, slots=5), KeptValues(longest=9, slots=5)
  values = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
  kept.keep(keys_of(), values, step=1)
  before = kept.tree
  # What Orbax saves: it knows no scalars of NumPy.
  assert all(type(leaf) is np.ndarray for leaf in before.values())
  other.load(before)
  more = keys_of(tokens=TOKENS + 20)
  for one in (kept, other):
    one.keep(more, values + 0.5, step=2)
  for name, value in kept.tree.items():
    np.testing.assert_array_equal(value, other.tree[name])
  assert (before['steps'] <= 1).all()
  found = [one.find(more, PLACES.shape, 3) for one in (kept, other)]
  np.testing.assert_array_equal(found[0].values, found[1].values)
  assert (found[0].ages == 1).any()
