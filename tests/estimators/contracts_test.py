"""One table of all recipes against everything that must never matter."""

import functools

import jax
import numpy as np
import peers
import pytest
from loops import make_program, quick_jit
from toys import (
  GROUP_BASED,
  NAN,
  RECIPES,
  changed,
  random_rollouts,
  rows_for,
  with_tree_rows,
)

from jaxrl_llm import estimators as est

pytestmark = pytest.mark.usefixtures('float64')

every_recipe = pytest.mark.parametrize('name', RECIPES)
group_based = pytest.mark.parametrize('name', GROUP_BASED)

# A constant more for all that a prompt's responses earn changes these.
ABSOLUTE = {
  'reinforce': 'no baseline',
  'reinforce_baseline': 'its baseline is that of earlier batches',
  'reinforce_plus_plus': 'its baseline is that of the batch',
  'reinforce_plus_plus with adaptive KL': 'its baseline is that of the batch',
  'trepo_weighted': 'no baseline',
  'trepo_weighted, clipped, with KL': 'no baseline',
  'rl_zvp': 'groups of equal rewards are told right from wrong',
  'rest_em': 'compares rewards with a threshold',
}
# A group of equal rewards among others teaches these something.
TAUGHT_BY_EQUALS = {
  'reinforce': 'no baseline',
  'reinforce_baseline': 'its baseline is that of earlier batches',
  'rloo with KL': 'the KL is part of the reward',
  'rloo with adaptive KL': 'the KL is part of the reward',
  'trepo with KL': 'the KL is part of the reward',
  'trepo_critic': 'a critic',
  'trepo_weighted': 'no baseline',
  'trepo_weighted, clipped, with KL': 'no baseline',
  'trepo_tree with KL': 'the KL is part of the reward',
  'reinforce_plus_plus': 'its baseline is that of the batch',
  'reinforce_plus_plus with adaptive KL': 'its baseline is that of the batch',
  'reinforce_plus_plus_baseline': 'whitening shifts, and a KL in the loss',
  'grpo': 'a KL in the loss',
  'rl_zvp': 'on purpose',
  'ppo': 'a critic',
  'ppo with KL and dual clip': 'a critic',
  'vapo': 'a critic',
  'vine_ppo': 'whitening shifts, and a KL in the loss',
  'rest_em': 'no baseline',
  'sft': 'no reward',
}
# Needs values that move with the rewards.
MATCHED = {
  name
  for name, e in RECIPES.items()
  if e.needs.greedy
  or e.needs.critic
  or (e.needs.branches and not e.needs.branches.trained)
}
PAIRED = {'p3o', 'p3o by pair', 'dpo', 'dpop', 'ipo', 'reward_model'}


# As in training: one program prepares a batch, another differentiates its loss.
PREPARE = quick_jit(
  lambda rollouts: {
    name: e.prepare(rows_for(e, rollouts)) for name, e in RECIPES.items()
  }
)
LOSSES = quick_jit(
  lambda outputs, batches: {
    name: jax.value_and_grad(e.loss)(outputs, batches[name])
    for name, e in RECIPES.items()
  }
)


def evaluate(rollouts, outputs):
  """{recipe: (loss, gradient in the outputs)}."""
  return jax.device_get(LOSSES(outputs, PREPARE(rollouts)))


def make_data(seed, **settings):
  """As random rollouts; `valid` is always an array: one program for all.

  Where it has a place to fork, the last row is a branch of the first.
  """
  rollouts, outputs = random_rollouts(seed, 4, **settings)
  rollouts = with_tree_rows(rollouts)
  if rollouts.valid is None:
    rollouts = rollouts.replace(valid=np.ones(rollouts.rewards.shape, bool))
  return rollouts, outputs


@functools.cache
def base(seed):
  """(rollouts, outputs, what all recipes make of them)."""
  data = make_data(seed)
  return *data, evaluate(*data)


# Results that several tests of one recipe each share.
scenario = functools.cache


def assert_same(x, y, atol=1e-12):
  leaves = jax.tree.leaves(x), jax.tree.leaves(y)
  for a, b in zip(*leaves, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def assert_equal(x, y):
  assert_same(x, y, atol=0)


def largest(tree):
  return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


def difference(x, y):
  return largest(jax.tree.map(lambda a, b: a - b, x, y))


def on_groups(function):
  """`function` on arrays with an entry per response, not per prompt."""
  return lambda array: array if array.shape[1] == 1 else function(array)


def test_the_tables_name_recipes():
  assert (ABSOLUTE.keys() | TAUGHT_BY_EQUALS.keys() | PAIRED) <= set(RECIPES)


@scenario
def cleaned():
  rollouts, outputs = make_data(8, invalid=False)
  rollouts = changed(rollouts, np.nan_to_num)
  rewards = rollouts.rewards.copy()
  rewards[1] = 0.3
  data = rollouts.replace(rewards=rewards), changed(outputs, np.nan_to_num)
  return *data, evaluate(*data)


@every_recipe
def test_op_by_op_it_is_the_same_and_no_nan_is_on_the_way(name):
  """Ragged rows, an empty one, a group of equal rewards; not jitted."""
  rollouts, outputs, expected = cleaned()
  recipe = RECIPES[name]
  with jax.debug_nans(True):
    batch = recipe.prepare(rows_for(recipe, rollouts))
    got = jax.value_and_grad(recipe.loss)(outputs, batch)
  assert_same(got, expected[name])
  assert np.isfinite(got[0]) and largest(got) > 0


@scenario
def in_micro_batches():
  rollouts, outputs, whole = base(1)
  batches = PREPARE(rollouts)
  parts = []
  for rows in (slice(0, 2), slice(2, 4)):
    part = lambda x, rows=rows: changed(x, lambda a: a[rows])
    micro = {name: part(batch) for name, batch in batches.items()}
    parts.append(jax.device_get(LOSSES(part(outputs), micro)))
  return parts, whole


@every_recipe
def test_micro_batches_add_up(name):
  (first, second), whole = in_micro_batches()
  loss = first[name][0] + second[name][0]
  join = lambda a, b: np.concatenate([a, b])
  gradient = jax.tree.map(join, first[name][1], second[name][1])
  assert_same((loss, gradient), whole[name])


@scenario
def padded(full):
  rollouts, outputs = make_data(2, full=full)

  def pad(array):
    if array.shape[-1] == 1:
      return array
    fill = {'b': False, 'i': -7, 'f': NAN}[array.dtype.kind]
    width = ((0, 0), (0, 0), (0, 3))
    return np.pad(array, width, constant_values=fill)

  wide = evaluate(changed(rollouts, pad), changed(outputs, pad))
  return wide, evaluate(rollouts, outputs)


@pytest.mark.parametrize('full', [False, True])
@every_recipe
def test_padding_changes_nothing(name, full):
  """With `full`, every response was cut at the limit: none has an EOS."""
  (loss, gradient), narrow = (results[name] for results in padded(full))
  assert_same((loss, changed(gradient, lambda a: a[..., :-3])), narrow)
  assert largest(changed(gradient, lambda a: a[..., -3:])) == 0
  assert np.isfinite(loss) and largest(narrow) > 0


@scenario
def with_other_garbage():
  rollouts, outputs, _ = base(3)
  results = []
  for garbage in (0.0, np.inf, -1e300):
    swap = lambda a, x=garbage: (
      np.where(np.isnan(a), x, a) if a.dtype.kind == 'f' else a
    )
    rows = changed(rollouts, swap)
    tokens = np.where(rows.mask, rows.tokens, 2**30).astype(np.int32)
    results.append(
      evaluate(rows.replace(tokens=tokens), changed(outputs, swap))
    )
  return results


@every_recipe
def test_garbage_changes_not_a_bit(name):
  """Outside the mask, in invalid responses, and where no branch forks."""
  for results in with_other_garbage():
    assert_equal(results[name], base(3)[2][name])


@scenario
def half_absent():
  rollouts, outputs = make_data(3, invalid=False)
  valid = rollouts.valid.copy()
  valid[:, 2:] = False
  drop = on_groups(lambda a: a[:, :2])
  marked = evaluate(rollouts.replace(valid=valid), outputs)
  return marked, evaluate(changed(rollouts, drop), changed(outputs, drop))


@every_recipe
def test_an_invalid_response_is_as_good_as_absent(name):
  marked, absent = half_absent()
  loss, gradient = marked[name]
  assert_same((loss, changed(gradient, lambda a: a[:, :2])), absent[name])
  assert largest(changed(gradient, lambda a: a[:, 2:])) == 0


@scenario
def shuffled(order):
  rollouts, outputs, before = base(4)
  shuffle = on_groups(lambda a: a[:, list(order)])
  moved = changed(rollouts, shuffle)
  moved = moved.replace(parents=np.argsort(order)[moved.parents])
  after = evaluate(moved, changed(outputs, shuffle))
  return after, before, shuffle


@every_recipe
def test_order_within_a_group_does_not_matter(name):
  """Of pairs: their order, and that within one; not who is whose partner."""
  for order in ((3, 2, 0, 1), (2, 0, 3, 1)):
    after, before, shuffle = shuffled(order)
    loss, gradient = before[name]
    expected = loss, changed(gradient, shuffle)
    if name in PAIRED and order == (2, 0, 3, 1):
      assert difference(after[name], expected) > 1e-3
    else:
      assert_same(after[name], expected)


@scenario
def with_a_constant(matched):
  rollouts, outputs = make_data(5)
  rewards = rollouts.rewards.copy()
  rewards[1] = 0.25
  rollouts = rollouts.replace(rewards=rewards)
  before = evaluate(rollouts, outputs)
  more = np.array([3.0, 1.0, -2.0, 0.0])[:, None, None]
  rollouts = rollouts.replace(rewards=rewards + more)
  if matched:
    rollouts = rollouts.replace(
      greedy_rewards=rollouts.greedy_rewards + more,
      values=rollouts.values + more,
      branch_values=rollouts.branch_values + more,
      branch_baselines=rollouts.branch_baselines + more,
    )
    outputs = outputs.replace(values=outputs.values + more)
  return before, evaluate(rollouts, outputs)


@pytest.mark.parametrize('matched', [True, False])
@every_recipe
def test_a_constant_for_one_prompt(name, matched):
  """It cancels in a baseline that moves with it, and only there."""
  before, after = (results[name] for results in with_a_constant(matched))
  if name in ABSOLUTE or (name in MATCHED and not matched):
    assert difference(before[1], after[1]) > 1e-3
  else:
    assert_same(after, before, atol=1e-11)


@scenario
def with_a_group_of_equals():
  rollouts, outputs = make_data(6, invalid=False)
  return evaluate(with_equal_rewards(rollouts, 1, 0.3), outputs)


def with_equal_rewards(rollouts, prompts, value):
  """All responses to `prompts`, greedy ones and branches too, earn `value`."""

  def fill(array):
    array = array.copy()
    array[prompts] = value
    return array

  names = ['rewards', 'greedy_rewards', 'branch_values', 'branch_baselines']
  return rollouts.replace(
    **{name: fill(getattr(rollouts, name)) for name in names}
  )


@every_recipe
def test_equal_rewards_among_others_teach_nothing(name):
  _, gradient = with_a_group_of_equals()[name]
  of_group = largest(changed(gradient, lambda a: a[1]))
  if name in TAUGHT_BY_EQUALS:
    assert of_group > 1e-3
  else:
    assert of_group == 0
  assert largest(gradient) > 1e-3


EXACT = [name for name in GROUP_BASED if name != 'rl_zvp']


@scenario
def with_equal_fractions():
  """All k/1000 in groups of 2 to 17; {recipe: (advantages, gradient)}."""
  rollouts, _ = random_rollouts(
    6, 16_000, 18, 2, invalid=False, dtype=np.float32
  )
  rollouts = with_tree_rows(rollouts)
  fractions = np.arange(1000, dtype=np.float32) / np.float32(1000)
  equal = np.tile(fractions, 16)[:, None, None]
  rollouts = with_equal_rewards(rollouts, slice(None), equal)
  valid = np.arange(18)[None] < np.repeat(range(2, 18), 1000)[:, None]
  # A policy that is the reference: the KL of every response is 0.
  rollouts = rollouts.replace(
    valid=valid[..., None], ref_log_probs=rollouts.log_probs
  )

  @quick_jit
  def program(rollouts):
    results = {}
    for name in EXACT:
      recipe = RECIPES[name]
      batch = recipe.prepare(rows_for(recipe, rollouts))
      loss = lambda x, name=name, batch=batch: RECIPES[name].loss(
        est.Outputs(log_probs=x, values=x), batch
      )
      gradient = jax.grad(loss)(rollouts.log_probs)
      results[name] = batch.advantages, gradient
    return results

  return jax.device_get(program(rollouts))


@pytest.mark.parametrize('name', EXACT)
def test_equal_fractions_give_exactly_zero(name):
  """Not one bit of a gradient, although their float32 mean differs."""
  with jax.enable_x64(False):
    advantages, gradient = with_equal_fractions()[name]
  assert advantages.dtype == gradient.dtype == np.float32
  np.testing.assert_array_equal(advantages, 0.0)
  np.testing.assert_array_equal(gradient, 0.0)


@scenario
def with_nothing():
  rollouts, outputs = make_data(7)
  nothing = np.zeros(rollouts.rewards.shape, bool)
  empty = np.zeros(rollouts.mask.shape, bool)
  return [
    evaluate(rollouts.replace(**fields), outputs)
    for fields in (dict(valid=nothing), dict(mask=empty))
  ]


@every_recipe
def test_nothing_valid_and_nothing_written_teach_nothing(name):
  for results in with_nothing():
    assert results[name][0] == 0 and largest(results[name]) == 0


@group_based
def test_one_response_per_prompt_is_refused(name):
  rollouts, _ = random_rollouts(0, samples=1, invalid=False)
  with pytest.raises(ValueError, match='at least 2 responses per prompt'):
    RECIPES[name].prepare(rollouts)


def test_one_response_per_prompt_is_enough_without_a_group():
  data = make_data(0, samples=1, invalid=False)
  alone = {n: e for n, e in RECIPES.items() if n not in GROUP_BASED}
  results = jax.device_get(make_program(alone)(*data))
  assert {'reinforce', 'remax', 'reinforce_plus_plus', 'ppo'} <= set(results)
  for loss, gradient in results.values():
    assert np.isfinite(loss) and largest(gradient) > 1e-3


@scenario
def on_four_devices(folder):
  """All recipes in a process of four devices, sharded over prompts."""
  out = folder / 'sharded.npz'
  peers.run(evaluate_sharded, out, count=1, devices=4)
  return dict(np.load(out))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('sharded')


@every_recipe
def test_sharded_over_prompts_is_not_sharded(name, folder):
  leaves = jax.tree.leaves(base(0)[2][name])
  for i, leaf in enumerate(leaves):
    got = on_four_devices(folder)[f'{name}/{i}']
    np.testing.assert_allclose(got, leaf, rtol=0, atol=1e-12)


def evaluate_sharded(index, path):
  mesh = jax.make_mesh((4,), ('data',), (jax.sharding.AxisType.Auto,))
  rows = jax.NamedSharding(mesh, jax.P('data'))
  with jax.enable_x64(True):
    rollouts, outputs = (
      changed(x, lambda array: jax.device_put(array, rows))
      for x in make_data(0)
    )
    arrays = {}
    for name, result in LOSSES(outputs, PREPARE(rollouts)).items():
      slopes = result[1].log_probs, result[1].values
      trained = slopes[name == 'reward_model']
      assert trained.sharding.is_equivalent_to(rows, 3)
      for i, leaf in enumerate(jax.tree.leaves(result)):
        arrays[f'{name}/{i}'] = np.asarray(leaf)
  np.savez(path, **arrays)
