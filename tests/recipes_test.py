"""What each recipe asks for and what it gives back, by shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import RECIPES, random_rollouts

every_recipe = pytest.mark.parametrize('name', RECIPES)


MISSING = {
  'greedy': 'greedy_rewards',
  'reference': 'ref_log_probs',
  'critic': 'values',
  'entropy': 'entropy',
  'score_norms': 'score_norms',
  'branches': 'branch_mask',
  'running': 'running',
}


@every_recipe
def test_what_is_missing_is_named(name):
  rollouts, _ = random_rollouts(0)
  for need, field in MISSING.items():
    if getattr(RECIPES[name].needs, need):
      with pytest.raises(ValueError, match=f'needs `{field}`'):
        RECIPES[name].prepare(rollouts.replace(**{field: None}))


@every_recipe
def test_what_is_not_asked_for_is_not_needed(name):
  rollouts, outputs = random_rollouts(0)
  needs = RECIPES[name].needs
  fields = {f for need, f in MISSING.items() if not getattr(needs, need)}
  if not needs.branches:
    fields.add('branch_values')
  if not (needs.branches and needs.branches.score_weighted):
    fields.add('branch_baselines')
  rollouts = rollouts.replace(token_rewards=None, **dict.fromkeys(fields))
  if not needs.critic:
    outputs = outputs.replace(values=None)
  outputs = outputs.replace(entropy=None)
  recipe = RECIPES[name]
  batch = jax.eval_shape(recipe.prepare, rollouts)
  assert jax.eval_shape(recipe.loss, outputs, batch).shape == ()


@every_recipe
def test_float32_stays_float32(name):
  with jax.enable_x64(False):
    rollouts, outputs = random_rollouts(0, dtype=np.float32)
    recipe = RECIPES[name]
    batch = jax.eval_shape(recipe.prepare, rollouts)
    result = jax.eval_shape(jax.value_and_grad(recipe.loss), outputs, batch)
    floats = batch.advantages, batch.weights, batch.value_targets, result
    for array in jax.tree.leaves(floats):
      assert array.dtype == jnp.float32
