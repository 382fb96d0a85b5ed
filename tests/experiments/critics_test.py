"""Rates of a policy and its critic, and critics that begin with a folder."""

import jax
import mistakes
import numpy as np
import scripts

from experiments import build, critics, online
from experiments.configs import base
from jaxrl_llm.models import transformer
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.tasks import arithmetic, vocabulary


def config_of(**changes):
  config = scripts.tiny_config()
  config.algorithm = dict(name='ppo')
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in changes.items()}
  )
  return config.lock()


def test_rates_of_both():
  config = config_of(
    critic__warmup=3,
    critic__optimizer=base.optimizer(1e-3, warmup_updates=2),
    training__epochs=2,
  )
  _, rates = online.optimizer(config, build.estimator(config).needs)
  policy = [rates(n)['learning_rate'] for n in range(18)]
  # Six updates are left out, then its own warm-up of ten begins.
  expected = [0.0] * 6 + [2e-5 * n for n in range(1, 11)] + [2e-4] * 2
  np.testing.assert_allclose(policy, expected, rtol=1e-5)
  critic = [rates(n)['critic/learning_rate'] for n in range(3)]
  np.testing.assert_allclose(critic, [5e-4, 1e-3, 1e-3], rtol=1e-5)


def test_a_critic_begins_with_a_folder(tmp_path):
  """A language model of another size with the policy's tokenizer."""
  path = str(tmp_path / 'model')
  config = config_of(critic__path=path, rollout__max_tokens=24)
  model = build.outline(config.model)
  shape = type(model.config)(
    vocab_size=len(model.tokenizer) + 2,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    max_length=32,
  )
  params = transformer.init(shape, jax.random.key(1))
  folders.save(tmp_path / 'model', shape, params, model.tokenizer)
  built = critics.critic(config, model)
  started = critics.start(config, built, None)
  for name in ('embed', 'norm', 'layers'):
    parts = started['trunk'][name], params[name]
    jax.tree.map(np.testing.assert_array_equal, *parts)
  shapes = jax.eval_shape(lambda: started)
  assert critics.critic_shapes(config, built) == shapes
  # It has to read what the policy writes.
  other = vocabulary.character_tokenizer(arithmetic.ALPHABET[::-1])
  with mistakes.refused('config.critic.path: ', ' has the id'):
    critics.critic(config, model._replace(tokenizer=other))
  config.rollout.max_tokens = 25
  with mistakes.refused('reads 32 tokens; prompt and response'):
    critics.critic(config, model)
