"""Arithmetic sequences, learned by RL alone from random weights.

    python -m experiments.train \\
      --config=experiments/configs/arithmetic_sequence.py \\
      --config.model.path=PATH/TO/arithmetic-sequence-init \\
      --config.task.train=PATH/TO/arithmetic_sequence/train.jsonl \\
      --config.task.held_out=PATH/TO/arithmetic_sequence/test.jsonl

One datum: '8,3:9,4' → '7,2,6,1', the next 4 terms modulo 9.  The reward is
dense: k / (n + 1) for k of n characters right from the left, and 1 only if the
answer is whole and ended (`rewards.functions.prefix_match`).

Not solved yet.  After 200 steps (7 minutes on 2 busy CPU cores) the held-out
reward went from 0.007 to 0.127, which is what ending the empty answers earns;
the full 1,500 steps have not been run.
"""

from experiments.configs import base
from jaxrl_llm import estimators as est


def standardized_sum(max_length: int, clip: float = 0.2) -> est.Estimator:
  """`grpo` with a constant in place of each response's length.

  Dividing by the length makes long wrong answers cheap: the policy stops to
  end its answers, and then none is right.
  """
  return est.estimator(
    est.standardize(), est.clipped(clip), est.constant_length(max_length)
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
  )
  config.rollout.update(
    prompts=128, samples=8, max_tokens=18, log_prob_tolerance=1e-4
  )
  # The sampled answers are few and short: each serves two epochs of updates.
  config.training.update(minibatches=4, epochs=2)
  config.steps = 400
  config.optimizer = base.optimizer(2e-3, warmup_updates=10)
  config.evaluation.update(every=50, prompts=0, batch=200)
  config.checkpoints.every = 50
  return config
