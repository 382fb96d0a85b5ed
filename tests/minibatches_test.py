"""Splits keep every prompt, whole and once."""

import jax
import numpy as np
import pytest

from jaxrl_llm import minibatches
from jaxrl_llm.errors import UserError

PROMPTS = np.arange(12)
TREE = {'a': PROMPTS, 'b': [PROMPTS[:, None, None] * np.ones((1, 3, 2))]}


def test_minibatches_are_a_permutation_of_whole_prompts():
  parts = list(minibatches.minibatches(TREE, 3, jax.random.key(0)))
  assert [part['a'].shape for part in parts] == [(4,)] * 3
  order = np.concatenate([part['a'] for part in parts])
  assert (order != PROMPTS).any()
  np.testing.assert_array_equal(np.sort(order), PROMPTS)
  for part in parts:
    ones = np.ones((1, 3, 2))
    np.testing.assert_array_equal(part['b'][0], part['a'][:, None, None] * ones)
  again = list(minibatches.minibatches(TREE, 3, jax.random.key(0)))
  other = list(minibatches.minibatches(TREE, 3, jax.random.key(1)))
  np.testing.assert_array_equal(again[0]['a'], parts[0]['a'])
  assert (np.concatenate([part['a'] for part in other]) != order).any()


def test_one_minibatch_is_the_batch():
  (part,) = minibatches.minibatches(TREE, 1, jax.random.key(0))
  assert part is TREE


@pytest.mark.parametrize('size', [1, 2, 4, 12])
def test_micro_batches_are_strided(size):
  split = minibatches.split_prompts(TREE, size)
  parts = 12 // size
  assert split['b'][0].shape == (parts, size, 3, 2)
  for part in range(parts):
    np.testing.assert_array_equal(split['a'][part], PROMPTS[part::parts])


@pytest.mark.parametrize('number', [0, -1, 5, 24])
def test_what_does_not_divide_is_refused(number):
  message = r'choose one of \[1, 2, 3, 4, 6, 12\]'
  with pytest.raises(UserError, match=message):
    list(minibatches.minibatches(TREE, number, jax.random.key(0)))
  with pytest.raises(UserError, match=message):
    minibatches.split_prompts(TREE, number)
