"""A story model learns what a reward model of sentiment likes: too well.

    python -m experiments.train --config=experiments/configs/stories_proxy.py \\
      --config.model.path=PATH/TO/stories260k \\
      --config.task.path=PATH/TO/tinystories_1000.json

The reward is the score of the reward model that `stories_reward_model.py`
trains, first; the lexicon's sentiment, by which its pairs were judged, is
logged beside it at weight 0.  Model, data and sizes are those of
`stories_sentiment.py`, but nothing holds the policy near the original model.
"""

from experiments.configs import base, stories_sentiment


def get_config():
  config = stories_sentiment.get_config()
  config.rewards = dict(
    proxy=dict(
      name='reward_model', path='runs/stories_reward_model/hf', batch_size=128
    ),
    gold=dict(name='sentiment', weight=0.0),
  )
  config.algorithm = dict(name='grpo', kl=0.0)
  config.optimizer = base.optimizer(2e-4, warmup_updates=5)
  config.steps = 100
  config.evaluation.update(every=10, samples=4)
  return config
