"""A random model with 100 million parameters, to benchmark a machine.

    python -m experiments.train --config=experiments/configs/random_100m.py
    python -m experiments.train --config=experiments/configs/random_100m.py \
      --config.algorithm.name=trepo --workdir=runs/random_100m_trepo

The vocabulary is so large that a response rarely ends before 1,000 tokens, so
that all steps do the same work.  The model learns nothing.  The times of the
parts of a step are in timings.jsonl, token counts in metrics.jsonl; the table
in docs/scale.md is made from them.
"""

from experiments.configs import base
from jaxrl_llm.tasks import arithmetic


def get_config():
  config = base.get_config()
  config.model.update(dtype='bfloat16', remat=True)
  more = range(0x4E00, 0x4E00 + 8_000)
  config.model.alphabet = arithmetic.ALPHABET + ''.join(map(chr, more))
  config.model.architecture = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_layers=10,
    num_heads=12,
    tied=True,
    max_length=1024,
  )
  config.task = dict(name='arithmetic', train=1_000, held_out=32)
  config.prompts.max_tokens = 16
  config.rewards = dict(correct=dict(name='arithmetic_answer'))
  config.algorithm = dict(name='grpo')
  config.rollout.update(prompts=32, samples=8, max_tokens=1_000)
  config.training.micro_prompts = 8
  config.steps = 10
  config.evaluation.update(every=10, prompts=32, batch=32)
  config.checkpoints.every = 10
  return config
