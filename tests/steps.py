"""Online RL of a tiny model, begun so that a test takes its steps."""

import jax
import jax.numpy as jnp

from experiments import build, checks, online
from jaxrl_llm.rewards import RewardPart


def count_ones(completions):
  """Something that random responses earn."""
  return [text.count('1') / 4 for text in completions]


def begin(config, pay=count_ones):
  """(main phase, the state that it begins with, model)."""
  checks.check(config)
  model = build.model(config.model, config.seed)
  data = build.dataset(config, model.tokenizer)
  rl = online.Steps(config, model, data.train, jax.random.key(0))
  rl.reference, rl.rewards = model.params, [RewardPart('ones', pay)]
  return rl, rl.begin(jax.tree.map(jnp.copy, model.params)), model


def moved(old, new):
  """The largest change of a number between two trees."""
  gaps = jax.tree.map(lambda x, y: abs(x - y).max(), old, new)
  return max(jax.tree.leaves(gaps))
