"""RestEM on arithmetic: 16 rounds of sampling, filtering and training.

    python -m experiments.rest_em \\
      --config=experiments/configs/arithmetic_rest_em.py

Task, model and warm start are those of `quickstart.py`.
"""

from experiments.configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.algorithm = dict(name='rest_em')
  config.steps = 16 * (5 + 15)
  config.rounds.update(sampling=5, learning=15, batch=128, per_prompt=4)
  config.optimizer.warmup_updates = 2  # of each round
  return config
