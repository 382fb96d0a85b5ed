"""Pools of responses: what is chosen, kept, stored and handed to a loss."""

import itertools
import math

import numpy as np
import pytest

from experiments import label
from jaxrl_llm import estimators
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import stored


@pytest.fixture
def sampled():
  """Rewards, tokens and lengths of 3 prompts with 4 responses each."""
  rng = np.random.default_rng(0)
  rewards = np.array([[0, 1, 0, 1], [1, 1, 1, 1], [0.5, 0, 2, 1]], np.float32)
  tokens = rng.integers(3, 9, (3, 4, 5))
  lengths = rng.integers(1, 6, (3, 4))
  return rewards, tokens, lengths


def test_pairs_are_disjoint_and_as_far_apart_as_can_be(sampled):
  rewards, *_ = sampled
  valid = np.ones(rewards.shape, bool)
  pairs = stored.ranked_pairs(rewards, valid)
  assert pairs.tolist() == [[0, 1, 2], [0, 3, 0], [2, 2, 1], [2, 3, 0]]
  # By hand: of all ways to pair up prompt 2, none has a larger first margin.
  row = rewards[2]
  most = max(
    abs(row[i] - row[j]) for i, j in itertools.combinations(range(4), 2)
  )
  assert row[2] - row[1] == most
  valid[2, 2] = False
  assert stored.ranked_pairs(rewards, valid)[2:].tolist() == [[2, 3, 1]]
  assert stored.ranked_pairs(rewards, np.zeros_like(valid)).shape == (0, 3)


def test_noise_prefers_as_often_as_bradley_and_terry_say():
  """The better one of a pair may come first or second."""
  rewards = np.array([[0.0, 1.0, -2.0]])
  pairs = np.array([[0, 1, 0], [0, 0, 1], [0, 1, 2]])
  count = 20_000
  drawn = label.noisy_pairs(np.repeat(pairs, count, axis=0), rewards, 1.5, [7])
  for i, (_, one, two) in enumerate(pairs):
    margin = rewards[0, one] - rewards[0, two]
    expected = 1 / (1 + math.exp(-margin / 1.5))
    found = drawn[i * count : (i + 1) * count]
    assert {tuple(row) for row in found} == {(0, one, two), (0, two, one)}
    error = math.sqrt(expected * (1 - expected) / count)
    assert abs((found[:, 1] == one).mean() - expected) < 4 * error
  sure = label.noisy_pairs(pairs, rewards, 0.0, [7])
  assert sure.tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 2]]


def test_singles_are_what_is_kept():
  keep = np.array([[True, False], [False, False], [True, True]])
  assert stored.singles(keep).tolist() == [[0, 0], [2, 0], [2, 1]]


def test_what_is_chosen_is_what_was_sampled(sampled):
  rewards, tokens, lengths = sampled
  pairs = stored.ranked_pairs(rewards, np.ones(rewards.shape, bool))
  pool = stored.select([7, 5, 3], pairs, tokens, lengths, rewards)
  assert pool.prompts.tolist() == [7, 7, 3, 3]
  for group, (p, best, worst) in enumerate(pairs):
    for side, g in enumerate((best, worst)):
      np.testing.assert_array_equal(pool.tokens[group, side], tokens[p, g])
      assert pool.lengths[group, side] == lengths[p, g]
      assert pool.rewards[group, side] == rewards[p, g]
  capped = stored.limit(stored.join([pool, pool]), 3)
  assert capped.prompts.tolist() == [7, 7, 3, 3, 7, 3]
  np.testing.assert_array_equal(capped.tokens[4], pool.tokens[0])


def test_a_file_gives_back_what_was_saved(sampled, tmp_path):
  rewards, tokens, lengths = sampled
  pool = stored.select(
    [0, 1, 2], stored.singles(rewards > 0), tokens, lengths, rewards
  )
  scored = pool._replace(
    ref_log_probs=np.random.default_rng(1).normal(size=pool.tokens.shape)
  )
  for name, saved in (('a', pool), ('b', scored)):
    path = tmp_path / 'rounds' / f'{name}.npz'
    stored.save_pool(path, saved)
    loaded = stored.load_pool(path)
    for before, after in zip(saved, loaded, strict=True):
      np.testing.assert_array_equal(before, after)
      assert before is None or before.dtype == after.dtype
  with pytest.raises(UserError, match='c.npz'):
    stored.load_pool(tmp_path / 'c.npz')


def test_a_damaged_file_is_told_or_harmless(tmp_path):
  path = tmp_path / 'pool.npz'
  pool = stored.given([0, 1], [[[1, 2, 3], [4]], [[5], [6]]], [[1, 0]] * 2, 0)
  stored.save_pool(path, pool)
  whole, told = path.read_bytes(), 0
  damaged = [whole[:size] for size in range(0, len(whole), 20)]
  for place in range(len(whole)):
    damaged.append(bytearray(whole))
    damaged[-1][place] ^= 0xFF
  for content in damaged:
    path.write_bytes(content)
    try:
      loaded = stored.load_pool(path)
    except UserError as error:
      assert 'restore it' in str(error) and str(error).count('\n') == 1
      told += 1
      continue
    for before, after in zip(pool, loaded, strict=True):
      np.testing.assert_array_equal(before, after)
  assert told > len(damaged) / 2


def test_columns_behind_the_longest_response_go_in_multiples():
  pool = stored.given([0, 1], [[[1] * 40], [[2] * 3]], [[1], [1]], pad_id=0)
  wide = pool._replace(tokens=np.pad(pool.tokens, ((0, 0), (0, 0), (0, 60))))
  assert stored.narrowed(wide).tokens.shape == (2, 1, 64)
  assert stored.narrowed(wide, bucket=8).tokens.shape == (2, 1, 40)
  assert stored.narrowed(pool).tokens.shape == (2, 1, 40)


def test_a_loss_sees_every_token_of_a_group_and_no_other():
  pool = stored.given(
    [4, 9], [[[5, 6, 1], [7, 1]], [[8, 1], [5, 5, 5, 1]]], [[1, 0]] * 2, 0
  )
  pool = pool._replace(ref_log_probs=np.full(pool.tokens.shape, -2.0))
  rollouts = stored.to_rollouts(pool)
  assert rollouts.mask.sum(axis=2).tolist() == [[3, 2], [2, 4]]
  batch = estimators.dpo().prepare(rollouts)
  assert batch.valid.all() and batch.mask.sum() == 11
  assert batch.advantages[..., 0].tolist() == [[1, -1], [1, -1]]
  alone = stored.to_rollouts(stored.given([0], [[[5, 1]]], [[1]], 0))
  assert estimators.sft().prepare(alone).weights.tolist() == [[[0.5, 0.5]]]
