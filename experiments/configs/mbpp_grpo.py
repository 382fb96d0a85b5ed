r"""GRPO on basic Python problems (MBPP), from an instruction-tuned model.

    python -m experiments.train --config=experiments/configs/mbpp_grpo.py \
      --config.model.path=PATH/TO/Qwen2.5-Coder-0.5B-Instruct

The model is https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct.  Problems
come from the hub (pip install 'jaxrl_llm[data]'), or from a folder that holds
mbpp.jsonl of https://github.com/google-research/google-research:
--config.task.path=FOLDER.

Programs that the model writes run on this machine, in a sandbox that is not a
security boundary: read the docstring of jaxrl_llm/rewards/sandbox.py, and the
log's warnings about missing protections.

Hardware: one accelerator, as for gsm8k_grpo.py, and CPU cores to run programs:
the 256 programs of a step take about 10 s of one core in total, but
256 · 5 s / cores if none of them terminates.  This configuration was only run
on a CPU, for two steps of a tiny random Qwen2; no accuracy was measured.

Reward: the share of a problem's tests that the program passes.  The prompt
shows one of three tests, for the name of the function and its arguments: a
program that only handles this test earns a third.
"""

from experiments.configs import gsm8k_grpo


def get_config():
  config = gsm8k_grpo.get_config()
  config.task = dict(name='mbpp', path='', held_out=0, shown_tests=1)
  config.prompts.system_prompt = (
    'Write one Python program that solves the task, in a block that begins '
    'with ```python. Use the standard library only.'
  )
  config.rewards = dict(
    correct=dict(
      name='code_tests', score=dict(name='share_passed'), timeout=5.0
    )
  )
  config.steps = 240
  return config
