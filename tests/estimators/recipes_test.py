"""What each recipe asks for and what it gives back, by shapes alone."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import RECIPES, random_rollouts, rows_for, with_tree_rows

from jaxrl_llm.estimators import actor_critic, algorithms, supervised_preference
from tests.estimators import (
  actor_critic_test,
  algorithms_test,
  supervised_preference_test,
)

every_recipe = pytest.mark.parametrize('name', RECIPES)


def fields(needs):
  """{field of the rollouts: whether it is needed}."""
  branches = needs.branches
  valued = bool(branches) and not branches.trained
  trained = bool(branches) and branches.trained
  return {
    'greedy_rewards': needs.greedy,
    'ref_log_probs': needs.reference,
    'values': needs.critic,
    'entropy': needs.entropy,
    'score_norms': needs.score_norms,
    'token_rewards': needs.token_rewards,
    'branch_values': valued,
    'branch_mask': valued,
    'branch_baselines': valued and branches.score_weighted,
    'parents': trained or needs.tree is not None,
    'forked_at': trained or needs.tree is not None,
    'node_weights': needs.tree is not None,
    'running': bool(needs.running),
  }


def make_rollouts(recipe, **settings):
  rollouts, outputs = random_rollouts(0, **settings)
  return rows_for(recipe, with_tree_rows(rollouts)), outputs


@every_recipe
def test_what_is_missing_is_named(name):
  recipe = RECIPES[name]
  rollouts, _ = make_rollouts(recipe)
  for field, needed in fields(recipe.needs).items():
    if needed:
      with pytest.raises(ValueError, match=f'needs `{field}`'):
        recipe.prepare(rollouts.replace(**{field: None}))


@every_recipe
def test_what_is_not_asked_for_is_not_needed(name):
  recipe = RECIPES[name]
  rollouts, outputs = make_rollouts(recipe)
  wanted = fields(recipe.needs)
  rollouts = rollouts.replace(**{f: None for f in wanted if not wanted[f]})
  if not recipe.needs.critic and name != 'reward_model':
    outputs = outputs.replace(values=None)
  outputs = outputs.replace(entropy=None)
  batch = jax.eval_shape(recipe.prepare, rollouts)
  assert jax.eval_shape(recipe.loss, outputs, batch).shape == ()


@every_recipe
def test_float32_stays_float32(name):
  with jax.enable_x64(False):
    recipe = RECIPES[name]
    rollouts, outputs = make_rollouts(recipe, dtype=np.float32)
    batch = jax.eval_shape(recipe.prepare, rollouts)
    result = jax.eval_shape(jax.value_and_grad(recipe.loss), outputs, batch)
    floats = batch.advantages, batch.weights, batch.value_targets, result
    for array in jax.tree.leaves(floats):
      assert array.dtype == jnp.float32


# The module of recipes, and the test of their formulas.
TESTED = {
  algorithms: algorithms_test,
  actor_critic: actor_critic_test,
  supervised_preference: supervised_preference_test,
}


def test_every_recipe_has_a_formula():
  public, formulas = set(), {}
  for module, test in TESTED.items():
    for name, function in inspect.getmembers(module, inspect.isfunction):
      if function.__module__ == module.__name__ and name[0] != '_':
        public.add(name)
    formulas |= test.FORMULAS
  assert formulas.keys() == RECIPES.keys()
  assert public == {name.split()[0].strip(',') for name in RECIPES}
