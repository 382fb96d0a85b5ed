"""Arithmetic from scratch: supervised warm start, then RL.

    python -m experiments.train --config=experiments/configs/quickstart.py

Example: '8+2*7+6=' → '8+4+6=2+6=8', answer '8' (every result is taken modulo
10).  60 % of the demonstrations are careless: they compute from left to right,
without precedence of products, and their answer is wrong if precedence matters.
Supervised training copies both kinds.  The reward of RL only checks the last
number.

On 2 slow CPU cores: 58 s of warm start and 45 s of RL.  Greedy exact
match on 512 held-out problems:

  after the warm start (400 steps)               67.0 %
  after RL (80 steps of GRPO, 45 s)              99.4 %
  after 400 more supervised steps, by
    --config.warm_start.steps=800 --config.steps=0
    in another --workdir                         84.2 %
"""

from experiments.configs import base
from jaxrl_llm.tasks import arithmetic


def get_config():
  config = base.get_config()
  config.model.alphabet = arithmetic.ALPHABET
  config.model.architecture = dict(
    hidden_size=128,
    intermediate_size=384,
    num_layers=2,
    num_heads=4,
    tied=True,
    max_length=64,
  )
  config.task = dict(
    name='arithmetic',
    train=20_000,
    held_out=512,
    demonstrations=20_000,
    operations=(3, 3),
    operands=(1, 9),
    operators='+*',
    modulus=10,
    careless=0.6,
  )
  config.prompts.max_tokens = 8
  config.rewards = dict(correct=dict(name='arithmetic_answer'))
  config.algorithm = dict(name='grpo', kl=0.0)
  config.rollout.update(prompts=32, samples=8, max_tokens=14)
  config.steps = 80
  config.optimizer = base.optimizer(2e-4, warmup_updates=10)
  config.warm_start.update(steps=400, batch=64)
  config.warm_start.optimizer = base.optimizer(1e-3, warmup_updates=20)
  config.evaluation.update(every=20, prompts=512, batch=512)
  config.checkpoints.every = 100
  return config
