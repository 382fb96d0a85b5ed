"""Every recipe through the update: micro-batches add up to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from selection import mostly_slow

from jaxrl_llm import estimators as est
from jaxrl_llm import training
from tests.training import update_test

PROMPTS = 4


def forward(trainable, frozen, prompts, batch):
  """A policy, and a critic, that read the last token only."""
  outputs = update_test.bigram(trainable, frozen, prompts, batch)
  return outputs.replace(values=trainable['critic']['values'][batch.tokens])


def case(estimator):
  """(parameters, prompts, prepared batch), off policy."""
  trainable, prompts, _ = update_test.bigram_case(est.rloo(), PROMPTS)
  random = np.random.default_rng(1)
  values = random.normal(size=update_test.WORDS).astype(np.float32)
  rollouts, _ = toys.random_rollouts(1, PROMPTS, dtype=np.float32)
  rollouts = toys.with_branch_rows(rollouts)
  batch = estimator.prepare(toys.rows_for(estimator, rollouts))
  return trainable | {'critic': {'values': values}}, prompts, batch


@pytest.mark.parametrize('name', mostly_slow(toys.RECIPES, 'dapo', 'ppo'))
def test_micro_batches_of_every_recipe(name):
  """In float32, at a rate that makes the gradient's largest number 1."""
  estimator = toys.RECIPES[name]
  trainable, prompts, batch = case(estimator)
  loss = lambda t: estimator.loss(forward(t, None, prompts, batch), batch)
  gradient = jax.jit(jax.grad(loss))(trainable)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
  assert largest > 1e-3
  optimizer = optax.sgd(1.0 / largest)
  for micro in (1, PROMPTS // 2):
    update = training.make_update(forward, estimator, optimizer, micro)
    copies = jax.tree.map(jnp.array, trainable)  # which the update takes over
    state, metrics = update(
      training.init_state(copies, optimizer), None, prompts, batch
    )
    assert not metrics['skipped']
    jax.tree.map(
      lambda old, new, g: np.testing.assert_allclose(
        old - new, g / largest, rtol=0, atol=1e-5
      ),
      trainable,
      state.trainable,
      gradient,
    )
