"""The tree estimator: exact with nested forks, by hand, and its mistakes."""

import numpy as np
import pytest
from listed import LONG, SMALL, assert_unbiased, compose
from loops import assert_is_formula, evaluate, quick_jit, tree_surrogate
from selection import mostly_slow
from toys import CLIP, plain_rollouts, random_rollouts, with_branch_rows

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')

enumeration, positions = est.enumeration, est.positions
TWO = enumeration.toy(seed=1, words=1, max_length=2, prompts=2)
ONE_FORK, NESTED = positions.fixed(1), positions.fixed(1, 2)


def tree(rule=NESTED, count=2, samples=1, *shaping, mix=1.0):
  credit = est.tree(count, samples, rule, mix)
  return compose(*shaping, credit, loss=est.clipped(0.2))


TREE = tree()


def forking(rule, count=2, samples=1):
  """`TREE` with other forks; where shapes are the same, so is its program."""
  branches = TREE.needs.branches._replace(
    positions=rule, count=count, samples=samples
  )
  return TREE._replace(needs=TREE.needs._replace(branches=branches))


# name: (estimator, toy, responses per prompt)
UNBIASED = {
  'one fork': (forking(ONE_FORK), SMALL, 2),
  'one fork, two prompts': (forking(ONE_FORK), TWO, 2),
  'two forks': (TREE, SMALL, 2),
  'two forks, two branches': (forking(NESTED, samples=2), SMALL, 2),
  'two forks, three responses': (TREE, SMALL, 3),
  'random': (forking(positions.uniform()), SMALL, 2),
  'three forks': (forking(positions.fixed(1, 2, 3), 3), LONG, 2),
  'delimiter': (forking(positions.delimiter(0), 3), LONG, 2),
  'entropy': (forking(positions.entropy_above(0.65), 3), LONG, 2),
}


MIXED = tree(NESTED, 2, 1, mix=0.6)
LEARNT = tree(NESTED, 2, 1, mix=est.tree_mix(1))


@pytest.mark.parametrize('name', mostly_slow(UNBIASED, 'one fork', 'two forks'))
def test_no_bias(name):
  estimator, toy, samples = UNBIASED[name]
  assert_unbiased(estimator, toy, samples)


def test_no_bias_with_other_responses_in_the_baseline():
  assert_unbiased(MIXED, SMALL, 2)
  assert_unbiased(LEARNT, SMALL, 2, running={'tree_mix': 0.3})


@pytest.mark.parametrize('seed', [0, 2])
def test_it_is_less_noisy_than_branches_for_values_alone(seed):
  """At the same forks, and so for the same tokens."""
  toy = enumeration.toy(seed=seed, words=1, max_length=3)
  ours = enumeration.examine(forking(NESTED, samples=2), toy)
  theirs = enumeration.examine(est.trepo(2, 2, NESTED), toy)
  assert ours.tokens == pytest.approx(theirs.tokens)
  assert ours.variance < 0.97 * theirs.variance


def test_no_bias_for_the_reward_as_shaped():
  """Branches are rows: what shapes responses shapes them."""
  kl = est.chain(est.at_last_token(), est.subtract_token_kl(1.0))
  exact = enumeration.exact_gradient(SMALL, kl=1.0)
  assert_unbiased(tree(NESTED, 2, 1, kl), SMALL, exact=exact)
  assert enumeration.examine(TREE, SMALL, exact=exact).bias > 0.05


def rows(rewards, parents, forked_at, lengths):
  """Rollouts of one prompt."""
  column = lambda x: np.array(x, np.int32)[None, :, None]
  return plain_rollouts(
    [rewards],
    lengths,
    6,
    np.float64,
    valid=np.ones((1, len(rewards), 1), bool),
    parents=column(parents),
    forked_at=column(forked_at),
  )


PREPARE = quick_jit(TREE.prepare)


def advantages(rollouts):
  batch = PREPARE(rollouts)
  return np.asarray(batch.advantages)[0], np.asarray(batch.shares)[0]


def test_by_hand():
  """Two responses; the first forks after one token and after three."""
  data = rows(
    rewards=[8.0, 1.0, 2.0, 3.0, 4.0],
    parents=[0, 1, 0, 0, 0],
    forked_at=[0, 0, 1, 1, 3],
    lengths=[6, 4, 5, 2, 6],
  )
  # V at the second fork is (8 + 4)/2 = 6, at the first (6 + 2 + 3)/3 = 11/3.
  got, shares = advantages(data)
  root, inner = 11 / 3 - 1, 6 - (2 + 3) / 2
  expected = np.zeros((5, 6))
  expected[0] = [root, inner, inner, 8 - 4, 8 - 4, 8 - 4]
  expected[1, :4] = 1 - 11 / 3
  expected[2, 1:5] = 2 - (6 + 3) / 2
  expected[3, 1:2] = 3 - (6 + 2) / 2
  expected[4, 3:] = 4 - 8
  np.testing.assert_allclose(got, expected, atol=1e-12)
  np.testing.assert_allclose(shares[0], [1, 1 / 3, 1 / 3, 1 / 6, 1 / 6, 1 / 6])
  np.testing.assert_allclose(shares[1], 1)
  for row, share in ((2, 1 / 3), (3, 1 / 3), (4, 1 / 6)):
    np.testing.assert_allclose(shares[row], share)


def test_a_mixed_baseline_by_hand():
  data = rows(
    rewards=[8.0, 1.0, 2.0, 3.0],
    parents=[0, 1, 0, 0],
    forked_at=[0, 0, 1, 1],
    lengths=[6, 4, 5, 2],
  )
  got = np.asarray(quick_jit(MIXED.prepare)(data).advantages)[0]
  np.testing.assert_allclose(got[0, :2], [13 / 3 - 1, 8 - (0.6 * 2.5 + 0.4)])
  np.testing.assert_allclose(got[2, 1], 2 - (0.6 * 5.5 + 0.4))
  # a: the fork's mean of its branches around 1, c: their variance.
  noise = 0.5
  spread = (2.5 - 1) ** 2 - noise / 2
  number = est.tree_mix(samples=4, decay=0.0)
  found = number.update(0.9, data.replace(running={'tree_mix': 0.9}))
  np.testing.assert_allclose(found, spread / (spread + noise / 3))


def test_a_fork_without_a_valid_branch_is_none():
  """Its tokens keep the baseline before it, and their whole weight."""
  data = rows([8.0, 1.0, 2.0], [0, 1, 0], [0, 0, 3], [6, 4, 5])
  got, shares = advantages(
    data.replace(valid=np.array([[[True], [True], [False]]]))
  )
  np.testing.assert_allclose(got[0], 8 - 1)
  np.testing.assert_allclose(shares[0], 1)
  np.testing.assert_array_equal(got[2], 0)


def test_a_branch_of_an_invalid_response_is_invalid():
  data = rows([8.0, 1.0, 2.0, 5.0], [0, 1, 0, 3], [0, 0, 3, 0], [6, 4, 5, 2])
  batch = PREPARE(
    data.replace(valid=np.array([[[False], [True], [True], [True]]]))
  )
  np.testing.assert_array_equal(batch.valid[0, :, 0], [0, 1, 0, 1])
  np.testing.assert_allclose(batch.advantages[0, 1, :4], 1 - 5)
  np.testing.assert_array_equal(batch.weights[0, [0, 2]], 0)
  np.testing.assert_allclose(batch.weights[0, 1, :4], 1 / 2)


def test_a_lone_response_has_no_part_in_its_baseline():
  """At the prompt 0, at a fork its branch."""
  data = rows([8.0, 9.0, 2.0], [0, 1, 0], [0, 0, 3], [6, 4, 5])
  got, _ = advantages(data.replace(valid=np.array([[[True], [False], [True]]])))
  np.testing.assert_allclose(got[0], [5, 5, 5, 6, 6, 6])
  np.testing.assert_allclose(got[2, 3:5], 2 - 8)


def test_many_rows_are_their_formula():
  """Two responses of each prompt and eight branches at ragged places.

  One response is not valid, and so its branches are not.
  """
  rollouts, outputs = random_rollouts(1, prompts=4, samples=10, length=9)
  rollouts = with_branch_rows(rollouts, samples=2)
  forks = np.sort(rollouts.forked_at[:, :, 0], axis=1)
  assert (np.diff(forks, axis=1) > 0).sum(axis=1).max() > 1  # nested
  recipe = est.trepo_tree(8, 8, clip=CLIP)
  got = evaluate(recipe, rollouts, outputs)
  assert_is_formula(got, tree_surrogate(0.0), rollouts, outputs)


def test_a_running_number_counts_whole_responses():
  """The KL that steers is theirs: branches would count prefixes again."""
  kl = est.adaptive_kl(0.1, target=1.0, horizon=2)
  recipe = est.trepo_tree(2, 2, kl=kl)
  data = rows([8.0, 1.0, 2.0], [0, 1, 0], [0, 0, 3], [6, 4, 5])
  data = data.replace(
    log_probs=np.full(data.mask.shape, 0.5)
    + np.array([0, 0, 9])[None, :, None],
    ref_log_probs=np.zeros(data.mask.shape),
    running=est.start_running(recipe.needs),
  )
  update = quick_jit(lambda data: est.update_running(recipe.needs, data))
  got = update(data)[kl.name]
  alone = data.replace(valid=np.array([[[True], [True], [False]]]))
  assert got == update(alone)[kl.name]
  assert got == pytest.approx(0.1 * 1.2)
