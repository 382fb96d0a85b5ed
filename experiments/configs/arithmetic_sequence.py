"""Arithmetic sequences, learned by RL alone from random weights.

    python -m experiments.train \\
      --config=experiments/configs/arithmetic_sequence.py \\
      --config.model.path=PATH/TO/arithmetic-sequence-init \\
      --config.task.train=PATH/TO/arithmetic_sequence/train.jsonl \\
      --config.task.held_out=PATH/TO/arithmetic_sequence/test.jsonl
"""

from experiments.configs import base


def get_config():
  config = base.get_config()
  config.model.path = 'PATH/TO/arithmetic-sequence-init'
  config.task = dict(
    name='jsonl', train='PATH/TO/train.jsonl', held_out='PATH/TO/test.jsonl'
  )
  config.prompts.update(max_tokens=8, suffix='S')
  config.rewards = dict(prefix=dict(name='prefix_match'))
  config.algorithm = dict(name='grpo', kl=0.0)
  config.rollout.update(
    prompts=32, samples=16, max_tokens=18, log_prob_tolerance=1e-4
  )
  config.steps = 800
  config.optimizer = base.optimizer(1e-3, warmup_updates=10)
  config.evaluation.update(every=50, prompts=0, batch=200)
  config.checkpoints.every = 100
  return config
