"""Where branches may fork: with stopping times `hold` is exact, else it is not.

What looks ahead cannot be written as a rule, so these tests write its
`branch_mask` by hand over rollouts that have branches at every position.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed import LONG, SMALL, TOY, assert_unbiased, close, compose, examine
from selection import mostly_slow

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')

enumeration, positions = est.enumeration, est.positions
LIMIT = 3
TWO = enumeration.toy(seed=0, words=1, max_length=2, prompts=2)


def trepo(rule, count=2, samples=1, **options):
  return est.trepo(count, samples, rule, **options)


def partly(*values, **options):
  """λ between 0 and 1."""
  source = est.branches(*values, **options)
  return compose(est.at_last_token(), est.gae(1.0, 0.6, source))


SCORED = dict(score_weighted=True)
# name: (estimator, toy)
STOPPING_TIMES = {
  'fixed': (trepo(positions.fixed(1)), TOY),
  'fixed, two branches': (trepo(positions.fixed(1, 3), samples=2), LONG),
  'fixed, three branches': (trepo(positions.fixed(1), samples=3), TWO),
  'random': (trepo(positions.uniform(), count=1, samples=2), LONG),
  'random pairs': (trepo(positions.pairs(positions.uniform())), LONG),
  'delimiter': (trepo(positions.delimiter(1)), TOY),
  'delimiter with a cap': (trepo(positions.delimiter(0), 1, 2), LONG),
  'entropy': (trepo(positions.entropy_above(0.8)), TOY),
  'entropy summed': (trepo(positions.entropy_sum(1.9)), TOY),
  'scored, fixed': (trepo(positions.fixed(1, 2), 2, 2, **SCORED), LONG),
  'scored, random': (trepo(positions.uniform(), 1, 2, **SCORED), LONG),
  'scored, delimiter': (trepo(positions.delimiter(1), **SCORED), TOY),
  'scored, λ of 0.6': (partly(1, 2, positions.fixed(1), **SCORED), LONG),
  'λ of 0.6': (partly(2, 1, positions.fixed(1, 2)), TOY),
}
LONG_LISTS = ('fixed, two branches', 'fixed, three branches', 'random pairs')


@pytest.mark.parametrize(
  'name',
  mostly_slow(
    STOPPING_TIMES, *(n for n in STOPPING_TIMES if n not in LONG_LISTS)
  ),
)
def test_stopping_times_are_exact(name):
  assert_unbiased(*STOPPING_TIMES[name])


def test_interpolations_tilt():
  values = trepo(positions.fixed(1), fill=est.interpolate_values)
  pairs = positions.pairs(positions.fixed(2))
  advantages = trepo(pairs, fill=est.interpolate_advantages)
  for estimator in (values, advantages):
    report = examine(estimator, LONG)
    assert report.bias > 0.05 and report.cosine < 0.999


def test_values_interpolated_without_a_knot_are_a_sequence_mean():
  never = positions.fixed(LIMIT + 5)
  one = examine(trepo(never, fill=est.interpolate_values), TOY)
  loo = est.subtract_leave_one_out_mean()
  other = examine(compose(loo, weights=est.sequence_mean()), TOY)
  close(one.gradient, other.gradient)
  assert one.bias > 0.1


EVERYWHERE = positions.fixed(*range(1, 10))


def by_hand(choose, samples=1, values=None):
  """`hold` between boundaries that `choose` writes, rollouts → branch_mask."""
  whole = trepo(EVERYWHERE, count=9, samples=samples)

  def prepare(rollouts):
    time = jnp.broadcast_to(
      jnp.arange(rollouts.mask.shape[2]), rollouts.mask.shape
    )
    chosen = choose(rollouts, time, rollouts.mask.sum(axis=2, keepdims=True))
    mask = chosen & rollouts.branch_mask
    return whole.prepare(rollouts.replace(branch_mask=mask))

  return whole._replace(prepare=prepare)


def at_random_before_the_end(rollouts, time, lengths):
  """Up to three tokens; `running['u']` is 0 or 1, drawn for each response."""
  u = rollouts.running['u'][None, :, None].astype(int)
  return time == 1 + u * (lengths - 1) // 2


def middle(rollouts, time, lengths):
  return time == lengths // 2


def top_entropy(rollouts, time, lengths):
  inside = jnp.where(rollouts.mask & (time > 0), rollouts.entropy, -1.0)
  return inside == inside.max(axis=2, keepdims=True)


def good(rollouts):
  return rollouts.rewards > 1.0


def own_failure(rollouts, time, lengths):
  return ~good(rollouts) & (time > 0)


def mixed_group(rollouts, time, lengths):
  right = good(rollouts)
  mixed = right.any(axis=1, keepdims=True) & ~right.all(axis=1, keepdims=True)
  return mixed & (time > 0)


LOOK_AHEAD = {
  'the middle': middle,
  'highest entropy': top_entropy,
  'failures': own_failure,
  'mixed groups': mixed_group,
}


@pytest.mark.parametrize('name', LOOK_AHEAD)
def test_looking_ahead_is_biased(name):
  report = examine(by_hand(LOOK_AHEAD[name]), LONG)
  assert report.bias > 0.05 and report.cosine < 0.999


def test_random_positions_that_know_the_length_are_biased():
  estimator = by_hand(at_random_before_the_end)
  mean = np.zeros(TOY.params.shape)
  for u in itertools.product(range(2), repeat=2):
    running = {'u': np.array(u)}
    mean += enumeration.expected_gradient(estimator, TOY, running=running) / 4
  exact = enumeration.exact_gradient(TOY)
  assert np.linalg.norm(mean - exact) > 0.1 * np.linalg.norm(exact)


def test_the_same_by_hand_without_looking_ahead_is_exact():
  """The bias above is that of the boundaries, not of how they are written."""
  after = lambda rollouts, time, lengths: (
    (time == 2) | (jnp.roll(rollouts.tokens, 1, axis=2) == 0) & (time > 0)
  )
  assert examine(by_hand(after), TOY).bias < 1e-10


def test_a_cap_that_drops_the_rest_is_biased():
  """The tail behind the last step has to be held, not zeroed."""
  whole = trepo(positions.delimiter(0), count=1)

  def prepare(rollouts):
    batch = whole.prepare(rollouts)
    before = jnp.cumsum(rollouts.branch_mask, axis=2) == 0
    forked = rollouts.branch_mask.any(axis=2, keepdims=True)
    keep = before | ~forked
    return batch.replace(advantages=jnp.where(keep, batch.advantages, 0.0))

  assert examine(whole, LONG).bias < 1e-10
  assert examine(whole._replace(prepare=prepare), LONG).bias > 0.1


@pytest.mark.parametrize('samples', [2, 3])
def test_its_own_reward_in_the_baseline_scales(samples):
  """By 1 − 1/K with the same K at all knots, the first included."""
  found = trepo(positions.fixed(1), samples=samples - 1)

  def prepare(rollouts):
    rewards, knot = rollouts.rewards, rollouts.branch_mask
    inner = rewards / samples + (1 - 1 / samples) * rollouts.branch_values
    at = jnp.where(knot, inner, 0.0).sum(axis=2, keepdims=True)
    ahead = jnp.where(knot.any(axis=2, keepdims=True), at, rewards)
    root = rewards.mean(axis=1, keepdims=True)
    behind = jnp.cumsum(knot, axis=2) > 0
    batch = found.prepare(rollouts)
    return batch.replace(
      advantages=jnp.where(behind, rewards - at, ahead - root)
    )

  estimator = found._replace(prepare=prepare)
  report = examine(estimator, SMALL, samples)
  close(report.gradient, (1 - 1 / samples) * report.exact_gradient)
  # With another number of samples at the prompt it is a tilt.
  assert examine(estimator, SMALL, samples + 1).cosine < 0.9995


def test_a_branch_is_scored_as_a_response():
  """A penalty on responses alone, or a budget one token short: biased."""
  estimator = trepo(positions.fixed(1, 2))
  penalty = 0.5 * TOY.mask.sum(axis=1)
  shaped = TOY._replace(rewards=TOY.rewards - penalty)
  assert examine(estimator, shaped).bias < 1e-10
  only_responses = shaped._replace(branch_rewards=TOY.rewards)
  report = examine(estimator, only_responses)
  assert report.bias > 0.3
  # Rewards of any text, so that one cut short has its own.
  scores = np.random.default_rng(7).normal(size=(LIMIT + 1, 3))
  reward = lambda r: sum(scores[t, token] for t, token in enumerate(r))
  ended = lambda r: reward(r) + (r[-1] == 2)
  toy = TOY._replace(rewards=np.array([[ended(r) for r in TOY.responses]]))
  short = [ended(r[: LIMIT - 1]) for r in TOY.responses]
  report = examine(estimator, toy._replace(branch_rewards=np.array([short])))
  assert report.bias > 0.03
  assert examine(estimator, toy).bias < 1e-10


RULES = {
  'fixed': positions.fixed(1, 4),
  'uniform': positions.uniform(),
  'delimiter': positions.delimiter(0, 2),
  'entropy': positions.entropy_above(0.7),
  'entropy summed': positions.entropy_sum(1.1),
  'pairs': positions.pairs(positions.delimiter(1)),
}


@pytest.mark.parametrize('name', RULES)
def test_a_rule_does_not_see_what_comes_later(name):
  """Forks up to a position are the same whatever follows it."""
  rule = est.Branches(4, 1, RULES[name])
  random = np.random.default_rng(0)
  length, forks = 8, 0
  state = rule.positions.init(jax.random.key(0), rule.count, length)
  mark = jax.jit(lambda *x: positions.mark(rule, state, *x))
  for _ in range(20):
    size, t = random.integers(2, length + 1), random.integers(1, length)
    draw = lambda: (random.integers(0, 3, length), random.random(length))
    (tokens, entropy), (others, values) = draw(), draw()
    mask = np.arange(length) < size
    before = np.arange(length) < t
    # The state before token t is known: so is the entropy of its choice.
    known = np.arange(length) <= t
    found = mark(tokens, mask, entropy)
    changed = mark(
      np.where(before, tokens, others),
      mask | ~known,
      np.where(known, entropy, values),
    )
    upto = min(t, size - 1)
    np.testing.assert_array_equal(found[: upto + 1], changed[: upto + 1])
    assert not found[0] and not found[size:].any()
    assert found.sum() <= rule.count
    forks += found.sum()
  assert forks > 5


def test_another_speakers_tokens_use_up_no_position():
  rule = est.Branches(1, 1, positions.delimiter(7))
  tokens = np.array([1, 7, 7, 2, 7, 3])
  mask = np.array([1, 1, 0, 0, 1, 1], bool)
  found = positions.mark(rule, (), tokens, mask, np.zeros(6))
  np.testing.assert_array_equal(found, np.arange(6) == 5)


def test_entropies_are_summed_from_one_fork_to_the_next():
  rule = est.Branches(9, 1, positions.entropy_sum(1.0))
  [state] = rule.positions.states(rule.count, 8)
  entropy = np.array([9.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 2.0])
  tokens, mask = np.zeros(8, np.int32), np.ones(8, bool)
  found = positions.mark(rule, state, tokens, mask, entropy)
  # That of the first token is the prompt's, where nothing forks.
  np.testing.assert_array_equal(np.flatnonzero(found), [2, 6, 7])


def test_pairs_come_in_pairs():
  rule = est.Branches(3, 1, positions.pairs(positions.uniform()))
  with pytest.raises(ValueError, match='even count'):
    rule.positions.init(jax.random.key(0), rule.count, 8)
