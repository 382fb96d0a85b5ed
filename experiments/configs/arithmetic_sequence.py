"""Arithmetic sequences, learned by RL alone from random weights.

    python -m experiments.train \\
      --config=experiments/configs/arithmetic_sequence.py \\
      --config.model.path=PATH/TO/arithmetic-sequence-init \\
      --config.task.train=PATH/TO/arithmetic_sequence/train.jsonl \\
      --config.task.held_out=PATH/TO/arithmetic_sequence/test.jsonl

Example: '8,3:9,4' → '7,2,6,1', the next 4 terms modulo 9.  The reward is dense:
k / (n + 1) if the first k of n characters are correct, and 1 only if the answer
is complete and ended (`rewards.functions.prefix_match`).

600 steps on answers of at most two tokens take 2:21 minutes on 2 CPU cores; the
greedy held-out reward rises from 0.007 to 0.323, out of the 0.364 that two
tokens can earn.  Complete answers then take another 150 steps and 4:02 minutes,
and the reward rises to 0.615:

    (the same command, but with)
      --config.model.path=runs/arithmetic_sequence/hf \
      --config.rollout.max_tokens=18 --config.algorithm.entropy=0.05 \
      --config.optimizer.learning_rate=5e-4 --config.steps=150 \
      --workdir=runs/arithmetic_sequence_whole

When trained on complete answers from the start, the policy guessed the same
digit for all prompts (0.13–0.19 after 20 minutes): tokens after the first
mistake earn nothing, and their gradient is noise.
"""

from experiments.configs import base
from jaxrl_llm import estimators as est


def standardized_sum(
  max_length: int, entropy: float, clip: float = 0.2
) -> est.Estimator:
  """Builds `grpo` with a constant length normaliser and an entropy bonus.

  Dividing by the length makes long wrong answers cheap: the policy stops
  ending its answers, and then none is correct.  Without the bonus, it settles
  on one digit for all prompts.
  """
  return est.estimator(
    est.standardize(),
    est.add(est.clipped(clip), est.entropy_bonus(entropy)),
    est.constant_length(max_length),
  )


def get_config():
  config = base.get_config()
  config.model.path = 'PATH/TO/arithmetic-sequence-init'
  config.task = dict(
    name='jsonl', train='PATH/TO/train.jsonl', held_out='PATH/TO/test.jsonl'
  )
  config.prompts.update(max_tokens=8, suffix='S')
  config.rewards = dict(prefix=dict(name='prefix_match'))
  config.algorithm = dict(
    name='experiments/configs/arithmetic_sequence.py:standardized_sum',
    max_length=8,
    entropy=0.3,
  )
  # Two tokens: those after the first mistake earn nothing and add noise.
  config.rollout.update(prompts=64, samples=16, max_tokens=2)
  config.training.minibatches = 4
  config.steps = 600
  config.optimizer = base.optimizer(1e-3, warmup_updates=10)
  config.evaluation.update(every=100, prompts=0, batch=200)
  config.checkpoints.every = 200
  return config
