"""Supervised fine-tuning alone on demonstrations with careless errors.

    python -m experiments.sft --config=experiments/configs/arithmetic_sft.py

Task, model and warm start are those of `quickstart.py`.
"""

from experiments.configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.algorithm = dict(name='sft')
  config.steps = 80
  config.rounds.batch = 256
  return config
