r"""GRPO on grade-school mathematics with Qwen2.5-7B on a TPU pod.

The scripts in experiments/launch/ start this command on every worker:

    python -m experiments.train --config=experiments/configs/qwen2_5_7b_tpu.py \
      --config.model.path=PATH/TO/Qwen2.5-7B-Instruct

The model is public: https://huggingface.co/Qwen/Qwen2.5-7B-Instruct.  Problems
come from the hub (pip install 'jaxrl_llm[data]') or from a folder, as in
gsm8k_grpo.py.

Hardware: 256 chips of TPU v5e, or 64 of v5p or v6e.  This command estimates the
memory and the shortest possible time of a step:

    python -m experiments.planning.plan \
      --config=experiments/configs/qwen2_5_7b_tpu.py \
      --topology=v5e:16x16 --model=qwen2.5-7b

The programs were compiled for these chips but not run on them; docs/plans.md
has the plans.  No accuracy was measured.
"""

from experiments.configs import base


def get_config():
  config = base.get_config()
  config.model.update(path='', dtype='bfloat16', remat=True)
  # Qwen2.5-7B has 4 key heads: more than 4 parts would replicate the cache.
  config.mesh.update(data=1, fsdp=-1, tensor=4)
  config.task = dict(name='gsm8k', path='', held_out=0)
  config.prompts.update(
    max_tokens=512,  # the template's own tokens included
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
  config.rollout.update(prompts=256, samples=8, max_tokens=1024)
  config.training.update(minibatches=2, micro_prompts=64)
  config.steps = 400
  config.optimizer = base.optimizer(1e-6, b2=0.99, warmup_updates=20)
  config.evaluation.update(every=20, prompts=512, batch=256)
  config.checkpoints.update(every=20, keep_latest=2, keep_best=1)
  return config
