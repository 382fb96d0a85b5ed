"""A model made from scratch learns arithmetic, first from examples, then by RL.

    python -m experiments.train --config=experiments/configs/quickstart.py
"""

from experiments.configs import base
from jaxrl_llm.tasks import arithmetic


def get_config():
  config = base.get_config()
  config.model.alphabet = arithmetic.ALPHABET
  config.model.architecture = dict(
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    tied=True,
    max_length=128,
  )
  config.task = dict(
    name='arithmetic',
    train=20_000,
    held_out=512,
    demonstrations=1_000,
    operations=(2, 3),
    operands=(1, 9),
    operators='+-*',
  )
  config.prompts.max_tokens = 16
  config.rewards = dict(correct=dict(name='arithmetic_answer'))
  config.algorithm = dict(name='rloo')
  config.rollout.update(prompts=32, samples=8, max_tokens=32)
  config.steps = 100
  config.optimizer = base.optimizer(3e-4)
  config.warm_start.update(steps=300, batch=64)
  config.warm_start.optimizer = base.optimizer(
    1e-3, warmup_updates=20, decay='cosine'
  )
  config.evaluation.update(every=20, prompts=512, batch=512)
  config.checkpoints.every = 100
  return config
