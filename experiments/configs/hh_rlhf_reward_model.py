"""A small reward model trained on human comparisons of dialogues.

    python -m experiments.reward_model --config.model.path=FOLDER \\
      --config=experiments/configs/hh_rlhf_reward_model.py

Without `--config.task.path=FILE` the pairs come from the hub.
"""

from experiments.configs import base


def get_config():
  config = base.get_config()
  config.model.path = 'HuggingFaceTB/SmolLM2-135M'
  config.task = dict(name='hh_rlhf', path='', held_out=256)
  config.algorithm = dict(name='reward_model')
  config.prompts.update(max_tokens=128, overlong='drop', chat_template='')
  config.rollout.max_tokens = 384
  config.rounds.batch = 16
  config.steps = 250
  config.training.micro_prompts = 4
  config.optimizer = base.optimizer(1e-4, warmup_updates=20, decay='linear')
  config.evaluation.update(every=50, prompts=0)
  return config
