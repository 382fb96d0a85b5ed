"""Weighted prefix trees: unbiased by enumeration, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import TOY, TWO, assert_unbiased, close, compose, examine

from jaxrl_llm import estimators as est
from jaxrl_llm.estimators import thresholds as rules
from jaxrl_llm.estimators.exact import growth, relatives

pytestmark = pytest.mark.usefixtures('float64')

enumeration = est.enumeration
LONG = enumeration.toy(seed=2, words=1, max_length=4)
TOYS = {'one prompt': TOY, 'two prompts': TWO, 'long': LONG}
BASELINES = {
  'none': est.no_baseline(),
  'critic': est.tree_critic(),
  'other tree': est.other_tree(),
  'scaled': est.other_tree(est.tree_scale(0.3)),
}
UNSURE = est.Threshold(
  lambda standing: jnp.where(standing.entropy > 0.9, 0.2, 0.6), 5, True
)
RULES = {
  'one response': est.Threshold(1.0, 1),
  'half': est.Threshold(0.5, 2),
  'a quarter': est.Threshold(0.25, 4),
  'falling': est.Threshold(rules.falling(0.5, 0.1, 2), 8),
  'held': est.Threshold(0.1, 3),
  'falling and held': est.Threshold(rules.falling(0.6, 0.05, 2), 4),
  'by entropy': UNSURE,
}


def weighted(rule, baseline=None, *before):
  return compose(*before, est.weighted_tree(rule, baseline))


@pytest.mark.parametrize('toy', TOYS)
@pytest.mark.parametrize('rule', RULES)
def test_no_baseline_is_unbiased_by_every_rule(rule, toy):
  report = assert_unbiased(weighted(RULES[rule]), TOYS[toy])
  assert report.variance > 0


@pytest.mark.parametrize('baseline', BASELINES)
@pytest.mark.parametrize(
  'rule, toy',
  [('half', 'two prompts'), ('held', 'one prompt'), ('falling', 'long')],
)
def test_every_baseline_is_unbiased(baseline, rule, toy):
  assert_unbiased(weighted(RULES[rule], BASELINES[baseline]), TOYS[toy])


def test_the_recipe_is_unbiased_with_a_kl():
  report = examine(
    est.trepo_weighted(0.25, kl=0.3, clip=1e9),
    exact=enumeration.exact_gradient(TOY, kl=0.3),
  )
  close(report.gradient, report.exact_gradient)
  assert report.tokens < 4 * examine(est.reinforce(), samples=1).tokens


def test_a_tree_of_one_response_is_reinforce():
  one, other = (
    examine(weighted(RULES['one response'])),
    examine(est.reinforce()),
  )
  close(one.gradient, other.gradient)
  close(one.variance, examine(est.reinforce(), samples=1).variance)


def test_another_tree_lowers_the_variance():
  """At equal tokens: a baseline takes half of the trees."""
  rule = RULES['a quarter']
  alone = examine(weighted(rule))
  against = examine(weighted(rule, est.other_tree()))
  close(against.tokens, 2 * alone.tokens)
  assert against.variance < 0.9 * alone.variance / 2


def test_a_baseline_that_sees_a_cousin_is_biased():
  """One uniform number draws all tokens of a depth."""
  report = examine(weighted(RULES['a quarter'], relatives.cousins()))
  assert report.bias > 0.05


def by_dictionaries(rows, trees, rewards):
  """Q̂ after each token, from prefixes as tuples."""
  most = len(rows) // trees
  values = np.zeros((len(rows), max(len(tokens) for tokens, _ in rows)))
  for r, (tokens, weights) in enumerate(rows):
    tree = range(r // most * most, r // most * most + most)
    for t in range(len(tokens)):
      below = [
        rows[i][1][-1] * rewards[i]
        for i in tree
        if rows[i][0][: t + 1] == tokens[: t + 1] and rows[i][0]
      ]
      values[r, t] = sum(below) / weights[t]
  return values


def other_values(rows, rewards):
  """b before each token, from the longest prefix that the other tree kept."""
  most = len(rows) // 2
  values = np.zeros((len(rows), max(len(tokens) for tokens, _ in rows)))
  for r, (tokens, _) in enumerate(rows):
    others = range(most, 2 * most) if r < most else range(most)
    below = [i for i in others if rows[i][0]]
    for t in range(len(tokens)):
      size = t
      while not any(rows[i][0][:size] == tokens[:size] for i in below):
        size -= 1
      through = [i for i in below if rows[i][0][:size] == tokens[:size]]
      weight = rows[through[0]][1][size - 1] if size else 1.0
      values[r, t] = sum(rows[i][1][-1] * rewards[i] for i in through) / weight
  return values


@pytest.mark.parametrize('seed', range(3))
def test_values_are_those_of_prefixes(seed):
  """Random trees of the toy, against loops over tuples."""
  wanted = est.Trees(est.Threshold(0.2, 6), 2)
  (leaves,) = growth.list_trees(TOY, TOY.params, wanted, 10**4)
  random = np.random.default_rng(seed)
  picked = random.choice(len(leaves.weight), 2, p=leaves.weight)
  chosen = jax.tree.map(lambda x: x[picked][None], leaves)
  response, fields = growth.as_rows(chosen)
  rewards = random.normal(size=(1, 12, 1))
  rollouts = est.Rollouts(
    tokens=jnp.asarray(TOY.tokens[response]),
    mask=jnp.asarray(TOY.mask[response]) & fields['valid'],
    log_probs=jnp.zeros((1, 12, 3)),
    rewards=jnp.asarray(rewards),
    **fields,
  )
  rows = [
    (TOY.responses[n], list(w[: len(TOY.responses[n])])) if here else ((), [])
    for n, here, w in zip(
      np.asarray(response)[0],
      np.asarray(fields['valid'])[0, :, 0],
      np.asarray(fields['node_weights'])[0],
      strict=True,
    )
  ]
  credit = est.weighted_tree(wanted.rule, est.other_tree())
  found = np.asarray(credit.apply(rollouts.rewards, rollouts))[0]
  expected = by_dictionaries(rows, 2, rewards[0, :, 0])
  expected = expected - other_values(rows, rewards[0, :, 0])
  own = np.arange(3) >= np.asarray(rollouts.forked_at)[0]
  own &= np.asarray(rollouts.mask)[0]
  np.testing.assert_allclose(found, np.where(own, expected, 0.0), atol=1e-12)


def test_a_leaf_without_a_reward_gets_the_mean_of_the_others():
  rollouts = est.Rollouts(
    tokens=jnp.zeros((1, 4, 2), int),
    mask=jnp.array([[[1, 1], [1, 1], [1, 1], [0, 0]]], bool),
    log_probs=jnp.zeros((1, 4, 2)),
    rewards=jnp.array([[[1.0], [0.0], [0.0], [0.0]]]),
    valid=jnp.array([[[True], [True], [False], [False]]]),
    node_weights=jnp.array([[[1.0, 0.6], [1.0, 0.2], [1.0, 0.2], [0, 0]]]),
  )
  scored = est.score_all_leaves(rollouts, trees=1)
  close(scored.rewards[0, :3, 0], [1.0, 0.0, 0.75])
  assert scored.valid[0, :, 0].tolist() == [True, True, True, False]
  nothing = rollouts.replace(valid=jnp.zeros((1, 4, 1), bool))
  assert not est.score_all_leaves(nothing, trees=1).valid.any()


@pytest.mark.parametrize(
  'weights', [est.token_mean(), est.sequence_mean()], ids=['tokens', 'lengths']
)
def test_weights_that_depend_on_lengths_are_refused(weights):
  credit = est.weighted_tree(RULES['half'])
  with pytest.raises(ValueError, match='constant_length'):
    est.estimator(credit, est.score_function(), weights)
  est.estimator(credit, est.score_function(), est.constant_length(7))


def test_what_has_no_meaning_for_trees_is_refused():
  credit = est.weighted_tree(RULES['half'])
  with pytest.raises(ValueError, match='no longer a reward'):
    est.chain(est.standardize(), credit)
  with pytest.raises(ValueError, match='takes a number per response'):
    est.chain(credit, est.standardize())
  with pytest.raises(ValueError, match='omit it'):
    compose(credit, keep=est.mixed_outcomes())
  for rule in (est.Threshold(0.0, 4), est.Threshold(0.5, 0)):
    with pytest.raises(ValueError, match='has to be'):
      est.weighted_tree(rule)
  with pytest.raises(ValueError, match='at_most'):
    est.trepo_weighted(rules.falling(0.5, 0.1, 3))


@pytest.mark.parametrize('peak', [0.0, 3.0, 12.0])
def test_children_fit_and_no_state_is_lost(peak):
  """Whatever the weights: at least one child each, at most the room of all."""
  random = np.random.default_rng(1)
  for _ in range(50):
    states, room = random.integers(1, 9), 9
    logits = peak * random.normal(size=(states, 7))
    p = jax.nn.softmax(jnp.asarray(logits), axis=1)
    weights = jnp.asarray(random.dirichlet(np.ones(states)))
    rule = est.Threshold(float(random.uniform(0.01, 1.0)), room)
    standing = rules.Standing(jnp.int32(0), weights, None)
    tree = jnp.zeros(states, jnp.int32)
    found = rules.thresholds(rule, standing, p, tree, jnp.array([room]))
    exact, small = rules.expected(weights, p, found)
    assert (exact + small >= 1 - 1e-12).all()
    assert (exact + small).sum() <= room * (1 + 1e-12)
    assert (found <= weights).all()
    # It was raised only where that was needed.
    loose = jnp.minimum(weights, rule.tau)
    if sum(rules.expected(weights, p, loose)).sum() < room * 0.999:
      close(found, loose)
