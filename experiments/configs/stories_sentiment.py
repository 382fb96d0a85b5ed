"""A story model learns to write happy stories."""

from experiments.configs import base


def get_config():
  config = base.get_config()
  config.model.path = 'PATH/TO/stories260k'
  config.task = dict(
    name='text',
    path='PATH/TO/tinystories_1000.json',
    prompt_tokens=16,
    held_out=128,
  )
  config.prompts.max_tokens = 16
  config.rewards = dict(sentiment=dict(name='sentiment'))
  config.algorithm = dict(name='grpo', kl=0.45)
  config.rollout.update(
    prompts=16, samples=16, max_tokens=64, log_prob_tolerance=1e-4
  )
  config.steps = 120
  config.optimizer = base.optimizer(5e-4, warmup_updates=5, decay='linear')
  config.evaluation.update(
    every=25, prompts=128, batch=128, samples=2, temperature=1.0
  )
  config.checkpoints.every = 100
  return config
