"""Random masks, rewards and gaps through every recipe of `algorithms`."""

import inspect
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from fuzzing import fuzz
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from loops import quick_jit

from jaxrl_llm import estimators as est
from jaxrl_llm.estimators import algorithms
from jaxrl_llm.estimators.types import PER_TOKEN

# With five responses, or six, the mean of equal rewards may not be equal.
SHAPE = PROMPTS, SAMPLES, LENGTH = 2, 6, 3
NEEDED = {'max_length': LENGTH, 'buffer': 1}
RECIPES = {
  name: function(
    **{
      key: NEEDED[key]
      for key in inspect.signature(function).parameters
      if key in NEEDED
    }
  )
  for name, function in vars(algorithms).items()
  if inspect.isfunction(function)
  and function.__module__ == algorithms.__name__
  and not name.startswith('_')
}
RECIPES['rloo with adaptive KL'] = est.rloo(
  est.adaptive_kl(0.05, target=0.5, horizon=40)
)
RECIPES['gspo by token'] = est.gspo(ratio=est.sequence_token_ratio)
RECIPES['p3o by pair'] = est.p3o(ratio=est.pair_ratio)

# Nats: what a policy can say of a token, from sure to as good as never.
NATS = st.floats(-30.0, 0.0, width=32)
REWARDS = (
  st.sampled_from([0.0, 1.0, -1.0, 0.001, 1 / 3, 1e6, -1e6])
  | st.integers(0, 1000).map(lambda k: k / 1000)
  | st.floats(-1e3, 1e3, width=32)
)
GARBAGE = st.sampled_from([float('nan'), float('inf'), -float('inf'), 1e30])


def array(elements, shape=SHAPE, dtype=np.float64):
  return arrays.arrays(dtype, shape, elements=elements)


BOOLS = array(st.booleans(), dtype=bool)
PER_RESPONSE = (PROMPTS, SAMPLES, 1)


# Advantages over the valid responses of a group add up to 0.
CENTRED = ('rloo', 'grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo')


class Result(NamedTuple):
  """What a recipe makes of a batch: its gradient is that in the outputs."""

  loss: Any
  gradient: Any
  weights: Any
  advantages: Any


@quick_jit
def results(rollouts, outputs):
  """{recipe: `Result`}."""
  found = {}
  for name, recipe in RECIPES.items():
    batch = recipe.prepare(rollouts)
    pair = jax.value_and_grad(recipe.loss)(outputs, batch)
    found[name] = Result(*pair, batch.weights, batch.advantages)
  return found


@pytest.fixture(autouse=True, scope='module')
def float64():
  with jax.enable_x64(True):
    yield


def fill(value, mask, garbage):
  """A value where the mask is, garbage elsewhere."""
  return np.where(mask, value, garbage)


def make(mask, valid, rewards, nats, moves, garbage):
  """Rollouts and outputs that are garbage outside the mask."""
  kept = mask & valid
  entropy, norms = -nats, np.abs(moves)
  per_token = {
    name: fill(
      {'entropy': entropy, 'score_norms': norms}.get(name, nats), kept, garbage
    )
    for name in PER_TOKEN
  }
  running = {}
  for recipe in RECIPES.values():
    running |= est.start_running(recipe.needs)
  rollouts = est.Rollouts(
    tokens=np.zeros(SHAPE, np.int32),
    mask=mask,
    valid=valid,
    rewards=fill(rewards, valid, garbage),
    greedy_rewards=rewards[:, :1],
    running=jax.tree.map(np.float64, running),
    **per_token,
  )
  moved = fill(np.minimum(nats + moves, 0.0), kept, garbage)
  outputs = est.Outputs(
    log_probs=moved, entropy=fill(entropy, kept, garbage), values=moved
  )
  return rollouts, outputs


@fuzz(
  40,
  2000,
  mask=BOOLS,
  valid=array(st.booleans(), PER_RESPONSE, bool),
  rewards=array(REWARDS, PER_RESPONSE),
  nats=array(NATS),
  moves=array(st.floats(-5.0, 5.0, width=32)),
  garbage=GARBAGE,
)
def test_nothing_outside_the_mask_counts(
  mask, valid, rewards, nats, moves, garbage
):
  """Masks of any form, gaps too; losses and gradients are finite.

  Weights are 0 outside, where a loss alone may not show it: garbage is blanked
  before it is weighed.
  """
  found = jax.device_get(
    results(*make(mask, valid, rewards, nats, moves, garbage))
  )
  clean = jax.device_get(results(*make(mask, valid, rewards, nats, moves, 0.0)))
  outside = ~(mask & valid)
  for name, result in found.items():
    for part in jax.tree.leaves(result):
      assert np.isfinite(part).all(), name
    for part in (*jax.tree.leaves(result.gradient), result.weights):
      assert not part[outside].any(), name
    jax.tree.map(np.testing.assert_array_equal, clean[name], result)
  for name in CENTRED:
    total = found[name].advantages.sum(axis=1)
    np.testing.assert_allclose(total, 0.0, atol=1e-6, err_msg=name)


@fuzz(
  30,
  1000,
  reward=REWARDS,
  nats=array(NATS),
  valid=array(st.booleans(), PER_RESPONSE, bool),
  lengths=array(st.integers(0, LENGTH), PER_RESPONSE, np.int64),
)
def test_equal_rewards_teach_group_baselines_nothing(
  reward, nats, valid, lengths
):
  """Exactly, whatever the common reward is and however many have one."""
  mask = np.arange(LENGTH) < lengths
  rewards = np.full(PER_RESPONSE, reward)
  data = make(mask, valid, rewards, nats, np.zeros(SHAPE), 0.0)
  found = jax.device_get(results(*data))
  for name in ('rloo', 'dr_grpo', 'dapo', 'gspo', 'cispo', 'p3o'):
    assert not found[name].gradient.log_probs.any(), name
    assert not found[name].advantages.any(), name
