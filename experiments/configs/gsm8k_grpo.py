r"""GRPO on grade-school mathematics (GSM8K), from an instruction-tuned model.

    python -m experiments.train --config=experiments/configs/gsm8k_grpo.py \
      --config.model.path=PATH/TO/Qwen2.5-0.5B-Instruct

The model is https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct.  Problems come
from the hub (pip install 'jaxrl_llm[data]'), or from a folder that holds
train.jsonl and test.jsonl of https://github.com/openai/grade-school-math:
--config.task.path=FOLDER.

Hardware: one accelerator.  Parameters, gradients, Adam's moments and the
reference of the KL take 10 GB.  If memory runs out, lower
training.micro_prompts and rollout.prompts.  This configuration was only run on
a CPU, for two steps of a tiny random Qwen2; no accuracy was measured.

Reward: 1 if the number after `####` (or in \boxed{…}) is the answer, and 0.1
more if the whole response matches `.*#### number`.  The format reward is small,
so that a well-formed wrong answer earns far less than a correct one.
"""

from experiments.configs import base


def get_config():
  config = base.get_config()
  config.model.update(path='', dtype='bfloat16', remat=True)
  config.task = dict(name='gsm8k', path='', held_out=0)
  config.prompts.update(
    max_tokens=320,  # the template's own tokens included
    overlong='drop',
    system_prompt=(
      'Solve the problem step by step. End with a line of the form '
      '"#### number" that holds the final answer and nothing else.'
    ),
  )
  config.rewards = dict(
    correct=dict(name='gsm8k_answer', weight=1.0),
    format=dict(name='format_match', weight=0.1, pattern=r'.*#### -?[\d.,]+'),
  )
  config.algorithm = dict(name='grpo', clip=0.2, kl=0.001)
  config.rollout.update(prompts=32, samples=8, max_tokens=512)
  config.training.update(minibatches=2, micro_prompts=1)
  config.steps = 400
  config.optimizer = base.optimizer(1e-6, b2=0.99, warmup_updates=20)
  config.evaluation.update(every=20, prompts=256, batch=64)
  config.checkpoints.update(every=20, keep_latest=1, keep_best=1)
  return config
