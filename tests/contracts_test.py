"""One table of all recipes against everything that must never matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import GROUP_BASED, NAN, RECIPES, changed, random_rollouts

from jaxrl_llm import estimators as est

every_recipe = pytest.mark.parametrize('name', RECIPES)
group_based = pytest.mark.parametrize('name', GROUP_BASED)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def evaluate_eagerly(name, rollouts, outputs):
  """(loss, gradient in the log-probabilities)."""
  batch = RECIPES[name].prepare(rollouts)
  loss, gradient = jax.value_and_grad(RECIPES[name].loss)(outputs, batch)
  return loss, gradient.log_probs


evaluate_jitted = jax.jit(evaluate_eagerly, static_argnums=0)


def evaluate(*args):
  return jax.device_get(evaluate_jitted(*args))


def assert_same(x, y, atol=1e-12):
  for a, b in zip(x, y, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@every_recipe
def test_jit_is_no_jit(name):
  data = random_rollouts(0)
  assert_same(evaluate(name, *data), evaluate_eagerly(name, *data))


@every_recipe
def test_micro_batches_add_up(name):
  rollouts, outputs = random_rollouts(1, prompts=4)
  batch = jax.jit(RECIPES[name].prepare)(rollouts)
  differentiate = jax.jit(jax.value_and_grad(RECIPES[name].loss))
  losses, gradients = [], []
  for rows in (slice(0, 2), slice(2, 4)):
    part = lambda x, rows=rows: changed(x, lambda a: a[rows])
    loss, gradient = differentiate(part(outputs), part(batch))
    losses.append(loss)
    gradients.append(gradient.log_probs)
  whole = evaluate(name, rollouts, outputs)
  assert_same((sum(losses), np.concatenate(gradients)), whole)


@every_recipe
def test_padding_changes_nothing(name):
  rollouts, outputs = random_rollouts(2)
  loss, gradient = evaluate(name, rollouts, outputs)

  def pad(array):
    if array.shape[-1] == 1:
      return array
    fill = {'b': False, 'i': -7, 'f': NAN}[array.dtype.kind]
    width = ((0, 0), (0, 0), (0, 3))
    return np.pad(array, width, constant_values=fill)

  wide = evaluate(name, changed(rollouts, pad), changed(outputs, pad))
  assert_same((wide[0], wide[1][..., :-3]), (loss, gradient))
  np.testing.assert_array_equal(wide[1][..., -3:], 0.0)


@every_recipe
def test_an_invalid_response_is_as_good_as_absent(name):
  rollouts, outputs = random_rollouts(3, prompts=1, invalid=False)
  valid = np.array([True, True, False, True])[None, :, None]
  marked = evaluate(name, rollouts.replace(valid=valid), outputs)
  drop = lambda array: array[:, valid[0, :, 0]]
  absent = evaluate(name, changed(rollouts, drop), changed(outputs, drop))
  assert_same((marked[0], drop(marked[1])), absent)
  np.testing.assert_array_equal(marked[1][:, 2], 0.0)


@every_recipe
def test_order_within_a_group_does_not_matter(name):
  rollouts, outputs = random_rollouts(4)
  loss, gradient = evaluate(name, rollouts, outputs)
  shuffle = lambda array: array[:, [2, 0, 3, 1]]
  again = evaluate(name, changed(rollouts, shuffle), changed(outputs, shuffle))
  assert_same(again, (loss, shuffle(gradient)))


@every_recipe
def test_a_constant_for_one_prompt(name):
  """It cancels in a baseline taken from the group, and only there."""
  rollouts, outputs = random_rollouts(5)
  before = evaluate(name, rollouts, outputs)
  more = rollouts.rewards + np.array([3.0, 0.0, -2.0])[:, None, None]
  after = evaluate(name, rollouts.replace(rewards=more), outputs)
  if name == 'reinforce':
    assert np.abs(after[1] - before[1]).max() > 0.1
  else:
    assert_same(after, before, atol=1e-11)


@group_based
def test_equal_rewards_give_exactly_zero(name):
  """All k/1000 in groups of 2, 3, 5, 7, 17: not one bit of a gradient."""
  with jax.enable_x64(False):
    rollouts, outputs = random_rollouts(
      6, 5000, 17, 2, invalid=False, dtype=np.float32
    )
    equal = np.tile(np.arange(1000, dtype=np.float32) / np.float32(1000), 5)
    sizes = np.repeat([2, 3, 5, 7, 17], 1000)
    valid = np.arange(17)[None] < sizes[:, None]
    # A policy that is the reference: the KL of every response is 0.
    rollouts = rollouts.replace(
      rewards=np.repeat(equal[:, None, None], 17, axis=1),
      valid=valid[..., None],
      ref_log_probs=rollouts.log_probs,
    )
    batch = jax.jit(RECIPES[name].prepare)(rollouts)
    assert batch.advantages.dtype == np.float32
    np.testing.assert_array_equal(batch.advantages, 0.0)
    outputs = outputs.replace(log_probs=rollouts.log_probs)
    _, gradient = evaluate(name, rollouts, outputs)
    np.testing.assert_array_equal(gradient, 0.0)


@every_recipe
def test_nothing_valid_is_finite_and_teaches_nothing(name):
  rollouts, outputs = random_rollouts(7)
  nothing = np.zeros(rollouts.rewards.shape, bool)
  empty = np.zeros(rollouts.mask.shape, bool)
  for fields in (dict(valid=nothing), dict(mask=empty)):
    rows = rollouts.replace(**fields)
    loss, gradient = evaluate(name, rows, outputs)
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


@every_recipe
def test_no_nan_on_the_way(name):
  """Clean input, ragged rows, a group of equal rewards: `debug_nans` holds."""
  rollouts, outputs = random_rollouts(8, invalid=False)
  clean = lambda array: np.nan_to_num(array)
  rollouts, outputs = changed(rollouts, clean), changed(outputs, clean)
  rewards = rollouts.rewards.copy()
  rewards[1] = 0.3
  with jax.debug_nans(True):
    loss, gradient = evaluate(name, rollouts.replace(rewards=rewards), outputs)
  assert np.isfinite(loss) and np.isfinite(gradient).all()


@group_based
def test_one_response_per_prompt_is_refused(name):
  rollouts, _ = random_rollouts(0, samples=1, invalid=False)
  with pytest.raises(ValueError, match='at least 2 responses per prompt'):
    RECIPES[name].prepare(rollouts)


@pytest.mark.parametrize('name', ['rloo with KL', 'grpo'])
def test_a_missing_reference_is_named(name):
  rollouts, _ = random_rollouts(0)
  with pytest.raises(ValueError, match='`ref_log_probs`'):
    RECIPES[name].prepare(rollouts.replace(ref_log_probs=None))


@every_recipe
def test_prepared_batches_are_float(name):
  with jax.enable_x64(False):
    rollouts, _ = random_rollouts(0, dtype=np.float32)
    batch = RECIPES[name].prepare(rollouts)
    assert batch.weights.dtype == batch.advantages.dtype == jnp.float32
    assert isinstance(batch, est.Batch)
