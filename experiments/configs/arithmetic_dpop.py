"""DPO-Positive on arithmetic, on pairs of right and wrong samples.

    python -m experiments.preference \\
      --config=experiments/configs/arithmetic_dpop.py

Task, model and warm start are those of `quickstart.py`.
"""

from experiments.configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.algorithm = dict(name='dpop')
  config.steps = 16 * (5 + 10)
  config.rounds.update(sampling=5, learning=10, batch=64, per_prompt=4)
  config.optimizer.warmup_updates = 2  # of each round
  return config
