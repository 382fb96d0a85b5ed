r"""GRPO on grade-school mathematics with Qwen2.5-7B on a TPU pod.

The scripts in experiments/launch/ start this command on every worker:

    python -m experiments.train --config=experiments/configs/qwen2_5_7b_tpu.py \
      --config.model.path=PATH/TO/Qwen2.5-7B-Instruct

The model is https://huggingface.co/Qwen/Qwen2.5-7B-Instruct.  Everything that
is not set here is as in gsm8k_grpo.py.

Hardware: 256 chips of TPU v5e, or 64 of v5p or v6e.  This command estimates the
memory and the shortest possible time of a step:

    python -m experiments.planning.plan \
      --config=experiments/configs/qwen2_5_7b_tpu.py \
      --topology=v5e:16x16 --model=qwen2.5-7b

The programs were compiled for these chips but not run on them; docs/plans.md
has the plans.  No accuracy was measured.
"""

from experiments.configs import gsm8k_grpo


def get_config():
  config = gsm8k_grpo.get_config()
  # Qwen2.5-7B has 4 key heads: more than 4 parts would replicate the cache.
  config.mesh.tensor = 4
  config.prompts.max_tokens = 512  # the template's own tokens included
  config.rollout.update(prompts=256, max_tokens=1024)
  config.training.micro_prompts = 64
  config.evaluation.update(prompts=512, batch=256)
  config.checkpoints.keep_latest = 2
  return config
